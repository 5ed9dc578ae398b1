"""Recording the table that turns average bits into thresholds.

A router sees other inputs at 2 bits than at 8, so each budget's thresholds are recorded on the model as it runs at that
budget, from the first layer to the last.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mobiquant_jax.models.elastic import ElasticModel, Variables
from mobiquant_jax.routing import BatchBudget, FixedThreshold, prefix_scores, threshold_for_bits
from mobiquant_jax.sharding import Placement, one_device

GLOBAL_ROUNDS = 3  # fixed-point rounds: the pooled threshold changes the activations that change the scores


def record_thresholds(
    model: ElasticModel,
    windows: Int[np.ndarray, "n T"],
    scope: str = "linear",
    progress: Callable[[float], None] = lambda bits: None,
) -> Variables:
    """Fills every linear's ``thresholds``.

    Args:
        model: an elastic model; where it has a placement, call under ``jax.set_mesh`` of its mesh.
        windows: calibration tokens; run as one batch.
        scope: ``"linear"``: every linear reads ``bits`` on average. ``"global"``: one threshold for all linears,
            at which the model reads ``bits`` on average, so that sensitive linears may read more.
        progress: called with each budget as it is done.

    Returns:
        The model's variables with a new collection ``routing``.

    Raises:
        ValueError: the model is not elastic.
    """
    if model.elastic is None:
        raise ValueError("an unquantized model has no thresholds to record")
    placement = model.placement or Placement.create(one_device(), model.config, model.elastic)
    tokens = placement.put_batch(windows)
    record = _record_linear if scope == "linear" else _record_global
    compiled = jax.jit(partial(record, model), out_shardings=placement.replicated)
    columns = []
    for bits in model.elastic.budget_grid:
        columns.append(jax.device_get(compiled(model.variables, tokens, np.float32(bits))))
        progress(bits)
    tables = placement.put_whole(jax.tree.map(lambda *column: np.stack(column, axis=-1), *columns))
    return {**model.variables, "routing": {"layers": tables}}


def _record_linear(model: ElasticModel, variables: Variables, tokens: Int[Array, "n T"], bits: Float[Array, ""]) -> Any:
    assert model.elastic is not None
    scores = _scores(model, variables, tokens, BatchBudget(bits=bits))
    per_layer = jax.vmap(partial(_finite_threshold, bits=bits, slice_bits=model.elastic.slice_bits))
    return _tree(scores, lambda path: per_layer(scores[path]))


def _record_global(model: ElasticModel, variables: Variables, tokens: Int[Array, "n T"], bits: Float[Array, ""]) -> Any:
    assert model.elastic is not None
    slice_bits = model.elastic.slice_bits
    sizes = {path: float(rows * columns) for path, (rows, columns) in model.config.linear_shapes().items()}

    def pooled(scores: dict[str, Array]) -> Float[Array, ""]:
        flat = jnp.concatenate([s.reshape(-1, s.shape[-1]) for s in scores.values()])
        weights = jnp.concatenate([jnp.full(s.size // s.shape[-1], sizes[path]) for path, s in scores.items()])
        return _finite_threshold(flat, bits, slice_bits, weights)

    scores = _scores(model, variables, tokens, BatchBudget(bits=bits))
    for _ in range(GLOBAL_ROUNDS):
        scores = _scores(model, variables, tokens, FixedThreshold(threshold=pooled(scores)))
    threshold = pooled(scores)
    return _tree(scores, lambda path: jnp.full(model.config.num_hidden_layers, threshold))


def _scores(
    model: ElasticModel, variables: Variables, tokens: Array, policy: Any
) -> dict[str, Float[Array, "L n T E-1"]]:
    """Router scores of every linear, by path, under a policy."""
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


def _tree(paths: Any, leaf: Callable[[str], Array]) -> dict[str, Any]:
    """``{part: {name: {"thresholds": leaf(path)}}}`` for each ``part/name``."""
    tree: dict[str, Any] = {}
    for path in paths:
        part, name = path.split("/")
        tree.setdefault(part, {})[name] = {"thresholds": leaf(path)}
    return tree
