"""Cached decoding against one full pass: in one go, token by token, in pieces, and for ragged batches."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobiquant_jax.models import KVCache, Llama, LlamaConfig, RopeScaling

SCALING = RopeScaling(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
CONFIGS = {
    "grouped_tied": dict(num_attention_heads=6, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True),
    "multi_head_scaled": dict(num_attention_heads=3, num_key_value_heads=3, head_dim=10, rope_scaling=SCALING),
}


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    sizes = dict(vocab_size=59, hidden_size=32, intermediate_size=44, num_hidden_layers=3)
    return Llama(LlamaConfig(**sizes, **CONFIGS[request.param]))


@pytest.fixture(scope="module")
def rng():
    return np.random.default_rng()


@pytest.fixture(scope="module")
def case(model, rng):
    """A model, random weights, a batch of tokens, the logits of one full pass and the jitted cached pass."""
    tokens = jnp.asarray(rng.integers(0, 59, (3, 21)), jnp.int32)
    variables = jax.jit(model.init)(jax.random.key(int(rng.integers(2**31))), tokens)
    decode = jax.jit(lambda variables, tokens, cache: model.apply(variables, tokens, cache, method=model.decode))
    return model, variables, tokens, np.asarray(jax.jit(model.apply)(variables, tokens)), decode


def relative_difference(got, want):
    return np.abs(np.asarray(got) - want).max() / np.abs(want).max()


@pytest.mark.parametrize("pieces", [(21,), (13,) + (1,) * 8, (1,) * 21, (5, 9, 7)], ids=str)
def test_cached_equals_full_pass(case, pieces):
    model, variables, tokens, want, decode = case
    cache, logits = KVCache.create(model.config, 3, 24), []
    for piece in jnp.split(tokens, np.cumsum(pieces)[:-1], axis=1):
        part, cache = decode(variables, piece, cache)
        logits.append(part)
    assert cache.length.tolist() == [21] * 3
    difference = relative_difference(np.concatenate(logits, axis=1), want)
    print(f"cached against full pass: largest relative difference {difference:.1e}")
    assert difference < 1e-5


def test_ragged_prompts_equal_full_passes(case, rng):
    model, variables, tokens, want, decode = case
    lengths = jnp.array([4, 11, 8])
    padding = jnp.asarray(rng.integers(0, 59, (3, 11)), jnp.int32)
    prompts = jnp.where(jnp.arange(11) < lengths[:, None], tokens[:, :11], padding)
    logits, cache = decode(variables, prompts, KVCache.create(model.config, 3, 24))
    for row, length in enumerate(lengths.tolist()):
        assert relative_difference(logits[row, :length], want[row, :length]) < 1e-5
    cache = replace(cache, length=lengths)
    for step in range(10):
        following = jnp.take_along_axis(tokens, lengths[:, None] + step, axis=1)
        logits, cache = decode(variables, following, cache)
        for row, length in enumerate(lengths.tolist()):
            assert relative_difference(logits[row, 0], want[row, length + step]) < 1e-5


def test_steps_write_the_cache_in_place(case, optimized):
    """A donated cache is the only one: as scanned slices it was copied, read and written whole for every token."""
    model, variables, *_ = case
    cache = KVCache.create(model.config, 8, 512)

    def steps(variables, tokens, cache):
        def step(_, carry):
            logits, cache = model.apply(variables, *carry, method=model.decode)
            return logits.argmax(-1).astype(jnp.int32), cache

        return jax.lax.fori_loop(0, 4, step, (tokens, cache))

    compiled = jax.jit(steps, donate_argnums=2).lower(variables, jnp.zeros((8, 1), jnp.int32), cache).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.75 * (cache.k.nbytes + cache.v.nbytes)


def test_half_precision_cache_stays_close(case):
    model, variables, tokens, want, decode = case
    cache = KVCache.create(model.config, 3, 21, jnp.bfloat16)
    logits, cache = decode(variables, tokens, cache)
    assert cache.k.dtype == cache.v.dtype == jnp.bfloat16
    assert 1e-6 < relative_difference(logits, want) < 0.2


def test_a_write_outside_the_cache_is_dropped(rng):
    empty = jnp.zeros((3, 1, 4, 1, 2))
    old = KVCache(k=empty, v=empty, length=jnp.array([3])).of_layer(jnp.int32(1))
    new = old.write(jnp.ones((1, 2, 1, 2)), 2 * jnp.ones((1, 2, 1, 2)), jnp.array([[3, 4]]))
    assert new.k[0, :, 0, 0].tolist() == [0, 0, 0, 1]
    assert new.v[0, :, 0, 0].tolist() == [0, 0, 0, 2]
    assert not new.whole.k[::2].any() and not new.whole.v[::2].any() and new.whole.length.tolist() == [3]


@pytest.mark.parametrize(("batch", "slots"), [(2, 30), (3, 20)])
def test_tokens_that_do_not_fit(case, batch, slots):
    model, variables, tokens, _, decode = case
    with pytest.raises(ValueError, match=rf"\(3, 21\) do not fit a cache of \({batch}, {slots}\)"):
        decode(variables, tokens, KVCache.create(model.config, batch, slots))


def test_an_empty_cache_is_refused(model):
    with pytest.raises(ValueError, match="got 0 and 8"):
        KVCache.create(model.config, 0, 8)
