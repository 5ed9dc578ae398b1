"""``sliced_matmul``: the public, validated entry; backends live beside it and must match ``reference``."""

import functools
import logging
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Int

from mobiquant_jax.ops.sliced_matmul import gpu, grouped, reference
from mobiquant_jax.ops.sliced_matmul.layout import TiledWeight, untile_weight
from mobiquant_jax.quant import SlicedWeight

Implementation = Literal["reference", "grouped", "gpu"]
_XLA = {"reference": reference.sliced_matmul, "grouped": grouped.sliced_matmul}
_IMPLEMENTATIONS = (*_XLA, "gpu")


def sliced_matmul(
    x: Float[Array, "*batch in"],
    weight: SlicedWeight | TiledWeight,
    depth: Int[Array, "*S_batch"],
    *,
    layer: ArrayLike | None = None,
    implementation: Implementation | None = None,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "*batch out"]:
    """Multiplies each token by the same weight, read at the token's own depth.

        y[t] = x[t] @ W_{depth[t]}

    Args:
        x: activations; their dtype is the dtype of the multiplication, which accumulates in float32.
        weight: one sliced kernel, or all layers' kernels in the serving layout.
        depth: slices each token reads, 1..E: ``[*batch]``, or ``[S, *batch]`` for each of S fused linears.
        layer: index into the layers of a `TiledWeight`, which is not copied; 0 if None.
        implementation: ``"reference"`` (one matmul a depth), ``"grouped"`` (tokens sorted by depth) or ``"gpu"`` (CUDA
            kernels on a `TiledWeight`). By default ``"gpu"`` for a `TiledWeight` on a GPU, else grouped where there
            are enough tokens to fill tiles; what the kernels cannot do falls back with one notice.
        dtype: of the result.

    Returns:
        The outputs, those of fused linears side by side.

    Raises:
        ValueError: shapes that do not match, or an unknown implementation.
        NotImplementedError: ``implementation`` was named and cannot do this.
    """
    segments = len(weight.segments) if isinstance(weight, TiledWeight) else 1
    batch = x.shape[:-1]
    if x.shape[-1] != weight.in_features or depth.shape not in (batch, (segments, *batch)):
        raise ValueError(
            f"x {x.shape} and depth {depth.shape} do not fit a weight of {weight.in_features} input features"
            f" and {segments} segments"
        )
    if implementation is not None and implementation not in _IMPLEMENTATIONS:
        raise ValueError(f"implementation {implementation!r} is none of {sorted(_IMPLEMENTATIONS)}")
    if layer is not None and not isinstance(weight, TiledWeight):
        raise ValueError(f"layer {layer} needs a weight in the serving layout")
    rows = x.reshape(-1, x.shape[-1])
    depths = jnp.broadcast_to(depth.astype(jnp.int32).reshape(-1, rows.shape[0]), (segments, rows.shape[0]))
    with jax.named_scope("sliced_matmul"):
        if isinstance(weight, TiledWeight):
            y = _tiled(rows, weight, depths, jnp.asarray(0 if layer is None else layer), implementation, dtype)
        elif implementation == "gpu":
            raise NotImplementedError("the CUDA kernels read a TiledWeight: see tile_weight")
        else:
            y = _xla(rows, weight, depths[0], implementation).astype(dtype)
    return y.reshape(*batch, -1)


def _tiled(
    rows: Float[Array, "N in"],
    weight: TiledWeight,
    depths: Int[Array, "S N"],
    layer: Int[Array, ""],
    implementation: Implementation | None,
    dtype: DTypeLike,
) -> Float[Array, "N out"]:
    if implementation == "gpu" or (implementation is None and jax.default_backend() == "gpu"):
        try:
            return gpu.sliced_matmul(rows, weight, depths, layer, dtype)
        except NotImplementedError as reason:
            if implementation == "gpu":
                raise
            _notice(str(reason))
    one = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, layer), weight)
    kernels = [jax.tree.map(lambda leaf: leaf[0], kernel) for kernel in untile_weight(one)]
    outputs = [_xla(rows, kernel, depth, implementation) for kernel, depth in zip(kernels, depths, strict=True)]
    return jnp.concatenate(outputs, axis=1).astype(dtype)


def _xla(
    rows: Float[Array, "N in"], weight: SlicedWeight, depth: Int[Array, " N"], implementation: Implementation | None
) -> Float[Array, "N out"]:
    if implementation is None:
        implementation = "grouped" if rows.shape[0] >= 2 * grouped.TILE else "reference"
    return _XLA[implementation](rows, weight, depth)


@functools.cache
def _notice(reason: str) -> None:
    logging.getLogger(__name__).warning("sliced_matmul falls back to XLA: %s", reason)
