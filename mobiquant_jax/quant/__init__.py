"""Nested quantization: pure functions from float kernels to 2-bit slices and back."""

from mobiquant_jax.quant.clipping import Clipping, limits, unclipped_limits
from mobiquant_jax.quant.fake_quant import LAST_POSITION, fake_quantize, grid_position, read_position, weight_at
from mobiquant_jax.quant.grid import CODE_BITS, check_group_size, decode, encode, scale_and_zero
from mobiquant_jax.quant.slices import (
    LAYOUT_VERSION,
    WORD_BITS,
    SlicedWeight,
    check_slice_bits,
    pack,
    quantize,
    round_to_nearest,
    slice_codes,
    unpack,
    widths,
)

__all__ = [
    "CODE_BITS",
    "LAST_POSITION",
    "LAYOUT_VERSION",
    "WORD_BITS",
    "Clipping",
    "SlicedWeight",
    "check_group_size",
    "check_slice_bits",
    "decode",
    "encode",
    "fake_quantize",
    "grid_position",
    "limits",
    "pack",
    "quantize",
    "read_position",
    "round_to_nearest",
    "scale_and_zero",
    "slice_codes",
    "unclipped_limits",
    "unpack",
    "weight_at",
    "widths",
]
