"""Straight-through fake quantization on the nested grid, for training through the codes.

The forward value equals ``decode(encode(W))`` at the width; the backward pass treats floor as the identity, so inside
the range dW_r/dW = 1, the scale receives the quantization error and the clipped tails move the limits.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mobiquant_jax.quant.clipping import Clipping, limits
from mobiquant_jax.quant.grid import CODE_BITS, FINE_STEPS, group, scale_and_zero


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
    grouped = group(weight, weight.shape[0] // scale.shape[0])
    # Clipping just below 256 keeps the gradient of every weight inside the last bin.
    position = jnp.clip(FINE_STEPS * grouped / scale[:, None] + zero[:, None], 0.0, 255.996)
    bin_size = jnp.exp2(jnp.asarray(CODE_BITS - width, jnp.float32))
    midpoint = (jnp.floor(position / bin_size) + 0.5) * bin_size
    position = position + jax.lax.stop_gradient(midpoint - position)
    return (scale[:, None] / FINE_STEPS * (position - zero[:, None])).reshape(weight.shape)
