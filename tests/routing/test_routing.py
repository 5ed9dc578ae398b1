"""Gates, budgets and policies against closed forms and plain numpy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobiquant_jax import routing

SLICE_BITS = [(2, 2, 2, 2), (2, 1, 1, 2, 2), (4, 4)]


def scores_of(seed, slices, tokens=(3, 257)):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(*tokens, slices - 1)).astype(np.float32))


def inputs_of(seed, slice_bits=(2, 2, 2, 2), **kwargs):
    x = jnp.asarray(np.random.default_rng(seed).normal(size=(3, 257, 8)).astype(np.float32))
    return routing.RoutingInputs(x=x, scores=scores_of(seed, len(slice_bits)), slice_bits=slice_bits, **kwargs)


def test_gate_is_a_step_with_a_sigmoid_gradient():
    scores = jnp.array([-1.0, 0.2, 0.3, 5.0])
    value, grad = jax.value_and_grad(lambda s: (routing.gate(s, 0.25, 0.5) * jnp.arange(1, 5)).sum())(scores)
    assert float(value) == 3 + 4
    sigmoid = 1 / (1 + np.exp(-(np.asarray(scores, np.float64) - 0.25) / 0.5))
    np.testing.assert_allclose(grad, np.arange(1, 5) * sigmoid * (1 - sigmoid) / 0.5, rtol=1e-3)


def test_prefix_masks_make_depths():
    gates = jnp.array([[1, 1, 1], [1, 0, 1], [0, 1, 1], [1, 1, 0]], jnp.float32)
    masks = routing.prefix_masks(gates)
    np.testing.assert_array_equal(routing.mask_depth(masks), [4, 2, 1, 3])
    np.testing.assert_array_equal(routing.mask_bits(masks, (2, 1, 1, 4)), [8, 3, 2, 4])
    np.testing.assert_array_equal(routing.depth_masks(jnp.array([4, 2, 1, 3]), 4), masks)


@pytest.mark.parametrize("slice_bits", SLICE_BITS)
@pytest.mark.parametrize("seed", range(3))
def test_threshold_meets_the_budget_exactly(slice_bits, seed):
    scores = scores_of(seed, len(slice_bits))
    tokens = scores.shape[0] * scores.shape[1]
    for bits in np.linspace(slice_bits[0], 8, 13):
        measured = float(bits_at_threshold(scores, bits, slice_bits))
        assert bits - sum(slice_bits[1:]) / tokens - 1e-3 <= measured <= bits + 1e-3


@partial(jax.jit, static_argnums=2)
def bits_at_threshold(scores, bits, slice_bits):
    """The mean of what tokens read at the threshold for so many bits."""
    tau = routing.threshold_for_bits(scores, bits, slice_bits)
    masks = routing.prefix_masks((scores > tau).astype(jnp.float32))
    return routing.mask_bits(masks, slice_bits).mean()


def test_threshold_weighs_tokens():
    scores, weights = scores_of(0, 4), jnp.asarray(np.random.default_rng(1).uniform(0.1, 5, (3, 257)))
    tau = routing.threshold_for_bits(scores, 3.0, (2, 2, 2, 2), weights)
    bits = routing.mask_bits(routing.prefix_masks((scores > tau).astype(jnp.float32)), (2, 2, 2, 2))
    assert float((bits * weights).sum() / weights.sum()) == pytest.approx(3.0, abs=0.03)
    assert abs(float(bits.mean()) - 3.0) > 1e-4


def test_ends_of_the_budget_are_exact_for_any_scores():
    scores = 1e6 * scores_of(4, 4)
    table = jnp.array([3.0, 0.0, -3.0])
    for bits, expected in ((2.0, 1), (8.0, 4)):
        assert float(routing.threshold_for_bits(scores, bits, (2, 2, 2, 2))) == (np.inf if bits == 2 else -np.inf)
        policy = routing.TableBudget(bits=jnp.full(3, bits))
        inputs = inputs_of(4, table=table, grid=(2.0, 5.0, 8.0))
        assert np.all(np.asarray(routing.mask_depth(policy.masks(inputs))) == expected)


def test_at_the_first_slices_bits_no_gate_opens_however_many_the_scores():
    scores = jax.random.normal(jax.random.key(5), (200_000, 2))
    assert routing.threshold_for_bits(scores, 2.0, (2, 1, 1)) == np.inf
    assert routing.threshold_for_bits(scores, 4.0, (2, 1, 1)) == -np.inf
    tau = routing.threshold_for_bits(scores, 2.5, (2, 1, 1))
    bits = routing.mask_bits(routing.prefix_masks((scores > tau).astype(jnp.float32)), (2, 1, 1))
    assert float(bits.mean()) == pytest.approx(2.5, abs=1e-4)


def test_lookup_interpolates_per_sequence():
    table, grid = jnp.array([4.0, 1.0, -2.0]), (2.0, 4.0, 8.0)
    np.testing.assert_allclose(routing.lookup(table, grid, jnp.array([3.0, 4.0, 7.0])), [2.5, 1.0, -1.25])
    inputs = inputs_of(5, table=table, grid=grid)
    masks = routing.TableBudget(bits=jnp.array([3.0, 4.0, 7.0])).masks(inputs)
    for row, tau in enumerate((2.5, 1.0, -1.25)):
        expected = np.cumprod(np.asarray(inputs.scores[row]) > tau, axis=-1)
        np.testing.assert_array_equal(masks[row], expected)


def test_lookup_is_numpys_interpolation_without_a_loop():
    rng = np.random.default_rng(0)
    grid = (2.0, 2.5, 3.0, 4.25, 5.0, 6.0, 8.0)
    table = -np.sort(rng.normal(size=len(grid))).astype(np.float32)
    bits = np.concatenate([rng.uniform(2.01, 7.99, 200), grid[1:-1]]).astype(np.float32)
    lookup = partial(routing.lookup, jnp.asarray(table), grid)
    np.testing.assert_allclose(lookup(bits), np.interp(bits, grid, table), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(lookup(jnp.array([1.0, 2.0, 8.0, 9.0])), [np.inf, np.inf, -np.inf, -np.inf])
    tables = table + rng.normal(size=(2, 3, 1)).astype(np.float32)
    together = routing.lookup(jnp.asarray(tables), grid, jnp.asarray(bits))
    for at in np.ndindex(2, 3):  # several linears at once: each as alone
        np.testing.assert_array_equal(together[at], routing.lookup(jnp.asarray(tables[at]), grid, jnp.asarray(bits)))
    assert "while" not in str(jax.make_jaxpr(lookup)(bits)) and "scan" not in str(jax.make_jaxpr(lookup)(bits))


@pytest.mark.parametrize("slice_bits", SLICE_BITS)
@pytest.mark.parametrize("bits", [2.5, 3.0, 4.0, 4.5, 5.7, 8.0])
def test_baselines_meet_the_budget_with_adjacent_depths(slice_bits, bits):
    bits = max(bits, slice_bits[0])
    inputs = inputs_of(6, slice_bits, key=jax.random.key(0))
    request = jnp.full(3, bits)
    for policy, tolerance in ((routing.RandomDepth(bits=request), 0.25), (routing.NormBudget(bits=request), 0.02)):
        masks = policy.masks(inputs)
        depths = set(np.unique(routing.mask_depth(masks)).tolist())
        assert max(depths) - min(depths) <= 1
        assert float(routing.mask_bits(masks, slice_bits).mean()) == pytest.approx(bits, abs=tolerance)


def test_norm_budget_takes_the_largest_norms():
    inputs = inputs_of(7)
    depth = np.asarray(routing.mask_depth(routing.NormBudget(bits=jnp.full(3, 3.0)).masks(inputs)))
    norm = np.linalg.norm(np.asarray(inputs.x), axis=-1)
    for row in range(3):
        assert norm[row][depth[row] == 2].min() > norm[row][depth[row] == 1].max()


def test_uniform_depth():
    depth = routing.mask_depth(routing.UniformDepth(depth=jnp.array([1, 3, 4])).masks(inputs_of(8)))
    np.testing.assert_array_equal(depth, np.broadcast_to([[1], [3], [4]], (3, 257)))


@pytest.mark.parametrize("slice_bits", SLICE_BITS)
@pytest.mark.parametrize("share", [0.0, 0.2, 0.55, 1.0])
def test_batch_budget_reads_the_highest_scores_that_it_pays_for(slice_bits, share):
    """All slices of all tokens in one list, by a token's lowest score so far, bought from the top."""
    inputs = inputs_of(10, slice_bits)
    budget = slice_bits[0] + share * (8 - slice_bits[0])
    masks = np.asarray(routing.BatchBudget(bits=jnp.float32(budget)).masks(inputs))
    lowest = np.minimum.accumulate(np.asarray(inputs.scores), axis=-1)
    cost = np.broadcast_to(np.asarray(slice_bits[1:], float), lowest.shape)
    read = masks == 1
    assert set(np.unique(masks)) <= {0.0, 1.0} and np.all(np.diff(masks, axis=-1) <= 0)
    assert read.any() == (share > 0) and read.all() == (share == 1)
    if 0 < share < 1:
        assert lowest[read].min() > lowest[~read].max()
    left = (budget - slice_bits[0]) * lowest[..., 0].size - cost[read].sum()
    assert -2e-4 * lowest[..., 0].size <= left <= sum(slice_bits[1:]) + 1e-3


