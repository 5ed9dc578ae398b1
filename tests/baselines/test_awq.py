"""AWQ: folding is exact, and both searches find the best of their candidates."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobiquant_jax.baselines import AWQConfig, QuantSpec, Run, quantize_blocks, quantize_models
from mobiquant_jax.baselines import spec as specs
from mobiquant_jax.baselines.awq import clipped_limits
from mobiquant_jax.baselines.awq_search import ChannelScales, channel_scale, fold, search_scales
from mobiquant_jax.baselines.capture import INPUT_GROUPS, TokenWeighting, capture
from mobiquant_jax.baselines.grid import fake_quantize
from mobiquant_jax.baselines.kernels import get_kernels, map_kernels
from mobiquant_jax.baselines.rtn import round_to_nearest
from mobiquant_jax.baselines.spec import BlockOutcome, BlockTask
from mobiquant_jax.models import Llama

GROUP = 16
block_forward = jax.jit(specs.block_forward, static_argnums=0)


@pytest.fixture
def stream(config):
    return jnp.asarray(np.random.default_rng(3).normal(size=(4, 12, config.hidden_size)), jnp.float32)


def random_scales(config, rng) -> ChannelScales:
    def draw(size: int):
        return jnp.asarray(np.exp(rng.normal(size=size)), jnp.float32)

    own_values = config.num_key_value_heads == config.num_attention_heads
    heads = config.num_attention_heads * config.head_dim
    return ChannelScales(
        qkv=draw(config.hidden_size),
        o=draw(heads) if own_values else None,
        gate_up=draw(config.hidden_size),
        down=draw(config.intermediate_size),
    )


def test_folding_leaves_the_function_unchanged(config, block, stream):
    scales = random_scales(config, np.random.default_rng(4))
    folded = fold(block, scales, config)
    before, after = block_forward(config, block, stream), block_forward(config, folded, stream)
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4)
    for path, kernel in get_kernels(folded, config).items():
        changed = not np.allclose(kernel, get_kernels(block, config)[path])
        assert changed == (path != "attention/o_proj" or scales.o is not None), path


def test_the_scale_is_centred_and_flat_at_exponent_zero():
    magnitude = jnp.asarray(np.exp(np.random.default_rng(5).normal(size=20)), jnp.float32)
    np.testing.assert_allclose(channel_scale(magnitude, jnp.zeros(())), 1.0, rtol=1e-6)
    scale = np.asarray(channel_scale(magnitude, jnp.asarray(0.6)), np.float64)
    np.testing.assert_allclose(scale.max() * scale.min(), 1.0, rtol=1e-5)
    np.testing.assert_allclose(
        scale / scale[0], (np.asarray(magnitude, np.float64) / float(magnitude[0])) ** 0.6, rtol=1e-5
    )


def test_the_search_takes_the_best_exponent(spec, config, block, stream):
    paths = tuple(paths[0] for paths in INPUT_GROUPS)
    found = jax.jit(lambda block, x: capture(config, block, x, paths, TokenWeighting()))(block, stream)
    exponents = np.arange(8) / 8
    chosen = jax.jit(partial(search_scales, spec))(jnp.asarray(exponents), block, stream, found)
    kernels = get_kernels(block, config)

    def scales(path: str) -> list[np.ndarray]:
        magnitude = np.asarray(found[path].magnitude, np.float64)
        centred = [np.maximum(magnitude**exponent, 1e-4) for exponent in exponents]
        return [scale / np.sqrt(scale.max() * scale.min()) for scale in centred]

    def best_of_its_own(path: str) -> np.ndarray:
        """The scale that costs the linear's own output least, in float64."""
        losses, gram = [], np.asarray(found[path].gram, np.float64)
        for scale in scales(path):
            rounded = round_to_nearest(kernels[path] * scale[:, None].astype(np.float32), GROUP, 2)
            difference = np.asarray(rounded, np.float64) / scale[:, None] - kernels[path]
            losses.append(np.einsum("io,ij,jo->", difference, gram, difference))
        return scales(path)[int(np.argmin(losses))]

    def best_of_the_output(part: str, names: tuple[str, ...], field: str, whole: dict) -> np.ndarray:
        """The scale that costs the output of a block, of which ``part`` is the last that has any effect, least."""
        wanted = block_forward(config, whole, stream)

        @jax.jit
        def loss(scale):
            folded = fold(whole, dataclasses.replace(flat, **{field: scale}), config)
            rounded = {name: {"kernel": round_to_nearest(folded[part][name]["kernel"], GROUP, 2)} for name in names}
            found = block_forward(config, folded | {part: folded[part] | rounded}, stream)
            return jnp.mean(jnp.square(found - wanted))

        candidates = scales(f"{part}/{names[0]}")
        losses = [float(loss(jnp.asarray(scale, jnp.float32))) for scale in candidates]
        assert len(set(losses)) == len(losses)
        return candidates[int(np.argmin(losses))]

    flat = ChannelScales(
        qkv=jnp.ones(config.hidden_size),
        o=None,
        gate_up=jnp.ones(config.hidden_size),
        down=jnp.ones(config.intermediate_size),
    )
    np.testing.assert_allclose(chosen.down, best_of_its_own("mlp/down_proj"), rtol=1e-5)
    if config.num_key_value_heads == config.num_attention_heads:
        np.testing.assert_allclose(chosen.o, best_of_its_own("attention/o_proj"), rtol=1e-5)
    else:
        assert chosen.o is None
    best = best_of_the_output("mlp", ("gate_proj", "up_proj"), "gate_up", block)
    np.testing.assert_allclose(chosen.gate_up, best, rtol=1e-5)
    silent = jnp.zeros_like(kernels["mlp/down_proj"])
    attention_only = block | {"mlp": block["mlp"] | {"down_proj": {"kernel": silent}}}
    best = best_of_the_output("attention", ("q_proj", "k_proj", "v_proj"), "qkv", attention_only)
    np.testing.assert_allclose(chosen.qkv, best, rtol=1e-5)


