"""A decode step's routing and product in one go on Hopper GPUs: ``cuda/route.cuh`` and ``cuda/decode.cuh`` behind it.

Apart, a step's routers take longer than its products: a dozen small programs each. Here the router's kernel also makes
the input, and the product's kernel, launched before that one has ended, already fetches the first slice, which every
token reads.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mobiquant_jax.ops.sliced_matmul import gpu
from mobiquant_jax.ops.sliced_matmul.layout import TILE_OUTPUTS, TILED_LAYOUT_VERSION, TiledWeight
from mobiquant_jax.routing import FusedRouter

_WIDTHS = (8, 16, 32, 64)  # hidden units of a router
_RANKS, _WARPS = 16, 8  # of cuda/route.cuh
_SHARED_BYTES = 227 * 1024
_SOURCES = {"plain": 0, "normed": 1, "gated": 2}


class RoutedProduct(NamedTuple):
    """What `routed_matmul` returns.

    Attributes:
        parts: the product, as a sum still to be taken over the first axis.
        residual: where the source is ``"normed"``, the residual stream with the update.
        depths: slices each token read of each linear.
    """

    parts: Float[Array, "P N out"]
    residual: Float[Array, "N D"] | None
    depths: Int[Array, "S N"]


def routed_matmul(
    source: str,
    weight: TiledWeight,
    router: FusedRouter,
    thresholds: Float[Array, "L S N"],
    layer: Int[Array, ""],
    *,
    x: Float[Array, "N D"] | None = None,
    update: Float[Array, "P N in"] | None = None,
    gain: Float[Array, "L D"] | None = None,
    eps: float = 0.0,
) -> RoutedProduct:
    """Makes the input of up to 16 tokens, routes them and multiplies.

    Args:
        source: the input is ``"plain"``: x; ``"normed"``: ``rms_norm(x + sum(update)) * gain``; ``"gated"``:
            ``silu(gate) * up``, the halves of ``sum(update)``.
        weight: all layers' kernels of the linears.
        router: all layers' routers of the linears.
        thresholds: each token's.
        layer: which layer.
        x: bfloat16.
        update: float32, summed over its first axis.
        gain: of the norm.
        eps: of the norm.

    Raises:
        NotImplementedError: see `check_supported`.
    """
    tokens = thresholds.shape[-1]
    check_supported(tokens, weight, router)
    targets = gpu.ffi_targets(gpu.groups_per_block(weight))
    _, tiles, blocks = weight.planes[0].shape[:3]
    inputs, splits = weight.in_features, gpu.decode_splits(tokens, tiles, blocks)
    nothing = jnp.zeros(0, jnp.float32)
    results = (
        jax.ShapeDtypeStruct((tokens, inputs) if source == "normed" else (0,), jnp.bfloat16),
        jax.ShapeDtypeStruct((0,) if source == "plain" else (tokens, inputs), jnp.bfloat16),
        jax.ShapeDtypeStruct((len(weight.segments), tokens), jnp.int32),
        jax.ShapeDtypeStruct((splits, tokens, tiles * TILE_OUTPUTS), jnp.float32),
    )
    residual, _, depths, parts = jax.ffi.ffi_call(targets["routed"], results)(
        nothing.astype(jnp.bfloat16) if x is None else x,
        nothing if update is None else update,
        nothing if gain is None else gain,
        router.hidden,
        router.magnitude,
        router.hidden_bias,
        router.output,
        router.output_bias,
        thresholds,
        jnp.asarray(layer, jnp.int32),
        weight.affine,
        *weight.planes,
        source=np.int64(_SOURCES[source]),
        eps=np.float32(eps),
        ends=np.cumsum(np.array(weight.segment_tiles, np.int64)),
        version=np.int64(TILED_LAYOUT_VERSION),
    )
    return RoutedProduct(gpu.without_padding(parts, weight), residual if source == "normed" else None, depths)


def check_supported(tokens: int, weight: TiledWeight, router: FusedRouter) -> None:
    """Raises NotImplementedError, saying why, where the kernels cannot run."""
    gpu.check_device(weight)
    width, inputs = router.magnitude.shape[-1], weight.in_features
    if tokens > gpu.DECODE_TOKENS:
        raise NotImplementedError(f"the routed CUDA kernel takes {gpu.DECODE_TOKENS} tokens, not {tokens}")
    if router.hidden.dtype != jnp.bfloat16:
        raise NotImplementedError(f"the routed CUDA kernel multiplies bfloat16, not {router.hidden.dtype}")
    if width not in _WIDTHS or inputs % 8:
        raise NotImplementedError(f"the routed CUDA kernel takes routers of {_WIDTHS} units, not {width} of {inputs}")
    if _shared_bytes(tokens, inputs, width) > _SHARED_BYTES:
        raise NotImplementedError(f"{tokens} tokens of {inputs} inputs exceed a thread block's shared memory")
    gpu.ffi_targets(gpu.groups_per_block(weight))


def _shared_bytes(tokens: int, inputs: int, width: int) -> int:
    """``RouteShape::total`` of cuda/route.cuh."""
    share = -(-inputs // (8 * _RANKS)) * 8
    return tokens * (4 * share + 4 * (_WARPS + _RANKS) * width + 8 * _RANKS)
