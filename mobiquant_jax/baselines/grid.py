"""The fixed-width affine grid that round-to-nearest, GPTQ, AWQ, OmniQuant and their like share.

s   = clip((hi - lo) / (2^n - 1), 1e-5, 1e4)
z   = round(-lo / s)
W_n = s (clip(round(W / s + v) + z, 0, 2^n - 1) - z)          v = 0 but for learned rounding
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mobiquant_jax.quant import unclipped_limits
from mobiquant_jax.quant.grid import group

SMALLEST_SCALE, LARGEST_SCALE = 1e-5, 1e4
MIN_BITS, MAX_BITS = 2, 8


def check_bits(bits: int) -> None:
    """Raises ValueError unless ``bits`` is a width the baselines support."""
    if not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"a fixed-width grid has {MIN_BITS} to {MAX_BITS} bits, got {bits}")


@jax.custom_jvp
def round_straight_through(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Rounds to the nearest integer, exactly; the gradient passes as if it did not.

    A compiler may fuse what precedes into ``x + stop_gradient(round(x) - x)`` and miss the integer by an ulp, which
    would put weights of the two end codes outside the range.
    """
    return jnp.round(x)


@round_straight_through.defjvp
def _round_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return round_straight_through(primals[0]), tangents[0]


def scale_and_zero(
    lo: Float[Array, "*groups"],
    hi: Float[Array, "*groups"],
    bits: int,
    round_zero: Callable[[Array], Array] = jnp.round,
) -> tuple[Float[Array, "*groups"], Float[Array, "*groups"]]:
    """The step and the zero point of each group.

    Args:
        lo: lower limit of each group, in units of the weight.
        hi: upper limit.
        bits: width n.
        round_zero: ``jnp.round`` stops the gradient at the zero point, as OmniQuant does; `round_straight_through`
            lets it pass.

    Returns:
        ``(scale, zero)``; both differentiable in the limits as far as ``round_zero`` is.
    """
    scale = jnp.clip((hi - lo) / (2**bits - 1), SMALLEST_SCALE, LARGEST_SCALE)
    return scale, round_zero(-lo / scale)


def round_to_grid(
    weight: Float[Array, "in out"],
    scale: Float[Array, "groups out"],
    zero: Float[Array, "groups out"],
    bits: int,
    offset: Float[Array, "in out"] | None = None,
) -> Float[Array, "in out"]:
    """The weight as its n-bit code reads, rounded to nearest, straight-through inside the range.

    Args:
        weight: the float kernel.
        scale: step of each group.
        zero: zero point of each group, an integer.
        bits: width n.
        offset: added to ``W / s`` before rounding: learned rounding, in steps.
    """
    steps = group(weight, weight.shape[0] // scale.shape[0]) / scale[:, None]  # [groups, size, out]
    if offset is not None:
        steps = steps + offset.reshape(steps.shape)
    codes = _limit(round_straight_through(steps) + zero[:, None], 2**bits - 1)
    return (scale[:, None] * (codes - zero[:, None])).reshape(weight.shape)


def _limit(codes: Float[Array, "*shape"], top: int) -> Float[Array, "*shape"]:
    """Codes limited to ``0 .. top``; both ends are codes like any other, so the gradient passes there in full.

    ``jnp.clip`` halves it at the ends, which at 2 bits hold half of all weights.
    """
    return jnp.where(codes < 0, 0.0, jnp.where(codes > top, float(top), codes))


def fake_quantize(
    weight: Float[Array, "in out"], lo: Float[Array, "groups out"], hi: Float[Array, "groups out"], bits: int
) -> Float[Array, "in out"]:
    """The weight as read from the n-bit grid between the limits ``lo`` and ``hi`` of each group."""
    return round_to_grid(weight, *scale_and_zero(lo, hi, bits), bits)


def shrunk_limits(
    weight: Float[Array, "in out"], group_size: int, bits: int, steps: int, power: float = 2.4
) -> tuple[Float[Array, "groups out"], Float[Array, "groups out"]]:
    """Group limits, shrunk by the common factor that loses least: GPTQ's search (its ``mse`` option).

        (lo, hi) = p (min, max),  p in {1, ..., 1/2}  minimizing  sum_g |W - W_n|^power

    Args:
        weight: the float kernel.
        group_size: inputs a group.
        bits: width n.
        steps: candidates below 1; 0 keeps the plain minimum and maximum.
        power: of the error; above 2 large errors count more.
    """
    lo, hi = unclipped_limits(weight, group_size)

    def error(factor: Array) -> Float[Array, "groups out"]:
        difference = jnp.abs(weight - fake_quantize(weight, factor * lo, factor * hi, bits))
        return jnp.sum(group(difference**power, group_size), axis=1)

    factors = jnp.linspace(1.0, 0.5, steps + 1)
    best = factors[jnp.argmin(jax.lax.map(error, factors), axis=0)]  # [groups, out]
    return best * lo, best * hi
