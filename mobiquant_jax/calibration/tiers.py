"""Slices in two tiers: no token reads a finer slice before all read every coarser one, on the text it is measured on.

Routers and weights that were tuned together (`routed_tuning`) know depths of up to ``calibration.fine_above`` bits.
Scores of the slices beyond are fitted afterwards, to other gains, and are not comparable: one threshold for both would
at 3 bits let tokens read what the weights were not tuned with. So the finer slices' scores are moved, all alike, until
a gap lies between the tiers:

    S_e -= max S_f - min M_c + GAP      M_c = min_{j <= c} S_j

with c the last coarse slice and f the first finer one. At as many bits as the coarse slices have, the threshold is
recorded in the middle of the gap, and all tokens read just these.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mobiquant_jax.calibration.thresholds import Scores
from mobiquant_jax.routing import Router, prefix_scores

GAP = 1.0  # of scores, which are logarithms: room for those of other text


def shift_below(scores: Scores, coarse: int) -> Float[Array, ""]:
    """By how much the finer slices' scores must fall to lie below the coarse ones'; negative where they may rise.

    Args:
        scores: of every linear.
        coarse: how many of the slices, from the second on, are coarse.
    """
    lowest = jnp.stack([prefix_scores(s)[..., coarse - 1].min() for s in scores.values()]).min()
    highest = jnp.stack([s[..., coarse].max() for s in scores.values()]).max()
    return highest - lowest + GAP


def lower_finer(routers: Any, by: float, coarse: int) -> Any:
    """Routers, in any tree, whose scores of the finer slices are so much lower, or higher where it is negative."""

    def lower(router: Router) -> Router:
        return dataclasses.replace(router, output_bias=router.output_bias.at[..., coarse:].add(-by))

    return jax.tree.map(lower, routers, is_leaf=lambda node: isinstance(node, Router))
