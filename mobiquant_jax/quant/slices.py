"""``SlicedWeight``: one linear kernel stored once, as bit planes that are read from the top down."""

from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Int16, UInt8, UInt32

from mobiquant_jax.quant.clipping import unclipped_limits
from mobiquant_jax.quant.grid import CODE_BITS, decode, encode, scale_and_zero

LAYOUT_VERSION = 1  # planes of little-endian codes along `in`; written into every checkpoint
WORD_BITS = 32


def check_slice_bits(slice_bits: tuple[int, ...]) -> None:
    """Raises ValueError unless the slices cut the 8-bit code into parts of 1, 2, 4 or 8 bits."""
    if any(bits not in (1, 2, 4, 8) for bits in slice_bits) or sum(slice_bits) != CODE_BITS:
        raise ValueError(f"slice bits {tuple(slice_bits)} must be 1, 2, 4 or 8 each and add up to {CODE_BITS}")


def widths(slice_bits: tuple[int, ...]) -> tuple[int, ...]:
    """Bits read at depth 1, 2, ...: ``(2, 4, 6, 8)`` for ``(2, 2, 2, 2)``."""
    return tuple(accumulate(slice_bits))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class SlicedWeight:
    """A kernel ``[in, out]`` as nested slices of one 8-bit code.

    Invariants:
        * ``planes[e]`` holds slice ``e`` alone, so depth ``k`` reads exactly the first ``k`` planes.
        * A word holds ``32 / slice_bits[e]`` codes of consecutive inputs of one output, the first in its lowest bits;
          the input axis is padded with zero codes to whole words.
        * ``scale`` is the 2-bit step and ``zero`` is counted in 8-bit steps; both are exact in their storage types.
        * ``slice_bits`` adds up to 8, so full depth is the 8-bit code itself.

    Attributes:
        planes: one uint32 array ``[ceil(in * slice_bits[e] / 32), out]`` a slice, most significant first.
        scale: ``[groups, out]`` bfloat16.
        zero: ``[groups, out]`` int16.
        in_features: length of the input axis.
        slice_bits: bits of each slice.
    """

    planes: tuple[UInt32[Array, "words out"], ...]
    scale: BFloat16[Array, "groups out"]
    zero: Int16[Array, "groups out"]
    in_features: int = field(metadata={"static": True})
    slice_bits: tuple[int, ...] = field(metadata={"static": True})

    @property
    def group_size(self) -> int:
        """Inputs that share one scale and zero point."""
        return self.in_features // self.scale.shape[-2]

    def codes(self) -> UInt8[Array, "in out"]:
        """The whole 8-bit codes, put together from every plane."""
        return self._top_codes(len(self.planes))

    def _top_codes(self, depth: int) -> UInt8[Array, "in out"]:
        """8-bit codes whose bits below the first ``depth`` slices are zero; reads those planes only."""
        codes = jnp.zeros((self.in_features, self.scale.shape[-1]), jnp.uint8)
        for plane, bits, width in zip(self.planes[:depth], self.slice_bits, widths(self.slice_bits), strict=False):
            codes |= unpack(plane, bits, self.in_features) << (CODE_BITS - width)
        return codes

    @partial(jax.jit, static_argnames="depth", inline=True)  # a model's linears share a trace of each shape
    def dequantize(self, depth: int) -> Float[Array, "in out"]:
        """Weights read with the first ``depth`` slices.

        Raises:
            ValueError: if ``depth`` is not in 1..number of slices.
        """
        if not 1 <= depth <= len(self.planes):
            raise ValueError(f"depth {depth} is outside 1..{len(self.planes)}")
        return self._decode(self._top_codes(depth), widths(self.slice_bits)[depth - 1])

    def dequantize_width(self, width: int) -> Float[Array, "in out"]:
        """Weights read at any width of 1 to 8 bits, slice boundary or not.

        Raises:
            ValueError: if ``width`` is not in 1..8.
        """
        if not 1 <= width <= CODE_BITS:
            raise ValueError(f"width {width} is outside 1..{CODE_BITS} bits")
        return self._decode(self.codes(), width)

    def _decode(self, codes: UInt8[Array, "in out"], width: int) -> Float[Array, "in out"]:
        return decode(codes, self.scale.astype(jnp.float32), self.zero.astype(jnp.float32), width)


def pack(codes: UInt8[Array, "in out"], bits: int) -> UInt32[Array, "words out"]:
    """Packs codes of ``bits`` bits into words along the input axis, zero-padded to whole words."""
    per_word = WORD_BITS // bits
    padded = jnp.pad(codes, ((0, -codes.shape[0] % per_word), (0, 0))).astype(jnp.uint32)
    grouped = padded.reshape(-1, per_word, codes.shape[1])  # [words, codes, out]
    shifts = jnp.arange(0, WORD_BITS, bits, dtype=jnp.uint32)[None, :, None]
    return jnp.sum(grouped << shifts, axis=1, dtype=jnp.uint32)  # the fields are disjoint, so the sum is an OR


def unpack(words: UInt32[Array, "words out"], bits: int, in_features: int) -> UInt8[Array, "in out"]:
    """Undoes ``pack``."""
    shifts = jnp.arange(0, WORD_BITS, bits, dtype=jnp.uint32)[None, :, None]
    fields = (words[:, None, :] >> shifts) & jnp.uint32(2**bits - 1)  # [words, codes, out]
    return fields.astype(jnp.uint8).reshape(-1, words.shape[1])[:in_features]


def slice_codes(
    codes: UInt8[Array, "in out"],
    scale: Float[Array, "groups out"],
    zero: Float[Array, "groups out"],
    slice_bits: tuple[int, ...],
) -> SlicedWeight:
    """Cuts 8-bit codes into planes.

    Raises:
        ValueError: if ``slice_bits`` does not cut the 8-bit code.
    """
    check_slice_bits(slice_bits)
    return _cut(codes, scale, zero, tuple(slice_bits))


@partial(jax.jit, static_argnums=3, inline=True)  # a model's linears share a trace of each shape
def _cut(
    codes: UInt8[Array, "in out"],
    scale: Float[Array, "groups out"],
    zero: Float[Array, "groups out"],
    slice_bits: tuple[int, ...],
) -> SlicedWeight:
    planes = tuple(
        pack((codes >> (CODE_BITS - width)) & (2**bits - 1), bits)
        for bits, width in zip(slice_bits, widths(slice_bits), strict=True)
    )
    return SlicedWeight(
        planes=planes,
        scale=scale.astype(jnp.bfloat16),
        zero=zero.astype(jnp.int16),
        in_features=codes.shape[0],
        slice_bits=slice_bits,
    )


def quantize(
    weight: Float[Array, "in out"],
    lo: Float[Array, "groups out"],
    hi: Float[Array, "groups out"],
    slice_bits: tuple[int, ...] = (2, 2, 2, 2),
) -> SlicedWeight:
    """Encodes a kernel on the nested grid between the group limits ``lo`` and ``hi``."""
    scale, zero = scale_and_zero(lo, hi)
    return slice_codes(encode(weight, scale, zero), scale, zero, slice_bits)


def round_to_nearest(
    weight: Float[Array, "in out"], group_size: int, slice_bits: tuple[int, ...] = (2, 2, 2, 2)
) -> SlicedWeight:
    """Encodes a kernel between the plain minimum and maximum of each group: no calibration."""
    return quantize(weight, *unclipped_limits(weight, group_size), slice_bits)
