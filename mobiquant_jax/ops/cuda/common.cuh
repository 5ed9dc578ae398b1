// What the decode and the prefill kernel share: the tiled layout and its scales.
//
// The layout (layout.py writes it): outputs in tiles of 16, inputs in blocks of 128. One slice of one (tile, block) is
// 512 contiguous bytes, 16 per lane. Word c of a lane holds the codes of
//     output  lane / 4 + 8 (c % 2)
//     inputs  32 i + 16 s + 8 (c / 2) + 2 (lane % 4) + p        for i = 0..3, s = 0..1, p = 0..1
// at bit 2i of byte 2s + p.
#pragma once

#include <cuda_bf16.h>

#include "ptx.cuh"

namespace mobiquant {

constexpr int kTileOutputs = 16;
constexpr int kBlockInputs = 128;
constexpr int kPieceBytes = 512;  // one slice of one (tile, block)
constexpr int kMaxSlices = 4;
constexpr int kMaxSegments = 4;

// A linear's weights, all layers, on the device.
struct Weights {
  const unsigned char* planes[kMaxSlices];  // [layers, tiles, blocks, 512 bytes] each
  const uint2* affine;                      // [layers, tiles, groups, 8]: outputs g and g + 8, see `decode_affine`
  const int32_t* layer;                     // which layer: a scalar on the device, or null and
  int layer_index;
  int tiles, blocks;
  __device__ size_t which_layer() const { return layer ? *layer : layer_index; }
};

// Outputs that share one depth per token, e.g. the three of a fused q, k, v; ends in tiles.
struct Segments {
  int count;
  int ends[kMaxSegments];
};

__device__ inline int segment_of(const Segments& segments, int tile) {
  int segment = 0;
#pragma unroll
  for (int s = 0; s < kMaxSegments - 1; ++s) segment += (s < segments.count - 1 && tile >= segments.ends[s]);
  return segment;
}

// Low half: scale, a bfloat16. High half: zero + 32768, whose bits in the mantissa of 2^17 count 1/64.
__device__ inline void decode_affine(uint32_t packed, float& scale, float& zero) {
  scale = __uint_as_float(packed << 16);
  zero = __uint_as_float(__byte_perm(packed, 0x4800, 0x5432)) - (131072.0f + 512.0f);
}

}  // namespace mobiquant