def test_router_matches_numpy():
    rng = np.random.default_rng(11)
    router = routing.Router.create(jax.random.key(1), 24, 16, 4)
    router = jax.tree.map(lambda p: p + jnp.asarray(rng.normal(size=p.shape), jnp.float32), router)
    x = rng.normal(size=(2, 5, 24)) * 10 ** rng.uniform(-2, 2, (2, 5, 1))
    r = jax.tree.map(lambda p: np.asarray(p, np.float64), router)
    rms = np.sqrt((x**2).mean(-1, keepdims=True))
    hidden = (x / rms) @ r.hidden + np.log(rms) * r.magnitude + r.hidden_bias
    expected = (hidden / (1 + np.exp(-hidden))) @ r.output + r.output_bias
    np.testing.assert_allclose(routing.score(router, jnp.asarray(x, jnp.float32)), expected, rtol=2e-4, atol=2e-4)


def test_untrained_router_mixes_adjacent_depths():
    router = routing.Router.create(jax.random.key(2), 64, 32, 4)
    scores = routing.score(router, jax.random.normal(jax.random.key(3), (4, 100, 64)))
    tau = routing.threshold_for_bits(scores, 3.0, (2, 2, 2, 2))
    depth = np.asarray(routing.mask_depth(routing.prefix_masks((scores > tau).astype(jnp.float32))))
    assert set(np.unique(depth)) == {1, 2}


def test_bad_grid():
    with pytest.raises(ValueError, match=r"budget grid \(3.0, 8.0\)"):
        routing.check_grid((3.0, 8.0), (2, 2, 2, 2))
    with pytest.raises(ValueError, match="recorded thresholds"):
        routing.TableBudget(bits=jnp.full(3, 3.0)).masks(inputs_of(0))
