"""The attention kernel of a decode step on a GPU: ``JAX_PLATFORMS=cuda python -m pytest -m gpu tests``."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobiquant_jax.ops.decode_attention import check_supported, decode_attention

LAYERS, SLOTS = 2, 700


def exact(array):
    return np.asarray(array.astype(jnp.float32), np.float64)


def rounded(array):
    return exact(jnp.asarray(array, jnp.bfloat16))


def rotate(heads, angles):
    """Half-rotation of ``[..., hd]`` in float64, rounded as the kernel rounds."""
    first, second = np.split(heads, 2, axis=-1)
    cos, sin = np.cos(angles), np.sin(angles)
    return rounded(np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1))


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 2, 5, 16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"), [(32, 8, 128), (9, 3, 64), (4, 4, 64), (16, 2, 128), (4, 2, 64), (32, 32, 128)]
)
def test_matches_float64(batch, heads, kv_heads, size):
    check_against_float64(batch, heads, kv_heads, size, SLOTS)


@pytest.mark.gpu
def test_many_keys_for_every_thread_block():
    check_against_float64(1, 32, 8, 128, 4500)


def check_against_float64(batch, heads, kv_heads, size, slots):
    if jax.default_backend() != "gpu":
        pytest.skip("no GPU")
    rng = np.random.default_rng(batch + heads)
    positions = rng.integers(0, slots, batch)
    positions[0] = slots - 1 if batch == 1 else 0
    key, value = (jnp.asarray(rng.normal(size=(LAYERS, batch, slots, kv_heads, size)), jnp.bfloat16) for _ in range(2))
    qkv = jnp.asarray(rng.normal(size=(2, batch, (heads + 2 * kv_heads) * size)), jnp.float32)
    angles = positions[:, None] * 0.1 ** np.linspace(0, 3, size // 2)
    before = exact(key), exact(value)
    mixed, new_key, new_value = jax.jit(decode_attention, donate_argnums=(4, 5))(
        qkv, jnp.asarray([np.cos(angles), np.sin(angles)], jnp.float32), jnp.asarray(positions), 1, key, value
    )
    parts = rounded(np.asarray(qkv).sum(axis=0)).reshape(batch, -1, size)
    q, k, v = np.split(parts, [heads, heads + kv_heads], axis=1)
    q, k = (rotate(part, angles[:, None]) for part in (q, k))
    for b, position in enumerate(positions):
        before[0][1, b, position], before[1][1, b, position] = k[b], v[b]
        keys, values = (part[1, b, : position + 1].repeat(heads // kv_heads, axis=1) for part in before)
        scores = np.einsum("hd,shd->hs", q[b], keys) / np.sqrt(size)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        want = np.einsum("hs,shd->hd", weights / weights.sum(axis=1, keepdims=True), values)
        got = exact(mixed[b]).reshape(heads, size)
        # The result and, where float32 rounds the rotation otherwise, a few numbers of q and k are off by 2^-9.
        assert np.linalg.norm(got - want) / np.linalg.norm(want) < 5e-3
    for got, want in ((new_key, before[0]), (new_value, before[1])):
        close = np.isclose(exact(got), want, rtol=2**-7)
        assert close.all() and (exact(got) == want).mean() > 0.999


@pytest.mark.gpu
def test_a_token_outside_the_cache_is_dropped():
    if jax.default_backend() != "gpu":
        pytest.skip("no GPU")
    rng = np.random.default_rng(0)
    key, value = (jnp.asarray(rng.normal(size=(1, 1, 8, 2, 64)), jnp.bfloat16) for _ in range(2))
    qkv = jnp.asarray(rng.normal(size=(1, 1, 6 * 64)), jnp.float32)
    unturned = jnp.stack([jnp.ones((1, 32)), jnp.zeros((1, 32))])
    mixed, new_key, new_value = decode_attention(qkv, unturned, jnp.asarray([8]), jnp.int32(0), key, value)
    np.testing.assert_array_equal(exact(new_key), exact(key))
    np.testing.assert_array_equal(exact(new_value), exact(value))
    assert np.isfinite(exact(mixed)).all()


def test_a_rotation_of_other_tokens_is_refused():
    cache = jnp.zeros((1, 3, 8, 2, 64), jnp.bfloat16)
    call = jnp.zeros((1, 3, 6 * 64)), jnp.zeros((3, 2, 32)), jnp.zeros(3, jnp.int32), jnp.int32(0), cache, cache
    with pytest.raises(ValueError, match=r"rotation \(3, 2, 32\) .* than \(2, 3, 32\)"):
        decode_attention(*call)


def test_where_it_cannot_run_it_says_why():
    cache = jnp.zeros((1, 1, 8, 2, 32), jnp.bfloat16)
    reason = "heads of 32" if jax.default_backend() == "gpu" else "Hopper"
    with pytest.raises(NotImplementedError, match=reason):
        check_supported(6 * 32, cache)
