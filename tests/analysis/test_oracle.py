"""The oracle against enumeration of all choices."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from mobiquant_jax.analysis.oracle import hull_gains, joint_oracle, spread_over_tokens, token_oracle

SLICE_BITS = (2, 2, 4)
BITS = np.array([2, 4, 8])


def costs_of(seed, shape):
    """Costs that fall with depth, some of them above the convex hull."""
    return -np.sort(-np.random.default_rng([70, seed]).exponential(size=(*shape, 3)), axis=-1)


@pytest.mark.parametrize("seed", range(3))
def test_gains_are_the_multipliers_at_which_slices_are_taken(seed):
    costs = np.random.default_rng([71, seed]).exponential(size=(40, 3))  # need not fall with depth
    gains = np.asarray(hull_gains(jnp.asarray(costs, jnp.float32), SLICE_BITS))
    assert np.all(np.diff(gains, axis=-1) <= 0)
    for multiplier in np.linspace(-1.0, 1.0, 27):
        depth = 1 + (gains > multiplier).sum(axis=-1)
        np.testing.assert_array_equal(depth, 1 + np.argmin(costs + multiplier * BITS, axis=-1))


def least_cost(costs, sizes, budget):
    """The least total cost of tokens within a budget, of all choices."""
    tokens = range(len(costs))
    return min(
        sum(costs[t, k] for t, k in zip(tokens, choice, strict=True))
        for choice in itertools.product(range(3), repeat=len(costs))
        if BITS[list(choice)] @ sizes <= budget + 1e-6
    )


@pytest.mark.parametrize("average", [2.0, 2.9, 4.4, 8.0])
def test_every_linear_of_the_token_oracle_spends_its_own_bits_best(average):
    costs = costs_of(3, (2, 3, 1, 7))
    depth = np.asarray(token_oracle(jnp.asarray(costs, jnp.float32), average, SLICE_BITS))
    for layer, linear in np.ndindex(2, 3):
        chosen, mine = depth[layer, linear, 0] - 1, costs[layer, linear, 0]
        used = BITS[chosen].sum()
        assert average * 7 - 6 < used <= average * 7 + 1e-6  # within one token's deepest step
        assert mine[np.arange(7), chosen].sum() == pytest.approx(least_cost(mine, np.ones(7), used), rel=1e-5)


@pytest.mark.parametrize("average", [2.0, 2.9, 4.4, 8.0])
def test_the_joint_oracle_trades_linears_by_their_size(average):
    costs, shares = costs_of(4, (1, 2, 1, 4)), np.array([0.25, 0.75])
    depth = np.asarray(joint_oracle(jnp.asarray(costs, jnp.float32), jnp.asarray(shares), average, SLICE_BITS))
    sizes = np.repeat(shares, 4) / 4
    chosen, mine = depth.ravel() - 1, costs.reshape(-1, 3)
    used = BITS[chosen] @ sizes
    assert average - 6 * sizes.max() < used <= average + 1e-3
    assert mine[np.arange(8), chosen].sum() == pytest.approx(least_cost(mine, sizes, used), rel=1e-5)


def test_what_a_linear_adds_is_shared_by_squared_error():
    rng = np.random.default_rng(72)
    squared, increases = rng.exponential(size=(2, 3, 1, 9, 3)), rng.exponential(size=(2, 3, 3))
    squared[..., -1] = 0
    increases[0, 1, 0] = -5  # less than at full depth: noise, which costs nothing
    costs = np.asarray(spread_over_tokens(jnp.asarray(increases), jnp.asarray(squared)))
    above = np.maximum(increases - increases[..., -1:], 0)
    np.testing.assert_allclose(costs.mean(axis=(2, 3)), above, rtol=1e-4, atol=1e-7)
    mean = squared.mean(axis=(2, 3), keepdims=True)
    shared = above[:, :, None, None] * squared / np.where(mean > 0, mean, 1)
    np.testing.assert_allclose(costs, shared, rtol=1e-4, atol=1e-7)
