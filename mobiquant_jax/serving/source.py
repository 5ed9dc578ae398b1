"""What a site reads: the sites of a block hand their results on as they come, and the next one finishes them.

A decode kernel can then sum the parts of a product, add the residual stream and normalize in the program that routes.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from mobiquant_jax.models.layers import rms_norm, swiglu


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Plain:
    """An input as it is.

    Attributes:
        x: the input.
    """

    x: Float[Array, "B T D"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Normed:
    """The residual stream after an update, normalized.

    Attributes:
        x: the residual stream before.
        update: what the site before computed, to be summed over its first axis and added.
        gain: of the norm, all layers.
        eps: of the norm.
    """

    x: Float[Array, "B T D"]
    update: Float[Array, "P B T D"]
    gain: Float[Array, "L D"]
    eps: float = field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Gated:
    """The gated activation of what the site before computed.

    Attributes:
        halves: gate and up projections side by side, to be summed over the first axis.
    """

    halves: Float[Array, "P B T 2*F"]


Source = Plain | Normed | Gated


def read_source(
    source: Source, layer: Int[Array, ""], dtype: DTypeLike
) -> tuple[Float[Array, "B T in"], Float[Array, "B T D"] | None]:
    """Makes the input.

    Args:
        source: what it is made of.
        layer: which layer.
        dtype: of the input; sums are rounded to it.

    Returns:
        The input and, of a `Normed` source, the residual stream after the update.
    """
    if isinstance(source, Plain):
        return source.x.astype(dtype), None
    if isinstance(source, Normed):
        residual = source.x + sum_parts(source.update, dtype)
        return rms_norm(residual, source.gain[layer], source.eps), residual
    gate, up = jnp.split(sum_parts(source.halves, dtype), 2, axis=-1)
    return swiglu(gate, up), None


def sum_parts(parts: Float[Array, " P *batch"], dtype: DTypeLike) -> Float[Array, " *batch"]:
    """The sum over the first axis, taken in float32."""
    return jnp.sum(parts, axis=0, dtype=jnp.float32).astype(dtype)
