"""Recording the table that turns average bits into thresholds.

A router sees other inputs at 2 bits than at 8, so each budget's thresholds are recorded on the model as it runs at that
budget, from the first layer to the last.
"""

import math
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from mobiquant_jax.models import LlamaConfig
from mobiquant_jax.models.elastic import ElasticConfig, ElasticModel, Variables
from mobiquant_jax.quant import widths
from mobiquant_jax.routing import (
    BatchBudget,
    FixedThreshold,
    Policy,
    UniformDepth,
    prefix_scores,
    threshold_for_bits,
)
from mobiquant_jax.sharding import Placement

RUNS = 2

Scores = dict[str, Float[Array, "*tokens E-1"]]
"""Router scores of every linear, by path."""


def record_thresholds(
    model: ElasticModel,
    windows: Int[np.ndarray, "n T"],
    scope: str = "linear",
    progress: Callable[[float, int], None] = lambda bits, left: None,
) -> Variables:
    """Fills every linear's ``thresholds``.

    Args:
        model: an elastic model; where it has a placement, call under ``jax.set_mesh`` of its mesh.
        windows: tokens.
        scope: ``"linear"``: every linear reads ``bits`` on average. ``"global"``: one threshold for all linears,
            at which the model reads ``bits`` on average, so that sensitive linears may read more; at the bits of a
            slice whose scores all lie above those of the next one (`tiers`), all tokens read up to it.
        progress: called with each budget as it is done, from high to low, and how many are left.

    Returns:
        The model's variables with a new collection ``routing``.

    Raises:
        ValueError: the model is not elastic.
    """
    if model.elastic is None:
        raise ValueError("an unquantized model has no thresholds to record")
    placement = model.placed
    tokens = placement.put_batch(windows)
    record = _record_linear if scope == "linear" else _record_global
    columns = {}
    for bits, column in record(model, model.elastic, tokens, placement):
        columns[bits] = jax.device_get(column)
        progress(bits, len(model.elastic.budget_grid) - len(columns))
    rising = (columns[bits] for bits in model.elastic.budget_grid)
    tables = placement.put_whole(jax.tree.map(lambda *column: np.stack(column, axis=-1), *rising))
    return {**model.variables, "routing": {"layers": tables}}


def _record_linear(
    model: ElasticModel, elastic: ElasticConfig, tokens: Int[Array, "n T"], placement: Placement
) -> Iterator[tuple[float, Any]]:
    """A column of every table for each average of the grid; each linear meets the average by itself."""

    def column(variables: Variables, tokens: Int[Array, "n T"], bits: Float[Array, ""]) -> Any:
        scores = _scores(model, variables, tokens, BatchBudget(bits=bits))  # as one batch, whose quantiles these are
        per_layer = jax.vmap(partial(_finite_threshold, bits=bits, slice_bits=elastic.slice_bits))
        return _tree(scores, lambda path: per_layer(scores[path]))

    compiled = jax.jit(column, out_shardings=placement.replicated)
    for bits in reversed(elastic.budget_grid):
        yield bits, compiled(model.variables, tokens, np.float32(bits))


def _record_global(
    model: ElasticModel, elastic: ElasticConfig, tokens: Int[Array, "n T"], placement: Placement
) -> Iterator[tuple[float, Any]]:
    """As `_record_linear`, with one threshold for all linears.

    The threshold changes the activations, which change the scores it is a quantile of: each average starts from the
    scores of the next higher one and runs twice. (Once, from the next lower one, a model that is broken at 2 bits used
    2.37 where 2.5 were asked for.) At the ends of the grid, where a threshold is never reached, nothing runs.
    """

    def pooled(scores: Scores, bits: Float[Array, ""]) -> Float[Array, ""]:
        flat, weights = pool(model.config, scores)
        found = _finite_threshold(flat, bits, elastic.slice_bits, weights)
        return _in_gap(found, flat, bits, elastic.slice_bits)

    def column(
        variables: Variables, tokens: Int[Array, "n T"], scores: Scores, bits: Float[Array, ""]
    ) -> tuple[Float[Array, ""], Scores]:
        def run(_: int, scores: Scores) -> Scores:
            return collect_scores(model, variables, tokens, FixedThreshold(threshold=pooled(scores, bits)))

        scores = jax.lax.fori_loop(0, RUNS, run, scores)
        return pooled(scores, bits), scores

    def everywhere(threshold: Float[Array, ""]) -> Any:
        return _tree(model.config.linear_shapes(), lambda path: jnp.full(model.config.num_hidden_layers, threshold))

    extreme = jax.jit(pooled, out_shardings=placement.replicated)
    compiled = jax.jit(column, donate_argnums=2, out_shardings=(placement.replicated, None))
    scores = scores_at_depth(model, model.variables, tokens, len(elastic.slice_bits))
    lowest, *inner, highest = elastic.budget_grid
    yield highest, everywhere(extreme(scores, np.float32(highest)))
    for bits in reversed(inner):
        threshold, scores = compiled(model.variables, tokens, scores, np.float32(bits))
        yield bits, everywhere(threshold)
    yield lowest, everywhere(extreme(scores, np.float32(lowest)))


