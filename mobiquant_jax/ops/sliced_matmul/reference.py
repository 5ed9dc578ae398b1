"""The definition of the elastic matmul, in plain XLA: one dense matmul a depth, then a choice."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mobiquant_jax.quant import SlicedWeight


def sliced_matmul(x: Float[Array, "N in"], weight: SlicedWeight, depth: Int[Array, " N"]) -> Float[Array, "N out"]:
    """``y[n] = x[n] @ W_{depth[n]}``, accumulated in float32."""
    y = jnp.zeros((x.shape[0], weight.scale.shape[-1]), jnp.float32)
    for k in range(1, len(weight.planes) + 1):
        kernel = weight.dequantize(k).astype(x.dtype)
        product = jnp.matmul(x, kernel, preferred_element_type=jnp.float32)
        y = jnp.where((depth == k)[:, None], product, y)
    return y
