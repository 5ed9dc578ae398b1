"""The block engine: streams, runs, determinism, and what every method's model is made of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobiquant_jax.baselines import (
    METHODS,
    AutoRoundConfig,
    AWQConfig,
    GPTQConfig,
    OmniQuantConfig,
    QATConfig,
    QuantSpec,
    Run,
    autoround,
    awq,
    find_method,
    gptq,
    omniquant,
    qat,
    quantize_blocks,
    quantize_model,
    run_omniquant_at,
)
from mobiquant_jax.baselines.kernels import get_kernels
from mobiquant_jax.baselines.rtn import round_to_nearest
from mobiquant_jax.baselines.spec import block_forward, positions
from mobiquant_jax.models import Block, Llama

GROUP = 16
RUNS = {  # two of each, as in test_training.py: one program a method serves all tests
    "gptq": [Run(settings=GPTQConfig(damping=damping)) for damping in (0.01, 0.1)],
    "awq": [
        Run(settings=AWQConfig(scale_steps=4, clip_steps=3, search_windows=2, most_clipping=c)) for c in (0.5, 0.2)
    ],
    "omniquant": [Run(settings=OmniQuantConfig(epochs=2, batch_size=2, propagated_weight=3.0, clipping_lr=0.3))] * 2,
    "qat": [
        Run(settings=QATConfig(epochs=2, batch_size=2, weight_lr=2e-3, scale_lr=1e-3), seed=seed) for seed in (3, 4)
    ],
    "autoround": [Run(settings=AutoRoundConfig(steps=6, batch_size=2, rounding_rate=0.5, clipping_rate=0.2))] * 2,
}


@pytest.fixture(scope="module")
def make(spec, builders, params, windows):
    """``(method, parameters) -> two models`` at two bits."""

    def make(method: str, params=params):
        if method == "rtn":
            return [quantize_model("rtn", spec.config, params, windows[:1], bits=spec.bits, group_size=GROUP)]
        return quantize_blocks(spec, builders[method], params, windows, RUNS[method])

    return make


@pytest.fixture(scope="module")
def models(make):
    return {method: make(method) for method in METHODS}


@pytest.mark.parametrize("method", METHODS)
def test_all_linears_lie_on_their_grid_and_nothing_else_changes(method: str, config, params, models):
    for model in models[method]:
        for path, kernel in get_kernels(model.params["layers"], config).items():
            assert kernel.shape == get_kernels(params["layers"], config)[path].shape and kernel.dtype == jnp.float32
            groups = np.asarray(kernel).reshape(config.num_hidden_layers, -1, GROUP, kernel.shape[-1])
            values = np.sort(np.moveaxis(groups, 2, -1), axis=-1)
            distinct = 1 + np.sum(np.diff(values, axis=-1) > 0, axis=-1)
            assert distinct.max() <= 4, path
        for norm in ("attention_norm", "mlp_norm"):
            found, dense = (p["layers"][norm]["scale"] for p in (model.params, params))
            # AWQ moves scales into the norms, block-wise QAT trains them.
            assert np.array_equal(found, dense) == (method not in ("awq", "qat"))
        rest = {name: part for name, part in model.params.items() if name != "layers"}
        jax.tree.map(np.testing.assert_array_equal, rest, {name: params[name] for name in rest})


def test_methods_are_those_of_their_modules():
    assert {name: method.seeded for name, method in METHODS.items()} == {
        "rtn": False,
        "gptq": False,
        "awq": False,
        "omniquant": True,
        "qat": True,
        "autoround": True,
    }
    for module in (gptq, awq, omniquant, qat, autoround):
        name = module.__name__.rpartition(".")[2]
        assert METHODS[name].build is module.build
        assert isinstance(METHODS[name].settings.recipe(2), METHODS[name].settings)


def test_errors_are_those_of_the_models_own_streams(config, params, windows, models):
    model = models["gptq"][1]
    x = Llama(config).apply({"params": params}, jnp.asarray(windows), method="embed")
    streams = [x, x]
    block = jax.jit(lambda block, x: Block(config).apply({"params": block}, x, positions(x))[0])
    for layer in range(config.num_hidden_layers):
        blocks = [jax.tree.map(lambda leaf, layer=layer: leaf[layer], p["layers"]) for p in (params, model.params)]
        streams = [block(*pair) for pair in zip(blocks, streams, strict=True)]
        wanted = np.mean(np.square(np.asarray(streams[0] - streams[1], np.float64)))
        assert model.errors[layer] == pytest.approx(wanted, rel=1e-3)


def test_every_method_beats_rounding_in_the_first_block(config, params, windows, models):
    """In the first block, whose inputs are the same for all."""
    dense, rounded = (jax.tree.map(lambda leaf: leaf[0], p["layers"]) for p in (params, models["rtn"][0].params))
    x = Llama(config).apply({"params": params}, jnp.asarray(windows), method="embed")
    error = float(jnp.mean(jnp.square(block_forward(config, dense, x) - block_forward(config, rounded, x))))
    for method in METHODS.keys() - {"rtn"}:
        for model in models[method]:
            assert model.errors[0] < 0.95 * error, method


def test_a_seed_decides_and_repeats(make, models):
    first, other = models["qat"]
    again, _ = make("qat")
    jax.tree.map(np.testing.assert_array_equal, first.params, again.params)
    assert first.errors == again.errors != other.errors


def test_omniquant_runs_at_other_widths_with_its_own_clipping(config, params, windows, models):
    model = models["omniquant"][0]
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
            models["rtn"][0],
        )


def test_round_to_nearest_needs_no_data(config, params, models):
    (model,) = models["rtn"]
    every_layer = jax.jit(jax.vmap(lambda kernel: round_to_nearest(kernel, GROUP, 2)))
    for path, kernels in get_kernels(params["layers"], config).items():
        np.testing.assert_allclose(get_kernels(model.params["layers"], config)[path], every_layer(kernels), atol=1e-6)
    assert model.errors == () and model.kept is None


def test_a_stream_that_is_not_finite_stops_at_its_block(make, params):
    broken = jax.tree.map(np.copy, params)
    broken["layers"]["mlp"]["up_proj"]["kernel"][1, 0, 0] = np.nan
    with pytest.raises(ValueError, match="output of block 1 is not finite after quantization with Run"):
        make("gptq", broken)


def test_block_forward_is_the_block_whatever_the_batching(config, block):
    stream = jnp.asarray(np.random.default_rng(2).normal(size=(20, 5, config.hidden_size)), jnp.float32)
    whole, _ = jax.jit(Block(config).apply)({"params": block}, stream, positions(stream))
    np.testing.assert_allclose(block_forward(config, block, stream), whole, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(block_forward(config, block, stream[:7]), whole[:7], rtol=1e-4, atol=1e-5)


def test_bad_specs_are_named(config):
    with pytest.raises(ValueError, match="2 to 8 bits, got 1"):
        QuantSpec(config=config, bits=1, group_size=GROUP)
    with pytest.raises(ValueError, match="attention/q_proj: group size 24 does not divide the 32 input features"):
        QuantSpec(config=config, bits=2, group_size=24)
    with pytest.raises(ValueError, match="unknown baseline 'hqq': one of rtn, gptq, awq"):
        find_method("hqq")
