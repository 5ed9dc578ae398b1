"""The nested 8-bit grid: one (scale, zero point) pair a group, any width by truncation.

With the group limits ``lo`` and ``hi`` (design [D]: four bins at two bits, zero point on the 8-bit grid):

    s   = (hi - lo) / 4                           rounded to bfloat16, so that storing it loses nothing
    z   = round(-64 lo / s)
    Q   = clip(floor(64 W / s) + z, 0, 255)       one uint8 a weight, floor-aligned
    W_r = s / 64 * ((Q >> (8 - r)) * 2^(8 - r) + 2^(7 - r) - z)          decode at the bin's midpoint

``Q >> (8 - r)`` only drops low bits, so a wider read refines a narrower one and never contradicts it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

CODE_BITS = 8
FINE_STEPS = 64  # 8-bit steps in one 2-bit step: the unit of the zero point
_MAX_ZERO = 32000.0  # zero points are stored as int16


def check_group_size(in_features: int, group_size: int) -> None:
    """Raises ValueError unless ``group_size`` divides ``in_features``."""
    if group_size <= 0 or in_features % group_size:
        raise ValueError(f"group size {group_size} does not divide the {in_features} input features")


def group(weight: Float[Array, "in out"], group_size: int) -> Float[Array, "groups size out"]:
    """Splits the input axis into groups.

    Raises:
        ValueError: if ``group_size`` does not divide ``in``.
    """
    check_group_size(weight.shape[0], group_size)
    return weight.reshape(-1, group_size, weight.shape[1])


def scale_and_zero(
    lo: Float[Array, "groups out"], hi: Float[Array, "groups out"]
) -> tuple[Float[Array, "groups out"], Float[Array, "groups out"]]:
    """The 2-bit step and the zero point (in 8-bit steps) of each group.

    A group far from zero and nearly constant would need a zero point beyond int16; its step is widened until the zero
    point fits, which still leaves a resolution of 1/32000 of its magnitude.

    Args:
        lo: lower limit of each group, in units of the weight.
        hi: upper limit.

    Returns:
        ``(scale, zero)``, float32: scale a bfloat16 value, zero an integer. Both are differentiable in the limits, both
        roundings straight-through.
    """
    magnitude = jnp.maximum(jnp.abs(lo), jnp.abs(hi))
    scale = jnp.maximum((hi - lo) / 4, jnp.maximum(magnitude * (FINE_STEPS / _MAX_ZERO), 1e-20))
    stored = jax.lax.reduce_precision(scale, exponent_bits=8, mantissa_bits=7)  # a bfloat16 value
    scale = scale + jax.lax.stop_gradient(stored - scale)
    zero = -FINE_STEPS * lo / scale
    return scale, zero + jax.lax.stop_gradient(jnp.round(zero) - zero)


def encode(
    weight: Float[Array, "in out"], scale: Float[Array, "groups out"], zero: Float[Array, "groups out"]
) -> UInt8[Array, "in out"]:
    """The 8-bit code ``Q = clip(floor(64 W / s) + z, 0, 255)`` of each weight."""
    grouped = group(weight, weight.shape[0] // scale.shape[0])
    codes = jnp.floor(FINE_STEPS * grouped / scale[:, None]) + zero[:, None]
    return jnp.clip(codes, 0, 255).astype(jnp.uint8).reshape(weight.shape)


def decode(
    codes: UInt8[Array, "in out"],
    scale: Float[Array, "groups out"],
    zero: Float[Array, "groups out"],
    width: int | Int[Array, ""],
) -> Float[Array, "in out"]:
    """Weights read at ``width`` bits (1 to 8, may be traced), each at the midpoint of its bin."""
    shift = jnp.asarray(CODE_BITS - width, jnp.int32)
    bin_size = jnp.left_shift(1, shift).astype(jnp.float32)
    kept = jnp.left_shift(jnp.right_shift(codes.astype(jnp.int32), shift), shift)
    grouped = group(kept + 0.5 * bin_size, codes.shape[0] // scale.shape[0])
    return (scale[:, None] / FINE_STEPS * (grouped - zero[:, None])).reshape(codes.shape)
