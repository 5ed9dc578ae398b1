"""Depths chosen by the true output error: what a router could reach at equal average bits.

Minimizing a sum of errors under a budget of bits is, with a Lagrange multiplier, a choice for each token by itself:

    min sum_t err_t(k_t)  s.t.  sum_t bits(k_t) <= B        depth_t = argmin_k err_t(k) + lambda bits(k)

As lambda falls a token steps along the lower convex hull of its points (bits(k), err(k)); the slope of the hull at
slice e is the lambda at which it takes the slice. So the slopes are scores, and lambda is their threshold for a budget.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mobiquant_jax.quant import widths
from mobiquant_jax.routing import mask_depth, prefix_masks, threshold_for_bits


def hull_gains(costs: Float[Array, "*batch E"], slice_bits: tuple[int, ...]) -> Float[Array, "*batch E-1"]:
    """What each of slices 2..E gains a bit, along the lower convex hull of the costs of all depths; never rising.

    gain_e = min_{i < e} max_{j >= e} (cost_i - cost_j) / (bits_j - bits_i)
    """
    bits, depths = widths(slice_bits), len(slice_bits)

    def slope(i: int, j: int) -> Array:
        return (costs[..., i] - costs[..., j]) / (bits[j] - bits[i])

    def gain(e: int) -> Array:
        best = [jnp.max(jnp.stack([slope(i, j) for j in range(e, depths)]), axis=0) for i in range(e)]
        return jnp.min(jnp.stack(best), axis=0)

    return jnp.stack([gain(e) for e in range(1, depths)], axis=-1)


def token_oracle(
    costs: Float[Array, "L N B T E"], bits: Float[Array, ""] | float, slice_bits: tuple[int, ...]
) -> Int[Array, "L N B T"]:
    """The cheapest depths at which every linear reads ``bits`` on average: tokens are traded for tokens only."""

    def linear(costs: Float[Array, "B T E"]) -> Int[Array, "B T"]:
        gains = hull_gains(costs, slice_bits)
        return _depth(gains, threshold_for_bits(gains, bits, slice_bits))

    return jax.vmap(jax.vmap(linear))(costs)


def joint_oracle(
    costs: Float[Array, "L N B T E"],
    shares: Float[Array, " N"],
    bits: Float[Array, ""] | float,
    slice_bits: tuple[int, ...],
) -> Int[Array, "L N B T"]:
    """The cheapest depths at which the model reads ``bits`` on average: tokens and linears compete for the same bits.

    Args:
        costs: of each depth, in a unit that compares linears.
        shares: of each linear in a layer's parameters.
        bits: average, weighted by the shares.
        slice_bits: bits of each slice.
    """
    weights = jnp.broadcast_to(shares[:, None, None], costs.shape[:-1])
    gains = hull_gains(costs, slice_bits) / weights[..., None]
    return _depth(gains, threshold_for_bits(gains, bits, slice_bits, weights))


def spread_over_tokens(
    increases: Float[Array, "L N E"], squared: Float[Array, "L N B T E"]
) -> Float[Array, "L N B T E"]:
    """Costs for `joint_oracle`: what each linear adds to the loss, shared out by its tokens' squared errors.

    Args:
        increases: of the loss by each linear at each depth, as `Sensitivity` measures them.
        squared: squared output errors, zero at full depth.
    """
    above_full = jnp.maximum(increases - increases[..., -1:], 0.0)[:, :, None, None]
    mean = jnp.mean(squared, axis=(2, 3), keepdims=True)
    return above_full * squared / jnp.where(mean > 0, mean, 1.0)


def _depth(gains: Float[Array, "*batch E-1"], threshold: Float[Array, ""]) -> Int[Array, "*batch"]:
    return mask_depth(prefix_masks((gains > threshold).astype(jnp.float32)))
