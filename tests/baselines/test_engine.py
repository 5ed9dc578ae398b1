"""The block engine: streams, runs, determinism, and what every method's model is made of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobiquant_jax.baselines import (
    METHODS,
    AutoRoundConfig,
    AWQConfig,
    OmniQuantConfig,
    QATConfig,
    QuantSpec,
    Run,
    find_method,
    quantize_model,
    quantize_models,
    run_omniquant_at,
)
from mobiquant_jax.baselines.kernels import get_kernels
from mobiquant_jax.baselines.rtn import round_to_nearest
from mobiquant_jax.baselines.spec import block_forward, positions
from mobiquant_jax.models import Block, Llama

GROUP = 16
QUICK = {
    "awq": AWQConfig(scale_steps=4, clip_steps=3, search_windows=2),
    "omniquant": OmniQuantConfig(epochs=1),
    "qat": QATConfig(epochs=1, weight_lr=1e-3),
    "autoround": AutoRoundConfig(steps=3, batch_size=2),
}


@pytest.mark.parametrize("method", METHODS)
def test_all_linears_lie_on_their_grid_and_nothing_else_changes(method: str, config, params, windows):
    model = quantize_model(method, config, params, windows, bits=2, group_size=GROUP, settings=QUICK.get(method))
    for path, kernel in get_kernels(model.params["layers"], config).items():
        assert kernel.shape == get_kernels(params["layers"], config)[path].shape and kernel.dtype == jnp.float32
        groups = np.asarray(kernel).reshape(config.num_hidden_layers, -1, GROUP, kernel.shape[-1])
        values = np.sort(np.moveaxis(groups, 2, -1), axis=-1)
        distinct = 1 + np.sum(np.diff(values, axis=-1) > 0, axis=-1)
        assert distinct.max() <= 4, path
    if method == "awq":  # scales move into the norms
        return
    rest = jax.tree.map(
        np.asarray, {**model.params, "layers": {n: model.params["layers"][n] for n in ("attention_norm", "mlp_norm")}}
    )
    dense = {**params, "layers": {n: params["layers"][n] for n in ("attention_norm", "mlp_norm")}}
    jax.tree.map(np.testing.assert_array_equal, rest, dense)


def test_errors_are_those_of_the_models_own_streams(config, params, windows):
    model = quantize_model("gptq", config, params, windows, bits=3, group_size=GROUP)
    x = Llama(config).apply({"params": params}, jnp.asarray(windows), method="embed")
    streams = [x, x]
    for layer in range(config.num_hidden_layers):
        blocks = [jax.tree.map(lambda leaf, layer=layer: leaf[layer], p["layers"]) for p in (params, model.params)]
        streams = [
            Block(config).apply({"params": jax.tree.map(jnp.asarray, block)}, stream, positions(stream))[0]
            for block, stream in zip(blocks, streams, strict=True)
        ]
        wanted = np.mean(np.square(np.asarray(streams[0] - streams[1], np.float64)))
        assert model.errors[layer] == pytest.approx(wanted, rel=1e-3)


def test_a_seed_decides_and_repeats(config, params, windows):
    spec = QuantSpec(config=config, bits=2, group_size=GROUP)
    runs = [Run(settings=QUICK["qat"], seed=seed) for seed in (3, 4)]
    first, other = quantize_models("qat", spec, params, windows, runs)
    again, _ = quantize_models("qat", spec, params, windows, runs)
    jax.tree.map(np.testing.assert_array_equal, first.params, again.params)
    assert first.errors == again.errors != other.errors
    assert [METHODS[name].seeded for name in ("rtn", "gptq", "awq")] == [False] * 3


def test_omniquant_runs_at_other_widths_with_its_own_clipping(config, params, windows):
    settings = OmniQuantConfig(epochs=3, clipping_lr=0.3)
    model = quantize_model("omniquant", config, params, windows, bits=2, group_size=GROUP, settings=settings)
    same, wider = (
        run_omniquant_at(QuantSpec(config=config, bits=bits, group_size=GROUP), params, model) for bits in (2, 4)
    )
    np.testing.assert_allclose(  # at its own width it is the model itself
        *(get_kernels(m.params["layers"], config)["mlp/up_proj"] for m in (same, model)), atol=1e-6
    )
    kernel = get_kernels(params["layers"], config)["mlp/up_proj"].astype(np.float64)
    clipping = model.kept["mlp/up_proj"]
    groups = kernel.reshape(config.num_hidden_layers, -1, GROUP, kernel.shape[-1])
    hi = groups.max(2) / (1 + np.exp(-np.asarray(clipping.gamma, np.float64)))
    lo = groups.min(2) / (1 + np.exp(-np.asarray(clipping.beta, np.float64)))
    scale = ((hi - lo) / 15)[:, :, None]
    zero = np.round(-lo[:, :, None] / scale)
    wanted = scale * (np.clip(np.round(groups / scale) + zero, 0, 15) - zero)
    found = np.asarray(get_kernels(wider.params["layers"], config)["mlp/up_proj"]).reshape(groups.shape)
    assert np.mean(np.abs(found - wanted) < 1e-4) > 0.99
    assert np.mean(np.abs(np.asarray(clipping.gamma) - 4.0) > 0.1) > 0.5  # it did learn
    with pytest.raises(ValueError, match="only OmniQuant's clipping can be run at another width"):
        run_omniquant_at(
            QuantSpec(config=config, bits=4, group_size=GROUP),
            params,
            quantize_model("rtn", config, params, windows, bits=2, group_size=GROUP),
        )


def test_round_to_nearest_needs_no_data(config, params, windows):
    model = quantize_model("rtn", config, params, windows[:1], bits=3, group_size=GROUP)
    for path, kernels in get_kernels(params["layers"], config).items():
        for layer, kernel in enumerate(kernels):
            found = get_kernels(model.params["layers"], config)[path][layer]
            np.testing.assert_allclose(found, round_to_nearest(jnp.asarray(kernel), GROUP, 3), atol=1e-6)
    assert model.errors == () and model.kept is None


def test_a_stream_that_is_not_finite_stops_at_its_block(config, params, windows):
    broken = jax.tree.map(np.copy, params)
    broken["layers"]["mlp"]["up_proj"]["kernel"][1, 0, 0] = np.nan
    with pytest.raises(ValueError, match="output of block 1 is not finite after quantization with Run"):
        quantize_model("gptq", config, broken, windows, bits=4, group_size=GROUP)


def test_block_forward_is_the_block_whatever_the_batching(config, block):
    stream = jnp.asarray(np.random.default_rng(2).normal(size=(20, 5, config.hidden_size)), jnp.float32)
    whole, _ = Block(config).apply({"params": block}, stream, positions(stream))
    np.testing.assert_allclose(block_forward(config, block, stream), whole, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(block_forward(config, block, stream[:7]), whole[:7], rtol=1e-4, atol=1e-5)


def test_bad_specs_are_named(config):
    with pytest.raises(ValueError, match="2 to 8 bits, got 1"):
        QuantSpec(config=config, bits=1, group_size=GROUP)
    with pytest.raises(ValueError, match="attention/q_proj: group size 24 does not divide the 32 input features"):
        QuantSpec(config=config, bits=2, group_size=24)
    with pytest.raises(ValueError, match="unknown baseline 'hqq': one of rtn, gptq, awq"):
        find_method("hqq")
