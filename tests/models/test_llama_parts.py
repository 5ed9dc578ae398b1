"""Rotary embedding, attention, norm and gate against float64 references; the scan, the injected linears, remat."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobiquant_jax.models import (
    Block,
    DenseLinear,
    Llama,
    LlamaConfig,
    RopeScaling,
    apply_rope,
    attention,
    inverse_frequencies,
    rms_norm,
    self_attention,
    swiglu,
)


@pytest.fixture
def config(small_config):
    return small_config(vocab_size=53, hidden_size=24, intermediate_size=40, num_hidden_layers=3, head_dim=8)


@pytest.fixture
def rng():
    return np.random.default_rng()


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def test_inverse_frequencies():
    plain = LlamaConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=128,
        rope_theta=5e5,
    )
    want = 5e5 ** (-np.arange(0, 128, 2) / 128)
    got = inverse_frequencies(plain)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=1e-6)

    scaling = RopeScaling(factor=8, low_freq_factor=1, high_freq_factor=4, original_max_position_embeddings=8192)
    scaled = inverse_frequencies(LlamaConfig(**vars(plain) | {"rope_scaling": scaling}))
    wavelengths = 2 * math.pi / want
    fast, slow = wavelengths < 8192 / 4, wavelengths > 8192 / 1
    assert fast.any() and slow.any() and not (fast | slow).all()
    np.testing.assert_allclose(scaled[fast], want[fast], rtol=1e-6)
    np.testing.assert_allclose(scaled[slow], want[slow] / 8, rtol=1e-6)
    smooth = (8192 / wavelengths - 1) / 3
    blend = (1 - smooth) * want / 8 + smooth * want
    np.testing.assert_allclose(scaled[~fast & ~slow], blend[~fast & ~slow], rtol=1e-5)


def test_rope_is_a_complex_rotation_of_the_half_pairs(rng, config):
    x, positions = normal(rng, 2, 5, 3, 8), rng.integers(0, 500, (2, 5))
    frequencies = inverse_frequencies(config)
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * positions[..., None, None] * frequencies.astype(np.float64))
    want = np.concatenate([turned.real, turned.imag], axis=-1)
    np.testing.assert_allclose(apply_rope(jnp.asarray(x), jnp.asarray(positions), frequencies), want, atol=3e-4)


def test_rope_scores_depend_on_distance_only(rng, config):
    q, k = normal(rng, 1, 1, 1, 8), normal(rng, 1, 1, 1, 8)
    frequencies = inverse_frequencies(config)

    def score(i, j):
        rotated = [apply_rope(jnp.asarray(x), jnp.array([[p]]), frequencies) for x, p in ((q, i), (k, j))]
        return float((rotated[0] * rotated[1]).sum())

    assert score(107, 100) == pytest.approx(score(7, 0), abs=1e-4)
    assert score(0, 0) == pytest.approx(float((q * k).sum()), abs=1e-5)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
def test_attention(heads, kv_heads, rng):
    batch, length, slots, head_dim = 2, 5, 9, 6
    q = normal(rng, batch, length, heads, head_dim)
    k, v = normal(rng, batch, slots, kv_heads, head_dim), normal(rng, batch, slots, kv_heads, head_dim)
    positions = np.stack([np.arange(2, 7), np.arange(4, 9)])
    got = attention(*map(jnp.asarray, (q, k, v, positions)), jnp.arange(slots)[None])
    want = np.zeros(q.shape)
    for b, t, h in np.ndindex(batch, length, heads):
        seen = slice(0, positions[b, t] + 1)
        scores = k[b, seen, h * kv_heads // heads].astype(np.float64) @ q[b, t, h] / math.sqrt(head_dim)
        weights = np.exp(scores - scores.max())
        want[b, t, h] = weights / weights.sum() @ v[b, seen, h * kv_heads // heads]
    np.testing.assert_allclose(got, want, atol=2e-6)


@pytest.mark.parametrize("length", [5, 128, 300, 2100])
def test_self_attention_in_chunks_is_attention(length, rng):
    q, k, v = (jnp.asarray(normal(rng, 2, length, heads, 4)) for heads in (2, 1, 1))
    positions = jnp.arange(length) + jnp.array([[0], [7]])
    whole = attention(q, k, v, positions, positions)
    np.testing.assert_allclose(jax.jit(self_attention)(q, k, v, positions), whole, atol=2e-6)


def test_rms_norm_and_swiglu(rng):
    x, scale, up = normal(rng, 2, 3, 16), normal(rng, 16), normal(rng, 2, 3, 16)
    wide = x.astype(np.float64)
    want = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 0.1) * scale
    np.testing.assert_allclose(rms_norm(jnp.asarray(x), jnp.asarray(scale), 0.1), want, rtol=1e-5, atol=1e-6)
    want = wide / (1 + np.exp(-wide)) * up
    np.testing.assert_allclose(swiglu(jnp.asarray(x), jnp.asarray(up)), want, rtol=1e-5, atol=1e-6)


def test_norm_of_large_half_precision_values_does_not_overflow():
    x = jnp.full((1, 1, 64), 3e4, jnp.float16)
    np.testing.assert_allclose(rms_norm(x, jnp.ones(64), 1e-5), 1.0, rtol=1e-3)


class Probe(nn.Module):
    """A dense linear with a variable in each collection the runtime uses; it adds `control` to its output."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, control):
        gain = self.variable("slices", "gain", lambda: jnp.ones(()))
        shift = self.variable("routing", "shift", lambda: jax.random.normal(self.make_rng("routing"), (2,)))
        self.sow("stats", "mean", x.mean())
        dense = DenseLinear(self.features, self.dtype, name="dense")(x, None)
        return gain.value * dense + 0 * shift.value.sum() + control["offset"]


