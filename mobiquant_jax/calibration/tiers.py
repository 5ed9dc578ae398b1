"""Slices in tiers: no token reads a slice before all tokens read all slices before it, on the text this is measured on.

A budget between two widths is then a mixture of these two alone, and at the bits of a width all tokens read just that
one, as they do where `slice_tuning` makes each slice the best for its width. On a model of 260 thousand parameters, one
seed, that was better from 2.5 to 3.75 bits than mixtures of all depths, and no better elsewhere up to 4 (the second and
third rows of ``results/slice_tuning.json``). On SmolLM2-135M it was better at 3 bits by 6 %, and worse at 2 by 4 % and
at 2.5 by 1 %, against one tier up to 4 bits and one above, and with longer tuning of the slices and two more budgets
beside 3 (commits 0ec07c5 and 766e31a in ``results/candidates.json``).

Scores of all linears and slices share one threshold, so each slice's are moved, all alike, until a gap lies between
them and those before, in the model as it runs where the slice begins:

    S_e -= max S_e - min_{j < e} S_j + GAP

At as many bits as the slices before it have, the threshold is recorded in the middle of the gap.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mobiquant_jax.calibration.thresholds import Scores
from mobiquant_jax.routing import Router

GAP = 1.0  # of scores, which are logarithms: room for those of other text


def shift_below(scores: Scores, border: Int[Array, ""] | int) -> Float[Array, ""]:
    """By how much a slice's scores must fall to lie below those of the slices before it; negative where they may rise.

    Args:
        scores: of every linear.
        border: index of the slice's score, from 1; may be traced.
    """
    index = jnp.arange(next(iter(scores.values())).shape[-1])
    lowest = jnp.stack([jnp.where(index < border, s, jnp.inf).min() for s in scores.values()]).min()
    highest = jnp.stack([jnp.where(index == border, s, -jnp.inf).max() for s in scores.values()]).max()
    return highest - lowest + GAP


def lower_from(routers: Any, by: float, border: int) -> Any:
    """Routers, in any tree, whose scores from one on are so much lower, or higher where it is negative."""

    def lower(router: Router) -> Router:
        return dataclasses.replace(router, output_bias=router.output_bias.at[..., border:].add(-by))

    return jax.tree.map(lower, routers, is_leaf=lambda node: isinstance(node, Router))
