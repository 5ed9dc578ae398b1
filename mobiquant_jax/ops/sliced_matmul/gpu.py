"""The elastic matmul on Hopper GPUs: two CUDA kernels behind XLA's FFI.

Up to 16 tokens are a decode step, bound by the bytes of the slices read (``cuda/decode.cuh``): codes stay exact and
activations become 16-bit integers within each group. More are a prefill on the tensor cores (``cuda/prefill.cuh``),
with weights rounded to bfloat16. Both take the stacked weights of all layers and the layer's index on the device: a
slice of the stack would be copied before a custom call.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from mobiquant_jax.ops import compiler
from mobiquant_jax.ops.sliced_matmul.layout import BLOCK_INPUTS, TILE_OUTPUTS, TILED_LAYOUT_VERSION, TiledWeight

DECODE_TOKENS = 16
SOURCE = Path(compiler.__file__).parent / "cuda" / "sliced_matmul.cu"
_HANDLERS = {"decode": "SlicedMatmulDecode", "prefill": "SlicedMatmulPrefill"}
_SHARED_BYTES = 96 * 1024  # of a thread block's shared memory for x; the rest holds weights on their way
_PROCESSORS = 132
_LEAST_TILE, _TILE_UNIT, _TILE_WIDTHS, MOST_SEGMENTS, _MOST_TOKENS = 64, 16, 16, 4, 65535  # of cuda/prefill_plan.cuh


def sliced_matmul(
    x: Float[Array, "N in"],
    weight: TiledWeight,
    depth: Int[Array, "S N"],
    layer: Int[Array, ""],
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "N out"]:
    """``y[n] = x[n] @ W_{depth[n]}`` of one layer, accumulated in float32; see ``reference``.

    Args:
        x: activations in bfloat16.
        weight: all layers' kernels in the serving layout.
        depth: slices each token reads of each segment.
        layer: which layer.
        dtype: of the result.

    Raises:
        NotImplementedError: another type of activations, no Hopper GPU, or no compiler.
    """
    check_supported(x, weight)
    targets = ffi_targets(groups_per_block(weight))
    operands = (x, depth.astype(jnp.int32), layer.astype(jnp.int32), weight.affine, *weight.planes)
    attributes = {
        "ends": np.cumsum(np.array(weight.segment_tiles, np.int64)),
        "version": np.int64(TILED_LAYOUT_VERSION),
    }
    tokens, outputs = x.shape[0], weight.planes[0].shape[1] * TILE_OUTPUTS
    if tokens <= DECODE_TOKENS:
        splits = decode_splits(tokens, *weight.planes[0].shape[1:3])
        out = jax.ShapeDtypeStruct((splits, tokens, outputs), jnp.float32)
        y = jax.ffi.ffi_call(targets["decode"], out)(*operands, **attributes)
        y = jnp.sum(y, axis=0).astype(dtype)
    else:
        exact = jnp.bfloat16 if jnp.dtype(dtype) == jnp.bfloat16 else jnp.float32
        out = jax.ShapeDtypeStruct((tokens, outputs), exact)
        plan = jax.ShapeDtypeStruct((plan_integers(tokens),), jnp.int32)
        padded = weight.planes[0].shape[2] * BLOCK_INPUTS
        packed = jax.ShapeDtypeStruct((len(weight.segments), packed_rows(tokens), padded), jnp.bfloat16)
        y, _, _ = jax.ffi.ffi_call(targets["prefill"], (out, plan, packed))(*operands, **attributes)
        y = y.astype(dtype)
    return _without_padding(y, weight)


def check_supported(x: Float[Array, "N in"], weight: TiledWeight) -> None:
    """Raises NotImplementedError, saying why, where the kernels cannot run."""
    check_device(weight)
    if x.dtype != jnp.bfloat16:
        raise NotImplementedError(f"the CUDA kernels multiply bfloat16, not {x.dtype}")
    if x.shape[0] > _MOST_TOKENS:
        raise NotImplementedError(f"the CUDA kernels sort up to {_MOST_TOKENS} tokens by depth, not {x.shape[0]}")


def check_device(weight: TiledWeight) -> None:
    """Raises NotImplementedError unless this is a Hopper GPU and the weight's linears are few enough."""
    compiler.check_hopper()
    if len(weight.segments) > MOST_SEGMENTS:
        raise NotImplementedError(f"the CUDA kernels fuse {MOST_SEGMENTS} linears, not {len(weight.segments)}")


def decode_splits(tokens: int, tiles: int, blocks: int) -> int:
    """Parts into which the inputs of a decode step are cut, each summed by its own thread blocks.

    Enough that x fits beside the weights in shared memory, and that a kernel of few outputs still fills the GPU.
    """
    fitting = -(-tokens * blocks * BLOCK_INPUTS * 2 // _SHARED_BYTES)
    filling = _PROCESSORS // max(tiles, 1)
    return max(1, min(max(fitting, filling), blocks // 8 or 1))


def plan_integers(tokens: int) -> int:
    """Size of the prefill kernel's table of token tiles: ``Plan::ints`` of cuda/prefill_plan.cuh."""
    return MOST_SEGMENTS * (4 * (tokens // _LEAST_TILE + 4) + _TILE_WIDTHS + 1 + tokens)


def packed_rows(tokens: int) -> int:
    """Rows of the prefill kernel's tokens in their order by depth: ``packed_rows`` of cuda/prefill_plan.cuh."""
    return (-(-tokens // _TILE_UNIT) + 3) * _TILE_UNIT


@functools.cache
def ffi_targets(groups: int) -> dict[str, str]:
    """Builds and loads the kernels for a group size, once a process.

    Args:
        groups: groups in a block of 128 inputs: 1, 2 or 4.

    Returns:
        The FFI targets ``decode`` and ``prefill``.

    Raises:
        NotImplementedError: no compiler, or it failed.
    """
    targets = {name: f"mobiquant_sliced_matmul_{name}_{groups}" for name in _HANDLERS}
    library = compiler.compile_library(SOURCE, (f"MOBIQUANT_GROUPS={groups}",))
    compiler.register(library, {targets[name]: symbol for name, symbol in _HANDLERS.items()})
    return targets


def groups_per_block(weight: TiledWeight) -> int:
    """Scales of an output in a block of inputs: the kernels are built for it."""
    return BLOCK_INPUTS // min(weight.group_size, BLOCK_INPUTS)


def _without_padding(y: Float[Array, "N padded"], weight: TiledWeight) -> Float[Array, "N out"]:
    if all(outputs % TILE_OUTPUTS == 0 for outputs in weight.segments):
        return y
    starts = np.cumsum([0, *weight.segment_tiles]) * TILE_OUTPUTS
    parts = [y[:, start : start + outputs] for start, outputs in zip(starts, weight.segments, strict=False)]
    return jnp.concatenate(parts, axis=1)
