"""The recorded thresholds: the bits they give on the calibration text, and numpy's quantiles of the scores."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobiquant_jax.calibration import record_thresholds, thresholds
from mobiquant_jax.calibration.thresholds import collect_scores, scores_at_depth, shared_thresholds
from mobiquant_jax.models import Llama
from mobiquant_jax.models.elastic import ElasticConfig, ElasticModel
from mobiquant_jax.routing import FixedThreshold, TableBudget, UniformDepth

# No token twice: two of a kind have one score in the first layer, and a threshold lets in both or neither.
WINDOWS = np.random.default_rng(50).permutation(97)[:96].reshape(2, 48).astype(np.int32)
TOKENS = WINDOWS.size
INNER = (1, 2)  # entries of the grid between its ends


@pytest.fixture(scope="module", params=[(2, 2, 2, 2), (1, 1, 2, 4)], ids=str)
def model(request, random_elastic):
    grid = (float(request.param[0]), 3.0, 5.5, 8.0)
    elastic = ElasticConfig(group_size=16, slice_bits=request.param, router_hidden_size=4, budget_grid=grid)
    return random_elastic(51, elastic, hidden_size=32, intermediate_size=48, num_attention_heads=2, head_dim=16)


@pytest.fixture(scope="module")
def sown(model):
    """``(variables, policy) -> {linear: (scores [L, tokens, E-1], bits [L, tokens])}`` on the calibration windows."""

    @jax.jit
    def apply(variables, policy):
        return model.module.apply(variables, WINDOWS, policy, mutable=["scores", "stats"])[1]

    def call(variables, policy):
        state = apply(variables, policy)
        found = {}
        for path in model.config.linear_shapes():
            part, name = path.split("/")
            scores = np.asarray(state["scores"]["layers"][part][name]["scores"][0], np.float64)
            bits = np.asarray(state["stats"]["layers"][part][name]["bits"][0], np.float64)
            found[path] = scores.reshape(len(scores), TOKENS, -1), bits.reshape(len(bits), TOKENS)
        return found

    return call


def tables(variables):
    """The recorded table ``[L, grid]`` of every linear."""
    layers = variables["routing"]["layers"]
    return {f"{part}/{name}": np.asarray(layers[part][name]["thresholds"]) for part in layers for name in layers[part]}


def test_scores_of_every_depth_are_those_of_tokens_that_read_it(model, sown):
    """One program for all depths; what a token reads changes the scores of the layers behind."""
    found = {depth: scores_at_depth(model, model.variables, WINDOWS, depth) for depth in (1, 2, 4)}
    for depth, scores in found.items():
        wanted = sown(model.variables, UniformDepth(depth=jnp.array([depth])))
        for path, (want, _) in wanted.items():
            got = np.moveaxis(np.asarray(scores[path]), 1, 0).reshape(want.shape)  # from [steps, L, devices, T, E-1]
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    assert np.any(np.abs(found[1]["mlp/down_proj"] - found[4]["mlp/down_proj"]) > 1e-2)
    key = model.config, model.elastic, model.placement, jnp.dtype(model.dtype)
    assert thresholds._depth_program(*key)._cache_size() == 1


def lower_from_two(path, leaf):
    """Routers' output biases with all but the first far lower."""
    return leaf.at[..., 1:].add(-50.0) if getattr(path[-1], "name", "") == "output_bias" else leaf


def bits_at(scores, threshold, slice_bits):
    """Average bits of scores ``[..., E-1]`` at a threshold: slice e is read where the least score up to it is above."""
    return slice_bits[0] + np.mean((np.minimum.accumulate(scores, axis=-1) > threshold) @ np.array(slice_bits[1:]))


