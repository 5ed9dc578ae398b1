"""Depth tables, knapsacks and static searches against other ways to compute the same."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobiquant_jax.analysis.depth_table import forward_at, table_bits
from mobiquant_jax.analysis.knapsack import knapsack
from mobiquant_jax.analysis.markdown import policies_table
from mobiquant_jax.analysis.sensitivity import Sensitivity
from mobiquant_jax.analysis.static import allocate, base_depths, candidates, depths_by_kind
from mobiquant_jax.routing import RandomDepth

BITS = (2, 4, 8)
MODEL_BITS = (4, 8)


def test_a_table_gives_each_token_its_depth(model, steps, tokens):
    """The depths that a policy drew, written into a table, give the same loss and bits."""
    policy = RandomDepth(bits=jnp.array([5.0, 6.5]))
    plain, bits = steps.routed(model.variables, tokens, policy, jax.random.key(0))
    table = np.searchsorted(MODEL_BITS, np.asarray(bits)).astype(np.int32) + 1  # [L, N, B, T]
    assert table.shape == (2, 7, *tokens.shape) and set(np.unique(table)) == {1, 2}
    found = steps.tabled(model.variables, tokens, jnp.asarray(table))
    assert float(found.nll) == pytest.approx(float(plain.nll), rel=1e-5)
    sizes = np.array([rows * columns for rows, columns in model.config.linear_shapes().values()], float)
    used = (np.asarray(bits) * sizes[:, None, None]).sum(axis=1).mean() / sizes.sum()
    assert float(found.bits) == pytest.approx(used, rel=1e-5)
    assert float(plain.bits) == pytest.approx(used, rel=1e-5)
    table[1, 3, 0, :3] = 3 - table[1, 3, 0, :3]
    assert abs(float(steps.tabled(model.variables, tokens, jnp.asarray(table)).nll) - float(plain.nll)) > 1e-3


@pytest.mark.parametrize("seed", range(3))
def test_knapsack_is_exact(seed):
    rng = np.random.default_rng([60, seed])
    costs, sizes = rng.normal(size=(6, 3)), 32 * rng.integers(1, 9, 6)  # costs need not fall with depth
    for average in (2.0, 2.7, 4.0, 6.1, 8.0):
        depths = knapsack(costs, sizes, BITS, average)
        best = min(
            (sum(costs[i, k] for i, k in enumerate(choice)), choice)
            for choice in itertools.product(range(3), repeat=6)
            if np.asarray(BITS)[list(choice)] @ sizes <= average * sizes.sum() + 1e-9
        )
        assert tuple(depths - 1) == best[1]


def test_knapsack_refuses_what_cannot_be():
    with pytest.raises(ValueError, match="1.9 bits is below the 2 bits of the first slice"):
        knapsack(np.zeros((2, 3)), np.array([4, 4]), BITS, 1.9)


@pytest.fixture(scope="module")
def divergence(model, tokens):
    """``(table, tokens) -> float``: from whole passes, in float64."""
    log_softmax = jax.jit(lambda tokens, table: jax.nn.log_softmax(forward_at(model, model.variables, tokens, table)))

    def measure(table, tokens=tokens):
        full = np.full((2, 7), 2)
        log_p, log_q = (np.asarray(log_softmax(tokens, jnp.asarray(t)), np.float64) for t in (full, table))
        return (np.exp(log_p) * (log_p - log_q)).sum(-1).mean()

    return measure


def test_increases_are_those_of_whole_passes(model, tokens, divergence):
    """The measurement shares what comes before a layer and batches what comes after; a plain pass does neither."""
    sensitivity = Sensitivity(model=model, tokens=tokens)
    for base in (1, 2):
        increases, plain = sensitivity.around(base), np.full((2, 7), base)
        np.testing.assert_array_equal(increases[..., base - 1], 0)
        for layer, linear in ((0, 0), (0, 6), (1, 3), (1, 5)):
            table = plain.copy()
            table[layer, linear] = 3 - base
            expected = divergence(table) - divergence(plain)
            assert increases[layer, linear, 2 - base] == pytest.approx(expected, abs=2e-5)


def test_the_best_candidate_is_chosen(model, tokens, divergence):
    assert (base_depths(4), base_depths(3), base_depths(2)) == ([4, 2], [3, 2], [2, 1])
    rng = np.random.default_rng(61)
    measured = [rng.exponential(size=(2, 7, 2)) * [1, 0.1] for _ in range(2)]
    measured[1] *= 20
    budgets = [4.7, 6.2]
    found = allocate(model, measured, np.asarray(tokens), budgets)
    np.testing.assert_array_equal(list(candidates(model, measured, 8.0))[-1].table, 2)
    for bits, allocation in zip(budgets, found, strict=True):
        tried = [candidate.table for candidate in candidates(model, measured, bits)]
        assert len(tried) > 4 and np.all(tried[-1] == 1)
        assert all(float(table_bits(model, jnp.asarray(table))) <= bits + 1e-5 for table in tried)
        losses = [np.mean([divergence(table, window[None]) for window in tokens]) for table in tried]
        assert allocation.divergence == pytest.approx(min(losses), abs=1e-5)
        np.testing.assert_array_equal(allocation.table, tried[int(np.argmin(losses))])


def test_two_depths_by_kind_of_linear_fill_the_budget():
    """Against every choice of depths: those of two depths around the budget that no other kind's slice fits into."""
    rng = np.random.default_rng(62)
    shares = rng.integers(1, 6, 4).astype(float)
    shares /= shares.sum()
    bits_at = (2, 3, 4, 8)
    for bits in (2.6, 3.0, 4.7):
        found = {tuple(depths) for depths in depths_by_kind(shares, bits_at, bits)}
        expected = set()
        for depths in itertools.product(range(1, 5), repeat=4):
            low, high = min(depths), max(depths)
            used = float(np.asarray(bits_at)[np.asarray(depths) - 1] @ shares)
            step = bits_at[high - 1] - bits_at[low - 1]
            more = [step * share for share, depth in zip(shares, depths, strict=True) if depth == low]
            around = len(set(depths)) == 2 and high - low <= 2 and bits_at[low - 1] <= bits < bits_at[high - 1]
            if around and used <= bits + 1e-9 and all(used + extra > bits + 1e-9 for extra in more):
                expected.add(depths)
        assert found == expected and found


def test_policies_as_markdown():
    rows = [("router", 2.5, 4.0), ("static", 2.5, 3.126), ("router", 3.0, 2.0)]
    numbers = {
        "policies": [{"name": n, "asked_bits": b, "perplexity": p} for n, b, p in rows],
        "provenance": {"command": "x --a", "commit": "0123456789", "devices": ["cpu"], "versions": {"jax": "1"}},
        "windows": 4,
        "window_length": 64,
    }
    assert policies_table(numbers).splitlines() == [
        "| average bits | router | static |",
        "|---|---|---|",
        "| 2.5 | 4.00 | 3.13 |",
        "| 3 | 2.00 | - |",
        "",
        "`x --a` at 0123456: 4 windows of 64 tokens; cpu; jax 1.",
    ]
    with pytest.raises(ValueError, match="lacks windows"):
        policies_table({key: value for key, value in numbers.items() if key != "windows"})
