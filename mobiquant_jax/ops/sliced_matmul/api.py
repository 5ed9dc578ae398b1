"""``sliced_matmul``: the public, validated entry; backends live beside it and must match ``reference``."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mobiquant_jax.ops.sliced_matmul import grouped, reference
from mobiquant_jax.quant import SlicedWeight

Implementation = Literal["reference", "grouped"]
_BACKENDS = {"reference": reference.sliced_matmul, "grouped": grouped.sliced_matmul}


def sliced_matmul(
    x: Float[Array, "*batch in"],
    weight: SlicedWeight,
    depth: Int[Array, "*batch"],
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "*batch out"]:
    """Multiplies each token by the same weight, read at the token's own depth.

        y[t] = x[t] @ W_{depth[t]}

    Args:
        x: activations; their dtype is the dtype of the multiplication.
        weight: the sliced kernel.
        depth: slices each token reads, 1..E.
        implementation: ``"reference"`` (one matmul a depth) or ``"grouped"`` (tokens sorted by depth); by default
            grouped where there are enough tokens to fill tiles.

    Returns:
        Float32 outputs.

    Raises:
        ValueError: shapes that do not match, or an unknown implementation.
    """
    if x.shape[-1] != weight.in_features or depth.shape != x.shape[:-1]:
        raise ValueError(
            f"x {x.shape} and depth {depth.shape} do not fit a weight of {weight.in_features} input features"
        )
    rows = x.reshape(-1, x.shape[-1])
    if implementation is None:
        implementation = "grouped" if rows.shape[0] >= 2 * grouped.TILE else "reference"
    if implementation not in _BACKENDS:
        raise ValueError(f"implementation {implementation!r} is none of {sorted(_BACKENDS)}")
    with jax.named_scope("sliced_matmul"):
        y = _BACKENDS[implementation](rows, weight, depth.ravel().astype(jnp.int32))
    return y.reshape(*x.shape[:-1], -1)
