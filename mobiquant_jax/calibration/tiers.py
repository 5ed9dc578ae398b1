"""Slices in two tiers: no token reads a finer slice before nearly all read every coarser one.

Routers and weights that were tuned together (`routed_tuning`) know depths of up to ``calibration.fine_above`` bits.
Scores of the slices beyond are fitted afterwards, to other gains, and are not comparable: one threshold for both would
at 3 bits let tokens read what the weights were not tuned with. So the finer slices' scores are moved, all alike, until
the tiers touch:

    S_e -= quantile(S_f, 1 - TAIL) - quantile(M_c, TAIL)      M_c = min_{j <= c} S_j

with c the last coarse slice and f the first finer one.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mobiquant_jax.calibration.thresholds import Scores
from mobiquant_jax.routing import Router, cutoff, prefix_scores

TAIL = 1e-3  # a share of each tier's scores that may lie beyond the other's


def overlap(scores: Scores, coarse: int) -> Float[Array, ""]:
    """By how much the finer slices' scores reach into the coarse ones'; negative where they do not.

    Args:
        scores: of every linear.
        coarse: how many of the slices, from the second on, are coarse.
    """
    lowest = jnp.concatenate([prefix_scores(s)[..., coarse - 1].ravel() for s in scores.values()])
    highest = jnp.concatenate([s[..., coarse].ravel() for s in scores.values()])
    ones = jnp.ones_like(lowest)
    return cutoff(highest, ones, TAIL * lowest.size) - cutoff(lowest, ones, (1 - TAIL) * lowest.size)


def lower_finer(routers: Any, by: float, coarse: int) -> Any:
    """Routers, in any tree, whose scores of the finer slices are so much lower, or higher where it is negative."""

    def lower(router: Router) -> Router:
        return dataclasses.replace(router, output_bias=router.output_bias.at[..., coarse:].add(-by))

    return jax.tree.map(lower, routers, is_leaf=lambda node: isinstance(node, Router))
