"""``sliced_matmul``: the public, validated entry; backends live beside it and must match ``reference``."""

import functools
import logging
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Int

from mobiquant_jax.ops.sliced_matmul import gpu, grouped, reference, tpu
from mobiquant_jax.ops.sliced_matmul.layout import TiledWeight, tile_weight, untile_weight
from mobiquant_jax.ops.sliced_matmul.stacked import StackedWeight, stack_weight
from mobiquant_jax.quant import SlicedWeight

Implementation = Literal["reference", "grouped", "gpu", "tpu"]
_XLA = {"reference": reference.sliced_matmul, "grouped": grouped.sliced_matmul}
_IMPLEMENTATIONS = (*_XLA, "gpu", "tpu")


def sliced_matmul(
    x: Float[Array, "*batch in"],
    weight: SlicedWeight | TiledWeight | StackedWeight,
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
        weight: one sliced kernel, or those of all layers stacked, or several linears in a layout of `serving_weight`.
        depth: slices each token reads, 1..E: ``[*batch]``, or ``[S, *batch]`` for each of S fused linears.
        layer: index into stacked layers, which the kernels read in place; a `TiledWeight` has one layer if None.
        implementation: ``"reference"`` (one matmul a depth), ``"grouped"`` (tokens sorted by depth), ``"gpu"`` (CUDA
            kernels on a `TiledWeight`) or ``"tpu"`` (Pallas, on a `SlicedWeight`). By default the platform's kernel
            where the weight is in its layout, else grouped where there are enough tokens to fill tiles and this is no
            GPU; what the kernels cannot do falls back with one notice.
        dtype: of the result.

    Returns:
        The outputs, those of fused linears side by side.

    Raises:
        ValueError: shapes that do not match, or an unknown implementation.
        NotImplementedError: ``implementation`` was named and cannot do this.
    """
    segments = 1 if isinstance(weight, SlicedWeight) else len(weight.segments)
    batch = x.shape[:-1]
    if x.shape[-1] != weight.in_features or depth.shape not in (batch, (segments, *batch)):
        raise ValueError(
            f"x {x.shape} and depth {depth.shape} do not fit a weight of {weight.in_features} input features"
            f" and {segments} segments"
        )
    if implementation is not None and implementation not in _IMPLEMENTATIONS:
        raise ValueError(f"implementation {implementation!r} is none of {sorted(_IMPLEMENTATIONS)}")
    if isinstance(weight, StackedWeight):
        each = jnp.broadcast_to(depth.reshape(-1, *batch), (segments, *batch))
        one = functools.partial(sliced_matmul, layer=layer, implementation=implementation, dtype=dtype)
        return jnp.concatenate([one(x, linear, d) for linear, d in zip(weight.linears, each, strict=True)], axis=-1)
    if layer is None and isinstance(weight, TiledWeight) and weight.layers == 1:
        layer = 0
    stacked = isinstance(weight, TiledWeight) or weight.scale.ndim == 3
    if stacked != (layer is not None):
        raise ValueError(f"layer {layer} does not fit {'stacked weights' if stacked else 'a single kernel'}")
    rows = x.reshape(-1, x.shape[-1])
    depths = jnp.broadcast_to(depth.astype(jnp.int32).reshape(-1, rows.shape[0]), (segments, rows.shape[0]))
    with jax.named_scope("sliced_matmul"):
        y = _platform_kernel(rows, weight, depths, layer, implementation, dtype)
        if y is None:
            y = _xla(rows, weight, depths, layer, implementation)
    return y.astype(dtype).reshape(*batch, -1)


def serving_weight(
    weights: Sequence[SlicedWeight], implementation: Implementation | None = None
) -> TiledWeight | StackedWeight:
    """Brings linears of one input into the layout that an implementation reads.

    Args:
        weights: kernels with a leading layer axis.
        implementation: as `sliced_matmul` will be called; by default the platform's.

    Raises:
        ValueError: shapes, slices or group sizes that have no such layout.
    """
    tiled = implementation == "gpu" or (implementation is None and jax.default_backend() == "gpu")
    return tile_weight(weights) if tiled else stack_weight(weights)


def _platform_kernel(
    rows: Float[Array, "N in"],
    weight: SlicedWeight | TiledWeight,
    depths: Int[Array, "S N"],
    layer: ArrayLike | None,
    implementation: Implementation | None,
    dtype: DTypeLike,
) -> Float[Array, "N out"] | None:
    """The GPU's or TPU's own kernel where asked for, or where this is its platform and layout; else None."""
    tiled = isinstance(weight, TiledWeight)
    wanted = implementation or {("gpu", True): "gpu", ("tpu", False): "tpu"}.get((jax.default_backend(), tiled))
    try:
        if wanted == "gpu":
            if not isinstance(weight, TiledWeight):
                raise NotImplementedError("the CUDA kernels read a TiledWeight: see tile_weight")
            return gpu.sliced_matmul(rows, weight, depths, jnp.asarray(layer), dtype)
        if wanted == "tpu":
            if isinstance(weight, TiledWeight) or jax.default_backend() != "tpu":
                raise NotImplementedError("the TPU kernel reads a SlicedWeight on a TPU")
            return tpu.sliced_matmul(rows, weight, depths[0], 0 if layer is None else layer)
    except NotImplementedError as reason:
        if implementation is not None:
            raise
        _notice(str(reason))
    return None


def _xla(
    rows: Float[Array, "N in"],
    weight: SlicedWeight | TiledWeight,
    depths: Int[Array, "S N"],
    layer: ArrayLike | None,
    implementation: Implementation | None,
) -> Float[Array, "N out"]:
    if implementation is None:
        # On a GPU the choice of a tile's kernel is a round trip to the host: every product at once is faster.
        sorts = rows.shape[0] >= 2 * grouped.TILE and jax.default_backend() != "gpu"
        implementation = "grouped" if sorts else "reference"
    if layer is not None:
        weight = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, layer), weight)
        stacks = untile_weight(weight) if isinstance(weight, TiledWeight) else (weight,)
        kernels = [jax.tree.map(lambda leaf: leaf[0], kernel) for kernel in stacks]
    else:
        assert isinstance(weight, SlicedWeight)
        kernels = [weight]
    outputs = [_XLA[implementation](rows, kernel, depth) for kernel, depth in zip(kernels, depths, strict=True)]
    return jnp.concatenate(outputs, axis=1)


@functools.cache
def _notice(reason: str) -> None:
    logging.getLogger(__name__).warning("sliced_matmul falls back to XLA: %s", reason)
