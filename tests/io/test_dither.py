"""The dither against its definition: Hugging Face layout [out, in], parameter names sorted, one generator."""

import jax.numpy as jnp
import numpy as np
import pytest

from mobiquant_jax.io.dither import dither
from mobiquant_jax.models import LlamaConfig

LAYERS = 12  # "layers.10" sorts before "layers.2"
SIZES = {  # linear -> (out, in)
    "self_attn.q_proj": (32, 64),
    "self_attn.k_proj": (16, 64),
    "self_attn.v_proj": (16, 64),
    "self_attn.o_proj": (64, 32),
    "mlp.gate_proj": (96, 64),
    "mlp.up_proj": (96, 64),
    "mlp.down_proj": (64, 96),
}


def config(**changes):
    sizes = dict(
        vocab_size=40,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    return LlamaConfig(**(sizes | changes))


def random_weights(seed):
    rng = np.random.default_rng(seed)
    return {
        f"model.layers.{layer}.{name}.weight": rng.normal(size=shape).astype(np.float32)
        for layer in range(LAYERS)
        for name, shape in SIZES.items()
    }


def params_of(weights):
    def kernel(name):
        stacked = np.stack([weights[f"model.layers.{layer}.{name}.weight"].T for layer in range(LAYERS)])
        return {"kernel": stacked}

    parts = {"self_attn": "attention", "mlp": "mlp"}
    layers = {"attention_norm": {"scale": np.ones((LAYERS, 64), np.float32)}, "attention": {}, "mlp": {}}
    for name in SIZES:
        part, linear = name.split(".")
        layers[parts[part]][linear] = kernel(name)
    return {"embedder": {"embedding": np.ones((40, 64), np.float32)}, "layers": layers}


@pytest.mark.parametrize("seed", [0, 3])
def test_dither_is_its_definition(seed):
    weights = random_weights(seed)
    params = params_of(weights)
    dithered = dither(params, config(), seed=seed)

    rng = np.random.default_rng(seed)
    for name in sorted(weights):
        weight = weights[name]
        noise = rng.random(weight.shape, dtype=np.float32) - 0.5
        for start in range(0, weight.shape[1], 32):
            block = weight[:, start : start + 32]
            step = (block.max(axis=1, keepdims=True) - block.min(axis=1, keepdims=True)) / 15
            weights[name][:, start : start + 32] = block + step * noise[:, start : start + 32]
    expected = params_of(weights)
    for part in ("attention", "mlp"):
        for linear, leaf in expected["layers"][part].items():
            np.testing.assert_allclose(dithered["layers"][part][linear]["kernel"], leaf["kernel"], rtol=1e-6, atol=1e-7)
    assert dithered["embedder"] is params["embedder"]
    assert dithered["layers"]["attention_norm"] == params["layers"]["attention_norm"]


def test_dither_leaves_its_argument_alone_and_takes_device_arrays():
    params = params_of(random_weights(1))
    before = params["layers"]["mlp"]["down_proj"]["kernel"].copy()
    dithered = dither(params, config())
    np.testing.assert_array_equal(params["layers"]["mlp"]["down_proj"]["kernel"], before)
    assert np.mean(np.abs(dithered["layers"]["mlp"]["down_proj"]["kernel"] - before)) > 0.01
    params["layers"]["mlp"]["down_proj"] = {"kernel": jnp.asarray(before)}
    again = dither(params, config())
    np.testing.assert_array_equal(
        again["layers"]["mlp"]["down_proj"]["kernel"], dithered["layers"]["mlp"]["down_proj"]["kernel"]
    )


def test_inputs_that_are_no_multiple_of_a_block_are_named():
    params = params_of(random_weights(2))
    params["layers"]["mlp"]["down_proj"] = {"kernel": np.ones((LAYERS, 100, 64), np.float32)}
    with pytest.raises(ValueError, match="^mlp/down_proj: 100 inputs are no multiple of the dither's block of 32$"):
        dither(params, config(intermediate_size=100))
