"""The sampler against probabilities computed in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobiquant_jax.serving import SamplingConfig, sample

DRAWS = 200_000


def kept_probabilities(logits, temperature, top_k, top_p):
    """The distribution after temperature, top-k and top-p, in float64, token by token."""
    probabilities = np.exp(logits.astype(np.float64) / temperature)
    order = np.argsort(-probabilities, kind="stable")[:top_k]
    ranked = probabilities[order] / probabilities[order].sum()
    count = 1
    while ranked[:count].sum() < top_p and count < len(ranked):
        count += 1
    kept = np.zeros(len(logits))
    kept[order[:count]] = ranked[:count] / ranked[:count].sum()
    return kept


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, None, 1.0), (0.7, None, 1.0), (1.3, 5, 1.0), (1.0, None, 0.6), (0.8, 8, 0.75), (1.0, 100, 1.0)],
)
def test_distribution(temperature, top_k, top_p):
    rng = np.random.default_rng()
    logits = rng.normal(size=23).astype(np.float32) * 1.5
    want = kept_probabilities(logits, temperature, top_k, top_p)
    config = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p)
    key = jax.random.key(int(rng.integers(2**31)))
    drawn = jax.jit(sample, static_argnums=2)(key, jnp.tile(jnp.asarray(logits), (DRAWS, 1)), config)
    assert drawn.dtype == jnp.int32
    got = np.bincount(np.asarray(drawn), minlength=23) / DRAWS
    assert not got[want == 0].any(), "a token outside the kept set was drawn"
    error = np.sqrt(np.maximum(want * (1 - want), 1e-9) / DRAWS)
    assert np.abs(got - want).max() < 6 * error[np.abs(got - want).argmax()] + 1e-4


def test_rows_have_their_own_distribution():
    logits = jnp.where(jnp.eye(5, dtype=bool), 50.0, 0.0)
    for config in (SamplingConfig(), SamplingConfig(temperature=1.0), SamplingConfig(temperature=1.0, top_p=0.9)):
        assert sample(jax.random.key(0), logits, config).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "config", [SamplingConfig(temperature=1.0, top_k=1), SamplingConfig(temperature=1.0, top_p=1e-9)]
)
def test_one_kept_token_is_the_greedy_one_even_among_equals(config):
    rng = np.random.default_rng()
    logits = jnp.asarray(rng.integers(0, 4, (64, 50)), jnp.float32)  # many equal maxima
    key = jax.random.key(int(rng.integers(2**31)))
    assert (sample(key, logits, config) == sample(key, logits, SamplingConfig())).all()
    assert (sample(key, logits, SamplingConfig()) == logits.argmax(-1)).all()


def test_top_k_keeps_an_exact_count_among_equals():
    logits = jnp.zeros((2000, 10))
    drawn = sample(jax.random.key(1), logits, SamplingConfig(temperature=1.0, top_k=3))
    assert len(np.unique(np.asarray(drawn))) == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(temperature=-0.1), "temperature must be finite and not negative, got -0.1"),
        (dict(temperature=float("nan")), "temperature must be finite and not negative, got nan"),
        (dict(top_k=0), "top_k must be at least 1, got 0"),
        (dict(top_p=0.0), r"top_p must be in \(0, 1\], got 0"),
        (dict(top_p=1.5), r"top_p must be in \(0, 1\], got 1.5"),
    ],
)
def test_bad_settings(fields, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**fields)