def test_every_linear_meets_every_budget(model, sown):
    seen = []
    variables = record_thresholds(model, WINDOWS, "linear", lambda bits, left: seen.append((bits, left)))
    slice_bits, grid = model.elastic.slice_bits, model.elastic.budget_grid
    assert seen == list(zip(reversed(grid), range(len(grid) - 1, -1, -1), strict=True))
    assert variables["slices"] is model.variables["slices"]
    recorded = tables(variables)
    for entry in INNER:
        budget = grid[entry]
        request = TableBudget(bits=jnp.full(len(WINDOWS), budget))
        for path, (scores, bits) in sown(variables, request).items():
            for layer in range(model.config.num_hidden_layers):
                # Whole slices, and those of one token may tie: a little less than 8 bits of one token are left over.
                assert budget - 8 / TOKENS <= bits[layer].mean() <= budget + 1e-3, (path, layer)
                threshold = recorded[path][layer, entry]
                assert bits_at(scores[layer], threshold, slice_bits) == pytest.approx(bits[layer].mean())
                ranked = np.sort(np.minimum.accumulate(scores[layer], axis=-1).ravel())
                below = ranked[ranked <= threshold].max()  # the next score to be let in would break the budget
                assert bits_at(scores[layer], np.nextafter(below, -np.inf), slice_bits) > budget + 1e-4
                if len(set(slice_bits)) == 1:
                    # Of a token's slices that tie none is let in unless all are.
                    level, step, tie = (8 - budget) / (8 - slice_bits[0]), 1.5 / ranked.size, 3 / ranked.size
                    lower, upper = np.quantile(ranked, [max(level - step, 0), min(level + step + tie, 1)])
                    assert lower <= threshold <= upper
    for path, table in recorded.items():
        assert np.all(np.isfinite(table)), path  # interpolation reaches both ends


@pytest.mark.parametrize("model", [(1, 1, 2, 4)], indirect=True)
def test_one_threshold_for_all_linears_meets_the_budget_of_the_model(model, sown):
    variables = record_thresholds(model, WINDOWS, "global")
    grid, shapes = model.elastic.budget_grid, model.config.linear_shapes()
    recorded = tables(variables)
    for entry in INNER:
        (threshold,) = {float(value) for table in recorded.values() for value in table[:, entry]}
        found = sown(variables, TableBudget(bits=jnp.full(len(WINDOWS), grid[entry])))
        sizes = {path: np.prod(shapes[path]) for path in shapes}
        used = {path: bits.mean() for path, (_, bits) in found.items()}
        average = np.average(list(used.values()), weights=[sizes[path] for path in used])
        assert average == pytest.approx(grid[entry], abs=0.1)
        assert max(used.values()) - min(used.values()) > 0.3  # some linears read more than others
        same = sown(variables, FixedThreshold(threshold=jnp.float32(threshold)))
        assert all(np.array_equal(same[path][1], found[path][1]) for path in found)


@pytest.mark.parametrize("model", [(1, 1, 2, 4)], indirect=True)
@pytest.mark.parametrize("gap", [True, False])
def test_at_the_bits_of_a_tier_the_threshold_is_in_the_middle_of_the_gap(model, monkeypatch, gap):
    """Where there is one; quantiles, which of millions of scores miss it by some, are far off here."""

    def lower(path, leaf):
        return leaf.at[..., 2:].add(-50.0 * gap) if getattr(path[-1], "name", "") == "output_bias" else leaf

    monkeypatch.setattr(thresholds, "_finite_threshold", lambda scores, *_: jnp.float32(1000.0))
    variables = model.variables | {"params": jax.tree_util.tree_map_with_path(lower, model.variables["params"])}
    elastic = dataclasses.replace(model.elastic, budget_grid=(1.0, 3.0, 4.0, 8.0))
    tiered = dataclasses.replace(model, variables=variables, elastic=elastic)
    found = tables(record_thresholds(tiered, WINDOWS, "global")).values()
    (threshold,) = {float(value) for table in found for value in table[:, 2]}
    assert all(np.all(table[:, (0, 1, 3)] == 1000.0) for table in found)
    if not gap:
        assert threshold == 1000.0
        return
    scores = collect_scores(tiered, variables, jnp.asarray(WINDOWS), FixedThreshold(threshold=jnp.float32(threshold)))
    every = np.concatenate([np.asarray(s, np.float64).reshape(-1, 3) for s in scores.values()])
    assert threshold == pytest.approx((np.min(every[:, :2]) + np.max(every[:, 2])) / 2, rel=1e-4)


