"""The cutoff against numpy: sorted values, their costs summed in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobiquant_jax.routing import cutoff


def expected(values, costs, limit):
    """The least of the values, or -inf, above which no more than the limit lies."""
    candidates = np.concatenate([[-np.inf], np.unique(values)])
    return next(c for c in candidates if costs[values > c].astype(np.float64).sum() <= limit)


@pytest.mark.parametrize(
    "values",
    [
        lambda rng, n: rng.normal(size=n),
        lambda rng, n: rng.integers(-2, 3, n) / 2,  # ties, zeros of one sign
        lambda rng, n: np.exp(rng.uniform(-80, 80, n)) * rng.choice([-1, 1], n),  # all normal magnitudes
        lambda rng, n: -np.abs(rng.normal(size=n)),
        lambda rng, n: np.full(n, 3.5),
    ],
)
def test_against_sorted_values(values):
    rng = np.random.default_rng()
    find = jax.jit(cutoff)
    for n in (1, 2, 31):
        drawn = values(rng, n).astype(np.float32)
        costs = rng.choice([0.25, 0.5, 1.0, 2.0], n).astype(np.float32)  # whose sums are exact
        for limit in [0.0, *rng.uniform(0, costs.sum(), 10), costs.sum() - 0.125, costs.sum()]:
            found = find(jnp.asarray(drawn), jnp.asarray(costs), jnp.float32(limit))
            assert np.float32(found) == expected(drawn, costs, np.float32(limit)), (drawn, costs, limit)


def test_with_equal_costs_it_is_a_quantile():
    values = np.random.default_rng().normal(size=(3, 7, 1001)).astype(np.float32)
    found = cutoff(jnp.asarray(values), jnp.ones(values.shape), 0.25 * values.size)
    assert found == np.quantile(values, 0.75, method="inverted_cdf")
