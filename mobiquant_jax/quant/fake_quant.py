"""Straight-through fake quantization on the nested grid, for training through the codes.

The forward value equals ``decode(encode(W))`` at the width; the backward pass treats floor as the identity, so inside
the range dW_r/dW = 1, the scale receives the quantization error and the clipped tails move the limits.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mobiquant_jax.quant.clipping import Clipping, limits
from mobiquant_jax.quant.grid import CODE_BITS, FINE_STEPS, group, scale_and_zero

LAST_POSITION = 255.996
"""The end of the grid, just below 256: a weight there is inside the last bin and keeps its gradient."""


# A model's linears share a trace of each shape. Inlined: a call that is differentiated keeps more for the way back.
@partial(jax.jit, inline=True)
def fake_quantize(
    weight: Float[Array, "in out"], clipping: Clipping, width: int | Int[Array, ""]
) -> Float[Array, "in out"]:
    """The weight as it will be read at ``width`` bits, with straight-through gradients.

    Args:
        weight: the float kernel.
        clipping: its clipping logits; their shape sets the group size.
        width: bits to read, 1 to 8; may be traced, so one compilation serves every width.

    Returns:
        Float32 ``[in, out]``; the gradient flows to the weight and to both logits.
    """
    scale, zero = scale_and_zero(*limits(weight, clipping))
    return read_position(grid_position(weight, scale, zero), scale, zero, width)


def grid_position(
    weight: Float[Array, "in out"], scale: Float[Array, "groups out"], zero: Float[Array, "groups out"]
) -> Float[Array, "in out"]:
    """Where a weight lies on its group's grid: ``64 W / s + z``, clipped to 0 .. `LAST_POSITION`."""
    grouped = group(weight, weight.shape[0] // scale.shape[0])
    position = FINE_STEPS * grouped / scale[:, None] + zero[:, None]
    return jnp.clip(position, 0.0, LAST_POSITION).reshape(weight.shape)


def read_position(
    position: Float[Array, "in out"],
    scale: Float[Array, "groups out"],
    zero: Float[Array, "groups out"],
    width: int | Int[Array, ""],
) -> Float[Array, "in out"]:
    """The weight that a position on the grid is read as, with straight-through gradients.

    Args:
        position: ``64 W / s + z``, from 0 to `LAST_POSITION`; its floor is the 8-bit code.
        scale: of each group.
        zero: of each group.
        width: bits to read, 1 to 8; may be traced.
    """
    bin_size = jnp.exp2(jnp.asarray(CODE_BITS - width, jnp.float32))
    midpoint = (jnp.floor(position / bin_size) + 0.5) * bin_size
    return weight_at(position + jax.lax.stop_gradient(midpoint - position), scale, zero)


def weight_at(
    position: Float[Array, "in out"], scale: Float[Array, "groups out"], zero: Float[Array, "groups out"]
) -> Float[Array, "in out"]:
    """The weight that lies at a position on its group's grid, ``s (p - z) / 64``: undoes `grid_position`."""
    grouped = group(position, position.shape[0] // scale.shape[0])
    return (scale[:, None] / FINE_STEPS * (grouped - zero[:, None])).reshape(position.shape)
