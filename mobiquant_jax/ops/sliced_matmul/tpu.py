"""The elastic matmul on TPUs: one Pallas kernel for decoding and prefill, on the checkpoint's own layout.

A word holds 16 consecutive inputs of one output, so shift ``i`` of a block of words is a matrix of every sixteenth
input. The tokens are brought into that order beforehand, ``x[i::16]``, which costs nothing beside unpacking weights
across lanes. Slice by slice,

    y[t] = sum_{e <= d(t)} x[t] @ R_e        R_1 = s (q_1 + 1/2 - z/64)        R_e = s (q_e - 3/2) / 4^(e-1)

A tile of tokens reads, and multiplies, as many planes as its deepest token; the others' block index does not move, so
that nothing of them is copied. Tokens sorted by depth make tiles of one depth.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from mobiquant_jax.quant import SlicedWeight
from mobiquant_jax.quant.slices import WORD_BITS

CODES = 16  # of two bits in a word
_TILE_TOKENS = 256
_BLOCK_INPUTS, _BLOCK_OUTPUTS = 2048, 512  # 128 words, a register's lanes, once x is in the words' order
_SLICE_BITS = (2, 2, 2, 2)


def sliced_matmul(
    x: Float[Array, "N in"],
    weight: SlicedWeight,
    depth: Int[Array, " N"],
    layer: ArrayLike = 0,
    *,
    interpret: bool = False,
) -> Float[Array, "N out"]:
    """``y[n] = x[n] @ W_{depth[n]}``, accumulated in float32; see ``reference``.

    Args:
        x: activations in bfloat16.
        weight: one kernel, or those of all layers stacked, which are not copied.
        depth: slices each token reads, 1..4.
        layer: which layer of a stack.
        interpret: run on any backend, slowly.

    Raises:
        NotImplementedError: another type of activations, or shapes or slices that the kernel has no blocks for.
    """
    if x.dtype != jnp.bfloat16:
        raise NotImplementedError(f"the TPU kernel multiplies bfloat16, not {x.dtype}")
    if weight.scale.ndim == 2:
        weight = jax.tree.map(lambda leaf: leaf[None], weight)
    check_supported(weight)
    tokens, inputs, outputs = x.shape[0], weight.in_features, weight.scale.shape[-1]
    tile = min(_TILE_TOKENS, -(-tokens // 16) * 16)
    tiles = -(-tokens // tile)
    order = jnp.argsort(depth, descending=True)
    padding = (0, tiles * tile - tokens)
    rows = jnp.pad(x[order], (padding, (0, 0)))
    depths = jnp.pad(depth[order].astype(jnp.int32), padding, constant_values=1)
    deepest = jnp.max(depths.reshape(tiles, tile), axis=1)
    strided = rows.reshape(tiles * tile, inputs // CODES, CODES).transpose(2, 0, 1)  # [16, N, words]
    y = _call(tile, interpret, jnp.asarray(layer, jnp.int32).reshape(1), deepest, strided, depths[:, None], weight)
    return jnp.zeros((tokens, outputs), jnp.float32).at[order].set(y[:tokens])


def check_supported(weight: SlicedWeight) -> None:
    """Raises NotImplementedError, saying why, where the kernel cannot run."""
    inputs, outputs, groups = weight.in_features, weight.scale.shape[-1], weight.scale.shape[-2]
    if weight.slice_bits != _SLICE_BITS:
        raise NotImplementedError(f"the TPU kernel reads slices of {_SLICE_BITS} bits, not {weight.slice_bits}")
    if inputs % _BLOCK_INPUTS or outputs % 128:
        raise NotImplementedError(
            f"the TPU kernel needs inputs in multiples of {_BLOCK_INPUTS} and outputs in multiples of 128, "
            f"not {inputs} and {outputs}"
        )
    if inputs // groups % 128 or _BLOCK_INPUTS % (inputs // groups):
        raise NotImplementedError(
            f"the TPU kernel needs groups of 128 inputs, or a multiple that divides {_BLOCK_INPUTS}, not "
            f"{inputs // groups}"
        )


def _call(
    tile: int,
    interpret: bool,
    layer: Int[Array, "1"],
    deepest: Int[Array, " tiles"],
    x: Float[Array, "codes N words"],
    depth: Int[Array, "N 1"],
    weight: SlicedWeight,
) -> Float[Array, "N out"]:
    tokens, inputs, outputs = x.shape[1], weight.in_features, weight.scale.shape[-1]
    block = next(size for size in (_BLOCK_OUTPUTS, 256, 128) if outputs % size == 0)
    words = _BLOCK_INPUTS // CODES
    groups = weight.scale.shape[-2] * _BLOCK_INPUTS // inputs
    grid = (tokens // tile, outputs // block, inputs // _BLOCK_INPUTS)

    def plane_block(e: int) -> pl.BlockSpec:
        def index(t, n, k, layer, deepest):
            read = deepest[t] > e
            return layer[0], jnp.where(read, k, 0), jnp.where(read, n, 0)

        return pl.BlockSpec((None, words, block), index)

    affine = pl.BlockSpec((None, groups, block), lambda t, n, k, layer, deepest: (layer[0], k, n))
    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=grid,
        in_specs=[
            pl.BlockSpec((CODES, tile, words), lambda t, n, k, *_: (0, t, k)),
            pl.BlockSpec((tile, 1), lambda t, n, k, *_: (t, 0)),
            affine,
            affine,
            *(plane_block(e) for e in range(len(_SLICE_BITS))),
        ],
        out_specs=pl.BlockSpec((tile, block), lambda t, n, k, *_: (t, n)),
    )
    kernel = pl.pallas_call(
        partial(_kernel, groups=groups),
        grid_spec=spec,
        out_shape=jax.ShapeDtypeStruct((tokens, outputs), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="sliced_matmul",
    )
    return kernel(layer, deepest, x, depth, weight.scale, weight.zero, *weight.planes)


def _kernel(layer: Any, deepest: Any, x: Any, depth: Any, scale: Any, zero: Any, *refs: Any, groups: int) -> None:
    del layer
    *planes, out = refs
    words, block = planes[0].shape

    @pl.when(pl.program_id(2) == 0)
    def _():
        out[...] = jnp.zeros_like(out)

    def per_word(of_group: Float[Array, "groups block"]) -> Float[Array, "words block"]:
        return jnp.broadcast_to(of_group[:, None], (groups, words // groups, block)).reshape(words, block)

    for e, plane in enumerate(planes):

        @pl.when(deepest[pl.program_id(0)] > e)
        def _(e=e, plane=plane):
            s = scale[...].astype(jnp.float32) * 0.25**e
            first = 0.5 - zero[...].astype(jnp.float32) / 64
            slope, start = per_word(s), per_word(s * (first if e == 0 else -1.5))
            packed = pltpu.bitcast(plane[...], jnp.int32)
            product = jnp.zeros(out.shape, jnp.float32)
            for i in range(CODES):
                codes = (packed >> (WORD_BITS // CODES * i)) & 3
                part = (codes.astype(jnp.float32) * slope + start).astype(jnp.bfloat16)
                product += jnp.dot(x[i], part, preferred_element_type=jnp.float32)
            out[...] += jnp.where(depth[...] > e, product, 0.0)