def shared_thresholds(
    model: ElasticModel, windows: Int[np.ndarray, "n T"], budgets: tuple[float, ...], depth: int
) -> Float[np.ndarray, " budgets"]:
    """The thresholds of all linears together at which tokens of these scores read each budget.

    Args:
        model: an elastic model with routers; where it has a placement, call under ``jax.set_mesh`` of its mesh. Its
            scores are those of the model as it runs at the middle depth.
        windows: tokens.
        budgets: average bits; at the first slice's bits and at those of ``depth`` slices thresholds are infinite.
        depth: how many slices a token reads at most.
    """
    assert model.elastic is not None, "only an elastic model has routers"
    slice_bits = model.elastic.slice_bits[:depth]

    def thresholds(scores: Scores, budgets: Float[Array, " budgets"]) -> Array:
        flat, weights = pool(model.config, {path: s[..., : depth - 1] for path, s in scores.items()})

        def at(bits: Float[Array, ""]) -> Float[Array, ""]:
            return _in_gap(threshold_for_bits(flat, bits, slice_bits, weights), flat, bits, slice_bits)

        return jax.lax.map(at, budgets)

    placement = model.placed
    scores = scores_at_depth(model, model.variables, placement.put_batch(windows), (depth + 1) // 2)
    compiled = jax.jit(thresholds, out_shardings=placement.replicated)
    return jax.device_get(compiled(scores, placement.put_whole(np.asarray(budgets, np.float32))))


def pool(config: LlamaConfig, scores: Scores) -> tuple[Float[Array, "n E-1"], Float[Array, " n"]]:
    """Scores of all linears together, and the size of the linear that each token's are of."""
    sizes = {path: float(rows * columns) for path, (rows, columns) in config.linear_shapes().items()}
    flat = jnp.concatenate([s.reshape(-1, s.shape[-1]) for s in scores.values()])
    return flat, jnp.concatenate([jnp.full(s.size // s.shape[-1], sizes[path]) for path, s in scores.items()])


def scores_at_depth(model: ElasticModel, variables: Variables, tokens: Int[Array, "n T"], depth: int) -> Scores:
    """`collect_scores` where every token reads so many slices: one program for all depths, and for all such models."""
    assert model.elastic is not None, "only an elastic model has routers"
    placement = model.placed
    program = _depth_program(model.config, model.elastic, model.placement, jnp.dtype(model.dtype))
    return program(variables, tokens, placement.put_whole(np.array([depth], np.int32)))


@lru_cache(maxsize=8)
def _depth_program(
    config: LlamaConfig, elastic: ElasticConfig, placement: Placement | None, dtype: DTypeLike
) -> Callable[..., Scores]:
    model = ElasticModel(config=config, elastic=elastic, variables={}, dtype=dtype, placement=placement)

    def scores(variables: Variables, tokens: Int[Array, "n T"], depth: Int[Array, "1"]) -> Scores:
        return collect_scores(model, variables, tokens, UniformDepth(depth=depth))

    return jax.jit(scores)


def collect_scores(model: ElasticModel, variables: Variables, tokens: Int[Array, "n T"], policy: Policy) -> Scores:
    """Router scores of every linear, a window a device at a time, ``[steps, L, devices, T, E-1]``.

    The policy must not depend on what else is in its batch, or scores would depend on the number of devices.
    """
    shards = 1 if model.placement is None else math.gcd(len(tokens), model.placement.batch_shards)
    # Neighbours in the batch lie on one device: each step takes one window of every device's.
    steps = tokens.reshape(shards, -1, tokens.shape[1]).swapaxes(0, 1)  # [n / shards, shards, T]
    return jax.lax.map(lambda step: _scores(model, variables, step, policy), steps)


def _scores(model: ElasticModel, variables: Variables, tokens: Int[Array, "n T"], policy: Policy) -> Scores:
    """The same of one batch, ``[L, n, T, E-1]``."""
    # Float32, in which perplexity is measured, takes a GPU three times as long: 73 ms a window of 2048 tokens, not 26
    # (SmolLM2-135M, one H200). Inputs are rounded to 11 bits; thresholds are quantiles over a whole text.
    with jax.default_matmul_precision("tensorfloat32"):
        _, state = model.module.apply(variables, tokens, policy, mutable=["scores"])
    return {
        path: state["scores"]["layers"][path.split("/")[0]][path.split("/")[1]]["scores"][0]
        for path in model.config.linear_shapes()
    }


def _finite_threshold(
    scores: Array, bits: Array, slice_bits: tuple[int, ...], weights: Array | None = None
) -> Float[Array, ""]:
    """The threshold, with the extreme scores in place of infinities: the table is interpolated up to its ends."""
    ranked = prefix_scores(scores)
    return jnp.clip(threshold_for_bits(scores, bits, slice_bits, weights), ranked.min(), ranked.max())


def _in_gap(
    found: Float[Array, ""], scores: Float[Array, "n E-1"], bits: Float[Array, ""], slice_bits: tuple[int, ...]
) -> Float[Array, ""]:
    """The middle of a gap, where ``bits`` are those up to a slice whose scores all lie above all of the next slice's.

    A quantile of millions of scores may miss the gap by some. Elsewhere the threshold stays as it was found.
    """
    ranked = prefix_scores(scores)
    lower, upper = ranked.max(axis=0)[1:], ranked.min(axis=0)[:-1]  # ends of the gaps between neighbours
    here = (bits == np.asarray(widths(slice_bits)[1:-1])) & (lower < upper)
    return jnp.where(jnp.any(here), jnp.sum(jnp.where(here, (lower + upper) / 2, 0.0)), found)


def _tree(paths: Any, leaf: Callable[[str], Array]) -> dict[str, Any]:
    """``{part: {name: {"thresholds": leaf(path)}}}`` for each ``part/name``."""
    tree: dict[str, Any] = {}
    for path in paths:
        part, name = path.split("/")
        tree.setdefault(part, {})[name] = {"thresholds": leaf(path)}
    return tree
