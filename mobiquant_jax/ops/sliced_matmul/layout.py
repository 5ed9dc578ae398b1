"""The serving layout: sliced kernels in the order in which the GPU kernels read them.

Checkpoints keep the portable `SlicedWeight`; `tile_weight` repacks it once on the device and `untile_weight` is its
exact inverse. Outputs are cut into tiles of 16 and inputs into blocks of 128. One slice of one (tile, block) is 512
contiguous bytes, 16 for each of a warp's 32 lanes. Word ``c`` of a lane holds the codes of

    output  lane // 4 + 8 * (c % 2)
    inputs  32 * i + 16 * s + 8 * (c // 2) + 2 * (lane % 4) + p        for i = 0..3, s = 0..1, p = 0..1

at bit ``2 * i`` of byte ``2 * s + p``. Masked, a word is a register of the A operand of ``mma.m16n8k32``, four inputs
as bytes; two of the bytes are a register of ``mma.m16n8k16``. Depth ``k`` reads ``k`` planes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt8, UInt32

from mobiquant_jax.quant import SlicedWeight, pack, unpack

TILED_LAYOUT_VERSION = 1  # the kernels are built for one layout and refuse another
TILE_OUTPUTS = 16
BLOCK_INPUTS = 128
TILED_SLICE_BITS = (2, 2, 2, 2)
_ZERO_BIAS = 32768  # zero points are stored as unsigned 16-bit numbers


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TiledWeight:
    """The same linear of every layer, or several that share their input, in the serving layout.

    Invariants:
        * ``planes[e]`` holds slice ``e`` alone.
        * Each segment (one fused linear) starts at a tile; its outputs are padded to whole tiles and the inputs to
          whole blocks, with code, scale and zero point 0.
        * A word of ``affine`` holds a bfloat16 scale in its low half and the zero point plus 32768 in its high half.

    Attributes:
        planes: one uint32 array ``[L, tiles, blocks, 32, 4]`` a slice, most significant first.
        affine: ``[L, tiles, groups, 8, 2]``: of outputs ``r`` and ``r + 8`` of the tile.
        in_features: length of the input axis.
        group_size: inputs that share one scale and zero point.
        segments: outputs of each fused linear.
    """

    planes: tuple[UInt32[Array, "L tiles blocks 32 4"], ...]
    affine: UInt32[Array, "L tiles groups 8 2"]
    in_features: int = field(metadata={"static": True})
    group_size: int = field(metadata={"static": True})
    segments: tuple[int, ...] = field(metadata={"static": True})

    @property
    def layers(self) -> int:
        """Number of stacked layers."""
        return self.affine.shape[0]

    @property
    def segment_tiles(self) -> tuple[int, ...]:
        """Tiles of each segment."""
        return tuple(-(-outputs // TILE_OUTPUTS) for outputs in self.segments)

    def bytes_read(self, depth: int) -> int:
        """Bytes of one layer that a pass at ``depth`` reads: that many planes, the scales and the zero points.

        Raises:
            ValueError: if ``depth`` is not in 1..number of slices.
        """
        if not 1 <= depth <= len(self.planes):
            raise ValueError(f"depth {depth} is outside 1..{len(self.planes)}")
        return sum(a.size * a.dtype.itemsize for a in (*self.planes[:depth], self.affine)) // self.layers


def tile_weight(weights: Sequence[SlicedWeight]) -> TiledWeight:
    """Fuses linears of one input and repacks all their layers.

    Args:
        weights: kernels with a leading layer axis, ``planes[e] [L, words, out]``; all of one input and group size.

    Returns:
        The same codes, scales and zero points in the serving layout.

    Raises:
        ValueError: shapes, slices or group sizes that cannot be fused or tiled.
    """
    first = weights[0]
    group_size = check_tileable(weights)
    repacked = [jax.lax.map(_tile_layer, weight) for weight in weights]  # one layer at a time bounds the memory
    return TiledWeight(
        planes=tuple(jnp.concatenate(planes, axis=1) for planes in zip(*(r[0] for r in repacked), strict=True)),
        affine=jnp.concatenate([r[1] for r in repacked], axis=1),
        in_features=first.in_features,
        group_size=group_size,
        segments=tuple(weight.scale.shape[-1] for weight in weights),
    )


def check_tileable(weights: Sequence[SlicedWeight]) -> int:
    """Returns the group size of stacked weights; raises ValueError unless they can be fused and tiled."""
    check_fusable(weights)
    for weight in weights:
        check_tileable_group(weight.group_size)
    return weights[0].group_size


def check_fusable(weights: Sequence[SlicedWeight]) -> None:
    """Raises ValueError unless these are stacks of layers, of one input and cut into the slices that are served."""
    first = weights[0]
    for weight in weights:
        check_served_slices(weight.slice_bits)
        if weight.scale.ndim != 3:
            raise ValueError(f"scales {weight.scale.shape} must be [layers, groups, out]")
        if weight.scale.shape[:2] != first.scale.shape[:2] or weight.in_features != first.in_features:
            raise ValueError(
                f"kernels of {first.in_features} and {weight.in_features} inputs, scales {first.scale.shape} and "
                f"{weight.scale.shape}, cannot be fused"
            )


def check_served_slices(slice_bits: tuple[int, ...]) -> None:
    """Raises ValueError unless a code cut so has a serving layout."""
    if slice_bits != TILED_SLICE_BITS:
        raise ValueError(f"slice bits {slice_bits} have no serving layout, only {TILED_SLICE_BITS}")


def check_tileable_group(group_size: int) -> None:
    """Raises ValueError unless groups of this size have a serving layout."""
    if group_size not in (32, 64) and group_size % BLOCK_INPUTS:
        raise ValueError(f"group size {group_size} has no serving layout: 32, 64 or a multiple of {BLOCK_INPUTS}")


def _tile_layer(weight: SlicedWeight) -> tuple[tuple[Array, ...], Array]:
    planes = tuple(_tile_codes(unpack(plane, 2, weight.in_features)) for plane in weight.planes)
    repeats = max(1, weight.group_size // BLOCK_INPUTS)  # a larger group is stored once a block
    blocks = -(-weight.in_features // BLOCK_INPUTS)
    groups = blocks * BLOCK_INPUTS // min(weight.group_size, BLOCK_INPUTS)
    scale = jax.lax.bitcast_convert_type(weight.scale, jnp.uint16).astype(jnp.uint32)
    zero = (weight.zero.astype(jnp.int32) + _ZERO_BIAS).astype(jnp.uint32)
    words = jnp.repeat(scale | zero << 16, repeats, axis=0)  # [groups, out]
    padding = ((0, groups - words.shape[0]), (0, -words.shape[1] % TILE_OUTPUTS))
    words = jnp.pad(words, padding, constant_values=jnp.uint32(_ZERO_BIAS << 16))
    affine = words.reshape(groups, -1, 2, 8).transpose(1, 0, 3, 2)  # [tiles, groups, 8, 2]
    return planes, affine


def _tile_codes(codes: UInt8[Array, "in out"]) -> UInt32[Array, "tiles blocks 32 4"]:
    codes = jnp.pad(codes, ((0, -codes.shape[0] % BLOCK_INPUTS), (0, -codes.shape[1] % TILE_OUTPUTS)))
    blocks, tiles = codes.shape[0] // BLOCK_INPUTS, codes.shape[1] // TILE_OUTPUTS
    # inputs: block, i, s, half, quad, p; outputs: tile, half, row
    split = codes.reshape(blocks, 4, 2, 2, 4, 2, tiles, 2, 8)
    fields = split.transpose(2, 5, 1, 6, 0, 8, 4, 3, 7)  # s, p, i, tile, block, row, quad, input half, output half
    words = pack(fields.reshape(16, -1), 2)
    return words.reshape(tiles, blocks, 32, 4)


def untile_weight(tiled: TiledWeight) -> tuple[SlicedWeight, ...]:
    """Undoes `tile_weight`."""
    ends = [sum(tiled.segment_tiles[: i + 1]) for i in range(len(tiled.segments))]
    weights = []
    for outputs, count, end in zip(tiled.segments, tiled.segment_tiles, ends, strict=True):
        tiles = slice(end - count, end)
        untile = jax.vmap(lambda planes, affine, outputs=outputs: _untile_layer(tiled, planes, affine, outputs))
        weights.append(untile(tuple(plane[:, tiles] for plane in tiled.planes), tiled.affine[:, tiles]))
    return tuple(weights)


def _untile_layer(tiled: TiledWeight, planes: tuple[Array, ...], affine: Array, outputs: int) -> SlicedWeight:
    words = affine.transpose(1, 0, 3, 2).reshape(affine.shape[1], -1)  # [groups, out]
    words = words[:: max(1, tiled.group_size // BLOCK_INPUTS), :outputs][: tiled.in_features // tiled.group_size]
    return SlicedWeight(
        planes=tuple(pack(_untile_codes(plane)[: tiled.in_features, :outputs], 2) for plane in planes),
        scale=jax.lax.bitcast_convert_type((words & 0xFFFF).astype(jnp.uint16), jnp.bfloat16),
        zero=((words >> 16).astype(jnp.int32) - _ZERO_BIAS).astype(jnp.int16),
        in_features=tiled.in_features,
        slice_bits=TILED_SLICE_BITS,
    )


def _untile_codes(words: UInt32[Array, "tiles blocks 32 4"]) -> UInt8[Array, "in out"]:
    tiles, blocks = words.shape[:2]
    fields = unpack(words.reshape(1, -1), 2, 16).reshape(2, 2, 4, tiles, blocks, 8, 4, 2, 2)
    return fields.transpose(4, 2, 0, 7, 6, 1, 3, 8, 5).reshape(blocks * BLOCK_INPUTS, tiles * TILE_OUTPUTS)