def test_an_unquantized_model_has_no_thresholds(model):
    dense = ElasticModel(config=model.config, variables={"params": {}})
    assert isinstance(dense.module, Llama)
    with pytest.raises(ValueError, match="^an unquantized model has no thresholds to record$"):
        record_thresholds(dense, WINDOWS)


def test_shared_thresholds_are_quantiles_of_all_linears_scores(model, sown):
    """Of the first slices only; each token as heavy as its linear is large."""
    depth = 3
    slice_bits = model.elastic.slice_bits[:depth]
    lowest, highest = slice_bits[0], sum(slice_bits)
    budgets = (float(lowest), lowest + 1.0, highest - 0.5, float(highest))
    found = shared_thresholds(model, WINDOWS, budgets, depth)
    assert found.shape == (4,)
    assert found[0] == np.inf and found[-1] == -np.inf and found[1] > found[2]

    middle = UniformDepth(depth=jnp.array([2]))
    scores = jax.jit(lambda v: collect_scores(model, v, jnp.asarray(WINDOWS), middle))(model.variables)
    sizes = {path: rows * columns for path, (rows, columns) in model.config.linear_shapes().items()}
    read, weight = np.zeros(2), 0
    for path, of_linear in scores.items():
        coarse = np.asarray(of_linear, np.float64)[..., : depth - 1]
        read += sizes[path] * np.array([bits_at(coarse, threshold, slice_bits) for threshold in found[1:3]])
        weight += sizes[path]
    np.testing.assert_allclose(read / weight, budgets[1:3], atol=0.02)


def test_a_shared_threshold_at_the_bits_of_a_tier_is_in_the_middle_of_its_gap(model, monkeypatch):
    monkeypatch.setattr(thresholds, "threshold_for_bits", lambda *_: jnp.float32(1000.0))
    depth = 3
    (width,) = np.cumsum(model.elastic.slice_bits)[1 : depth - 1]
    variables = model.variables | {
        "params": jax.tree_util.tree_map_with_path(lower_from_two, model.variables["params"])
    }
    tiered = dataclasses.replace(model, variables=variables)
    found, other = shared_thresholds(tiered, WINDOWS, (float(width), width + 0.5), depth)
    assert other == 1000.0
    scores = collect_scores(tiered, variables, jnp.asarray(WINDOWS), UniformDepth(depth=jnp.array([2])))
    every = np.concatenate([np.asarray(s, np.float64).reshape(-1, 3) for s in scores.values()])
    assert found == pytest.approx((np.min(every[:, 0]) + np.max(every[:, 1])) / 2, rel=1e-4)


@pytest.mark.parametrize(
    "bits, shift, wanted",
    [
        (4.0, 0.0, 2.5),  # between 3 and 2
        (6.0, 0.0, 0.5),
        (5.0, 0.0, 9.0),
        (2.0, 0.0, 9.0),
        (8.0, 0.0, 9.0),
        (4.0, 1.0, 9.0),  # scores of the second and third slice meet
        (6.0, 1.0, 1.0),
    ],
)
def test_a_threshold_in_a_gap(bits, shift, wanted):
    scores = jnp.array([[4.0, 2.0 + shift, 0.0], [3.0, 1.0 + shift, -1.0]])
    found = thresholds._in_gap(jnp.float32(9.0), scores, jnp.float32(bits), (2, 2, 2, 2))
    assert float(found) == wanted


def test_two_slices_have_no_gap_between_widths():
    found = thresholds._in_gap(jnp.float32(9.0), jnp.ones((3, 1)), jnp.float32(4.0), (4, 4))
    assert float(found) == 9.0