@pytest.mark.parametrize("bits", [2, 3])
def test_clipping_takes_the_best_range_of_each_group(config, bits: int):
    rng = np.random.default_rng(bits)
    weight = rng.standard_t(3, (48, 10)).astype(np.float32)
    inputs = rng.normal(size=(100, 48)) @ rng.normal(size=(48, 48))
    gram = inputs.T @ inputs / 100
    spec = QuantSpec(config=config, bits=bits, group_size=GROUP)
    lo, hi = (
        np.asarray(x) for x in clipped_limits(jnp.asarray(weight), jnp.asarray(gram, jnp.float32), spec, AWQConfig())
    )
    grouped = weight.reshape(-1, GROUP, 10)
    largest = np.abs(grouped).max(1)
    blocks = [gram[start : start + GROUP, start : start + GROUP] for start in range(0, 48, GROUP)]

    def error(lo, hi) -> np.ndarray:
        difference = np.asarray(
            fake_quantize(jnp.asarray(weight), jnp.asarray(lo), jnp.asarray(hi), bits) - weight, np.float64
        )
        return np.stack(
            [np.einsum("io,ij,jo->o", d, h, d) for d, h in zip(difference.reshape(-1, GROUP, 10), blocks, strict=True)]
        )

    candidates = [
        error(np.maximum(grouped.min(1), -share * largest), np.minimum(grouped.max(1), share * largest))
        for share in 1 - 0.05 * np.arange(10, dtype=np.float32)
    ]
    np.testing.assert_allclose(error(lo, hi), np.min(candidates, axis=0), rtol=1e-3)
    assert (np.min(candidates, axis=0) < 0.9 * candidates[0]).any()
    unclipped = clipped_limits(jnp.asarray(weight), jnp.asarray(gram, jnp.float32), spec, AWQConfig(clip_steps=0))
    np.testing.assert_array_equal(unclipped[0], grouped.min(1))
    np.testing.assert_array_equal(unclipped[1], grouped.max(1))


def test_eight_bits_are_nearly_exact(config, params, windows):
    """Whatever the scales, they are folded: at 8 bits the model is the dense one, and closer than without scales."""
    spec = QuantSpec(config=config, bits=8, group_size=GROUP)
    settings = AWQConfig(scale_steps=5, search_windows=2)
    (scaled,) = quantize_models("awq", spec, params, windows, [Run(settings=settings)])

    @jax.jit
    @jax.vmap
    def rounded(block):
        return map_kernels(lambda kernel: round_to_nearest(kernel, GROUP, 8), block, config)

    def only_rounded(task: BlockTask) -> BlockOutcome:
        return BlockOutcome(params=rounded(jax.tree.map(lambda leaf: leaf[None], task.dense)))

    (plain,) = quantize_blocks(spec, only_rounded, params, windows, [Run(settings=settings)])
    full = Llama(config).apply({"params": params}, jnp.asarray(windows), method="embed")
    for layer in range(config.num_hidden_layers):
        full = block_forward(config, jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["layers"]), full)
        assert scaled.errors[layer] < 1e-3 * float(jnp.mean(jnp.square(full)))
        assert scaled.errors[layer] < plain.errors[layer]


def test_mistaken_settings_are_named():
    with pytest.raises(ValueError, match=r"awq.most_clipping=1.5 must be between 0 and 1"):
        AWQConfig(most_clipping=1.5)
