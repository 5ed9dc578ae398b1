"""The small pieces of a block: linear maps, RMSNorm, the SwiGLU gate."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def project(
    x: Float[Array, "*batch in"], kernel: Float[Array, "in out"], dtype: DTypeLike = jnp.float32
) -> Float[Array, "*batch out"]:
    """Multiply by a kernel, accumulating in float32 on each device.

    Args:
        x: Inputs; their dtype is the dtype of the multiplication.
        kernel: Weights in Flax layout.
        dtype: Of the result, and so of the gradient that the backward pass multiplies: a float32 one would make its
            products float32. What devices sum, where a mesh splits the contracted axis, is rounded to it too.

    Returns:
        ``x @ kernel``.
    """
    return jnp.einsum("...i,io->...o", x, kernel.astype(x.dtype), preferred_element_type=dtype)


def rms_norm(x: Float[Array, "*batch D"], scale: Float[Array, " D"], eps: float) -> Float[Array, "*batch D"]:
    """Root-mean-square normalization, ``x / sqrt(mean(x^2) + eps) * scale``, in float32.

    Args:
        x: Activations.
        scale: Gain per channel.
        eps: Added to the mean square.

    Returns:
        The normalized activations in the dtype of ``x``.

    Source: Zhang and Sennrich, arXiv 1910.07467.
    """
    with jax.named_scope("rms_norm"):
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
        return (wide * jax.lax.rsqrt(mean_square + eps) * scale.astype(jnp.float32)).astype(x.dtype)


def swiglu(gate: Float[Array, "*batch F"], up: Float[Array, "*batch F"]) -> Float[Array, "*batch F"]:
    """The gated activation ``silu(gate) * up``, in float32.

    Args:
        gate: Output of the gate projection.
        up: Output of the up projection.

    Returns:
        The product in the dtype of ``up``.

    Source: Shazeer, arXiv 2002.05202.
    """
    return (jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(up.dtype)


class DenseLinear(nn.Module):
    """A full-precision linear map without bias; the interface that every linear of a `Block` has.

    Attributes:
        features: Number of outputs.
        dtype: Type of the multiplication and of the result.
    """

    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B T in"], control: Any = None) -> Float[Array, "B T out"]:
        """Apply the map.

        Args:
            x: Activations.
            control: The runtime's routing policy, unused by a dense map.

        Returns:
            ``x @ kernel``.
        """
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features), jnp.float32)
        return project(x.astype(self.dtype), kernel, self.dtype)


class RMSNorm(nn.Module):
    """`rms_norm` with its learned gain.

    Attributes:
        eps: Added to the mean square.
    """

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Normalize the last axis.

        Args:
            x: Activations.

        Returns:
            The normalized activations.
        """
        return rms_norm(x, self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32), self.eps)
