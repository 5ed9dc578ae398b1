"""The definition of the elastic matmul, in plain XLA: one dense matmul a depth, then a choice."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mobiquant_jax.quant import SlicedWeight


def sliced_matmul(x: Float[Array, "N in"], weight: SlicedWeight, depth: Int[Array, " N"]) -> Float[Array, "N out"]:
    """``y[n] = x[n] @ W_{depth[n]}``, accumulated in float32."""
    y = jnp.zeros((x.shape[0], weight.scale.shape[-1]), jnp.float32)
    for k in range(1, len(weight.planes) + 1):
        # Apart, or a GPU's XLA fuses unpacking into the product and times many such kernels: a model took 106 s to
        # compile, 6 s with the barrier (SmolLM2-135M, float32, one H200), and as long to run.
        kernel = jax.lax.optimization_barrier(weight.dequantize(k).astype(x.dtype))
        product = jnp.matmul(x, kernel, preferred_element_type=jnp.float32)
        y = jnp.where((depth == k)[:, None], product, y)
    return y
