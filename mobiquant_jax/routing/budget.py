"""Average bits to thresholds and back.

A token reads slice e where ``M_e = min_{j <= e} S_j`` exceeds tau: its bits are ``b_1 + sum_e b_e 1[M_e > tau]``. The
average over tokens falls with tau, and the tau that meets an average of B is a quantile of all M, weighted by b_e:

    tau(B) = weighted quantile of {M_te} at level (8 - B) / (8 - b_1)
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mobiquant_jax.quant import CODE_BITS
from mobiquant_jax.routing.cutoff import cutoff


def prefix_scores(scores: Float[Array, "*batch E-1"]) -> Float[Array, "*batch E-1"]:
    """``M_e = min_{j <= e} S_j``: a token reads slice e exactly where this exceeds the threshold."""
    return jax.lax.cummin(scores, axis=scores.ndim - 1)


def threshold_for_bits(
    scores: Float[Array, "*batch E-1"],
    bits: Float[Array, ""] | float,
    slice_bits: tuple[int, ...],
    weights: Float[Array, "*#batch"] | None = None,
) -> Float[Array, ""]:
    """The threshold at which these tokens read ``bits`` on average (to within one token: its slices may tie).

    Args:
        scores: router scores of the tokens.
        bits: target average, from ``slice_bits[0]`` to the sum of ``slice_bits``; may be traced.
        slice_bits: bits of each slice; of the first slices only, if scores are of those only.
        weights: weight of each token in the average, e.g. the size of its linear; equal if None.

    Returns:
        tau; beyond all scores at the two ends.
    """
    ranked = prefix_scores(scores)
    cost = jnp.broadcast_to(jnp.asarray(slice_bits[1:], jnp.float32), scores.shape)
    if weights is not None:
        cost = cost * weights[..., None]
    limit = (bits - slice_bits[0]) / sum(slice_bits[1:]) * jnp.sum(cost) * (1 + 1e-5)  # sums round
    first_out = cutoff(ranked, cost, limit)
    last_in = jnp.min(jnp.where(ranked > first_out, ranked, jnp.inf))
    # At full depth nothing is left out; at depth one nothing is let in.
    return jnp.where(jnp.isinf(last_in), jnp.inf, (last_in + first_out) / 2)


def lookup(
    table: Float[Array, "*linears grid"], grid: tuple[float, ...], bits: Float[Array, " B"]
) -> Float[Array, "*linears B"]:
    """Thresholds for the requested bits, linear between the entries of a table.

    Args:
        table: each linear's threshold at each entry of ``grid``, falling.
        grid: average bits, rising; at its two ends every token reads the first slice only, or all of them.
        bits: the request, traced.
    """
    ends = jnp.asarray(grid, jnp.float32)
    # Not `jnp.interp`: its search is a loop, which every step of decoding would wait for.
    upper = jnp.clip(jnp.searchsorted(ends, bits, side="right", method="compare_all"), 1, len(grid) - 1)
    share = (bits - ends[upper - 1]) / (ends[upper] - ends[upper - 1])
    below, above = table[..., upper - 1], table[..., upper]
    inner = below + share * (above - below)
    return jnp.where(bits <= grid[0], jnp.inf, jnp.where(bits >= grid[-1], -jnp.inf, inner))


def check_grid(grid: tuple[float, ...], slice_bits: tuple[int, ...]) -> None:
    """Raises ValueError unless the grid rises from the first slice's bits to 8."""
    if len(grid) < 2 or grid[0] != slice_bits[0] or grid[-1] != CODE_BITS or np.any(np.diff(grid) <= 0):
        raise ValueError(f"budget grid {tuple(grid)} must rise from {slice_bits[0]} to {CODE_BITS} bits")


def adjacent_mix(
    bits: Float[Array, "*batch"], slice_bits: tuple[int, ...]
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"]]:
    """The cheapest mixture of two adjacent depths with the given average: ``(lower depth, share of the deeper)``."""
    widths = jnp.cumsum(jnp.asarray(slice_bits, jnp.float32))
    depth = jnp.clip(jnp.searchsorted(widths, bits, side="right"), 1, len(slice_bits) - 1)
    return depth, jnp.clip((bits - widths[depth - 1]) / (widths[depth] - widths[depth - 1]), 0, 1)