def test_injected_linears_see_control_and_own_their_collections(rng, config):
    model = Llama(config, linear=Probe)
    tokens = jnp.asarray(rng.integers(0, 53, (2, 6)))
    control = {"offset": jnp.asarray(0.0)}
    keys = {"params": jax.random.key(0), "routing": jax.random.key(1)}
    variables = jax.jit(model.init)(keys, tokens, control)
    shift = variables["routing"]["layers"]["attention"]["q_proj"]["shift"]
    assert shift.shape == (3, 2) and bool((shift[0] != shift[1]).all())
    assert variables["slices"]["layers"]["mlp"]["down_proj"]["gain"].shape == (3,)

    frozen = {name: variables[name] for name in ("params", "slices", "routing")}
    logits, new = model.apply(frozen, tokens, control, mutable=["stats"])
    stats = jax.tree.map(lambda leaf: leaf.shape, new["stats"]["layers"], is_leaf=lambda leaf: hasattr(leaf, "shape"))
    assert stats["attention"]["q_proj"]["mean"] == ((3,),)
    layers = new["stats"]["layers"]
    q, k, v = (layers["attention"][f"{name}_proj"]["mean"][0] for name in "qkv")
    assert bool((q == k).all() & (k == v).all()), "q, k and v read one input"
    assert bool((layers["mlp"]["gate_proj"]["mean"][0] == layers["mlp"]["up_proj"]["mean"][0]).all())

    def strip(tree):
        return {"kernel": tree["dense"]["kernel"]} if "dense" in tree else {k: strip(v) for k, v in tree.items()}

    dense = frozen["params"] | {
        "layers": {
            name: strip(part) if name in ("attention", "mlp") else part
            for name, part in frozen["params"]["layers"].items()
        }
    }
    want = Llama(config).apply({"params": dense}, tokens)
    np.testing.assert_allclose(logits, want, rtol=1e-5, atol=1e-5)
    moved = model.apply(frozen, tokens, {"offset": jnp.asarray(0.5)})
    assert float(jnp.abs(moved - logits).max()) > 1e-2


def test_scanned_blocks_equal_a_loop_over_single_blocks(rng, config):
    model = Llama(config)
    tokens = jnp.asarray(rng.integers(0, 53, (2, 7)))
    variables = jax.jit(model.init)(jax.random.key(3), tokens)
    x = model.apply(variables, tokens, method=model.embed)
    positions = jnp.broadcast_to(jnp.arange(7), (2, 7))
    for layer in range(3):
        params = jax.tree.map(lambda leaf, layer=layer: leaf[layer], variables["params"]["layers"])
        x, cache = Block(config).apply({"params": params}, x, positions, None, None)
        assert cache is None
    logits = model.apply(variables, x, method=model.unembed)
    np.testing.assert_allclose(logits, model.apply(variables, tokens), rtol=1e-5, atol=1e-5)


def test_remat_changes_no_gradient(rng, config):
    tokens = jnp.asarray(rng.integers(0, 53, (2, 7)))
    variables = jax.jit(Llama(config).init)(jax.random.key(4), tokens)

    def loss(model):
        return jax.grad(lambda variables: jnp.square(model.apply(variables, tokens)).mean())

    plain, rematted = jax.jit(loss(Llama(config))), jax.jit(loss(Llama(config, remat=True)))
    assert "remat" in str(jax.make_jaxpr(rematted)(variables)) and "remat" not in str(jax.make_jaxpr(plain)(variables))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), plain(variables), rematted(variables)
    )


def test_bfloat16_activations_give_float32_logits(rng, config):
    tokens = jnp.asarray(rng.integers(0, 53, (2, 7)))
    variables = jax.jit(Llama(config).init)(jax.random.key(5), tokens)
    want = np.asarray(Llama(config).apply(variables, tokens))
    model = Llama(config, dtype=jnp.bfloat16)
    assert model.apply(variables, tokens, method=model.embed).dtype == jnp.bfloat16
    got = model.apply(variables, tokens)
    assert got.dtype == jnp.float32
    difference = np.abs(np.asarray(got) - want).max() / np.abs(want).max()
    assert 1e-6 < difference < 0.05
