// The prefill kernel: many tokens against a sliced weight, for the work of one dense bfloat16 product.
//
// Tokens sorted by depth form at most four runs, cut into tiles of up to 256 tokens of one depth. A work item is such a
// tile times 128 outputs. Weights go packed -> registers -> wgmma's A operand: eight instructions' codes of all slices
// are merged into bytes (one logic operation a weight), moved into the mantissa of 512 (one), scaled and centred in
// float32 (one) and rounded to bfloat16 in pairs, while the tensor cores run the instruction before:
//     W = s v + s (2^(1 - 2 depth) - z / 64 - 512),   v = 512 + Q / 64,   Q the 8-bit code without the slices not read
// At 256 tokens that is 28 issue slots a warp for 128 cycles of its tensor core.
//
// The items take turns on the processors, those of wide tiles first; `plan_kernel` cuts the runs into tiles so that the
// turns, each as long as its widest tile, are over soonest.
//
// To spare the second-level cache, two thread blocks of a cluster, of neighbouring outputs, share a token tile: each
// fetches half of every stage for both. `pack_kernel` has gathered the tokens by then, each stage of a tile as the bytes
// that it is in shared memory, swizzled, so that one bulk copy brings half a stage. One thread issues the copies; two
// warpgroups of consumers take 64 outputs each.
#pragma once

#include <type_traits>

#include "prefill_plan.cuh"
#include "wgmma.cuh"

namespace mobiquant {

constexpr int kStages = 5;
constexpr int kStageBytes = kTileTokens * kStageInputs * 2;
constexpr int kPrefillThreads = 384;
constexpr int kPrefillShared = 1024 + kStages * kStageBytes + 2 * kTileTokens * 128;

struct Ring {
  int stage;
  uint32_t parity;
  __device__ void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

// Where a warp's weights of an item begin, in pieces of the layer; a depth of 0 for none.
struct RawSource {
  uint32_t piece;
  int depth;
  __device__ RawSource(const PrefillArgs& args, const PrefillItem& item, int warp)
      : piece(min(item.tile + warp, item.end_tile - 1) * args.weights.blocks), depth(item.depth) {}
};

// One block's words of a lane's two outputs, ahead of their use.
template <int GB>
struct RawBlock {
  uint4 slice[kMaxSlices];
  uint2 affine[GB];
};

template <int GB>
__device__ __forceinline__ void load_raw(RawBlock<GB>& raw, const PrefillArgs& args, size_t layer_pieces, uint32_t piece,
                                         int depth, int lane) {
#pragma unroll
  for (int e = 0; e < kMaxSlices; ++e) {
    const unsigned char* plane = args.weights.planes[e] + layer_pieces * kPieceBytes;
    raw.slice[e] = e < depth ? __ldg(reinterpret_cast<const uint4*>(plane + (piece * kPieceBytes + lane * 16)))
                             : make_uint4(0, 0, 0, 0);
  }
  const uint2* affine = args.weights.affine + layer_pieces * GB * 8;
#pragma unroll
  for (int g = 0; g < GB; ++g)
    raw.affine[g] = depth > 0 ? __ldg(affine + (piece * GB * 8 + lane / 4 + g * 8)) : make_uint2(0, 0);
}

// A block's codes as nibbles, of the upper two slices and of the lower two, and what makes weights of them.
template <int GB>
struct Codes {
  uint32_t even[4][2], odd[4][2];  // of instructions 0, 1, 4, 5 and 2, 3, 6, 7; of word c
  float scale[GB][2], offset[GB][2];

  __device__ __forceinline__ void take(const RawBlock<GB>& raw, int depth) {
    take(0, raw.slice[0].x, raw.slice[1].x, raw.slice[2].x, raw.slice[3].x);
    take(1, raw.slice[0].y, raw.slice[1].y, raw.slice[2].y, raw.slice[3].y);
    take(2, raw.slice[0].z, raw.slice[1].z, raw.slice[2].z, raw.slice[3].z);
    take(3, raw.slice[0].w, raw.slice[1].w, raw.slice[2].w, raw.slice[3].w);
    const float middle = __int_as_float((128 - 2 * depth) << 23) - 512.0f;
#pragma unroll
    for (int g = 0; g < GB; ++g) {
      float zero[2];
      decode_affine(raw.affine[g].x, scale[g][0], zero[0]);
      decode_affine(raw.affine[g].y, scale[g][1], zero[1]);
#pragma unroll
      for (int r = 0; r < 2; ++r) offset[g][r] = scale[g][r] * (middle - zero[r]);
    }
  }
  __device__ __forceinline__ void take(int c, uint32_t w1, uint32_t w2, uint32_t w3, uint32_t w4) {
    constexpr uint32_t kHigh = 0xcccccccc;
    even[c][0] = select_bits(kHigh, w1 << 2, w2), odd[c][0] = select_bits(kHigh, w1, w2 >> 2);
    even[c][1] = select_bits(kHigh, w3 << 2, w4), odd[c][1] = select_bits(kHigh, w3, w4 >> 2);
  }

  // A operand of instruction j.
  __device__ __forceinline__ void dequantize(uint32_t (&a)[4], int j) const {
    const float(&s)[2] = scale[j * GB / 8], (&o)[2] = offset[j * GB / 8];
    const uint32_t first = j % 2 ? 0x7424 : 0x7404, second = j % 2 ? 0x7434 : 0x7414;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const uint32_t(&nibbles)[2] = j & 2 ? odd[c] : even[c];
      const uint32_t bytes = j < 4 ? select_bits(0xf0f0f0f0, nibbles[0] << 4, nibbles[1])
                                   : select_bits(0xf0f0f0f0, nibbles[0], nibbles[1] >> 4);
      const float low = __uint_as_float(__byte_perm(bytes, 0x44000000u, first));
      const float high = __uint_as_float(__byte_perm(bytes, 0x44000000u, second));
      a[c] = pack_bf16(fmaf(s[c & 1], low, o[c & 1]), fmaf(s[c & 1], high, o[c & 1]));
    }
  }
};

// `codes` hold the item's first block before and that of `next` after.
template <int GB, int kWidth, typename Out>
__device__ __forceinline__ void consume(const PrefillArgs& args, const Plan& plan, size_t layer_pieces,
                                        const PrefillItem& item, const RawSource& next, Codes<GB>& codes, Ring& ring,
                                        uint32_t stages, uint32_t full, uint32_t empty, uint32_t staging) {
  constexpr int kColumns = kWidth * kUnit, kInstructions = kColumns > 128 ? 2 : 1, kEach = kColumns / kInstructions;
  const int warp = threadIdx.x / 32 - 4, lane = threadIdx.x % 32;
  float acc[kInstructions][kEach / 2]{};
  uint32_t a[2][4];
  RawBlock<GB> raw;
  RawSource source(args, item, warp);
  const uint64_t first_stage = wgmma_descriptor(stages);
  int previous = -1;  // stage to hand back
  for (int left = args.weights.blocks; left > 0; --left) {
    ++source.piece;
    if (left == 1) source = next;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      codes.dequantize(a[j & 1], j);
      if (j % 4 == 0) barrier_wait(full + ring.stage * 8, ring.parity);
      const uint64_t b = first_stage + ring.stage * (kStageBytes / 16) + j % 4 * 2;
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < kInstructions; ++i) wgmma(acc[i], a[j & 1], b + i * (kEach * 128 / 16));
      wgmma_commit();
      if (j == 0) load_raw(raw, args, layer_pieces, source.piece, source.depth, lane);
      if (j == 7) codes.take(raw, source.depth);
      wgmma_wait<1>();  // instruction j - 1 is done: its A registers and, at a boundary, its stage are free
      if (j % 4 == 0 && previous >= 0 && lane < kCluster) barrier_arrive_at(empty + previous * 8, lane);
      if (j % 4 == 3) {
        previous = ring.stage;
        ring.advance();
      }
    }
  }
  wgmma_wait<0>();
#pragma unroll
  for (int i = 0; i < kInstructions; ++i) wgmma_keep(acc[i]);
  // Number c that a lane holds of the n-th eight tokens.
  const auto sum = [&acc](int n, int c) { return acc[n / (kEach / 8)][n % (kEach / 8) * 4 + c]; };
  if (lane < kCluster) barrier_arrive_at(empty + previous * 8, lane);

  const int outputs = args.weights.tiles * kTileOutputs;
  const int* token = plan.token + item.segment * args.tokens + item.first;
  if constexpr (sizeof(Out) == 4) {
    if (item.tile + warp >= item.end_tile) return;
    float* out = static_cast<float*>(args.out) + (item.tile + warp) * kTileOutputs + lane / 4;
#pragma unroll
    for (int n = 0; n < 2 * kWidth; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int column = 8 * n + 2 * (lane % 4) + c;
        if (column >= item.tokens) continue;
        float* row = out + static_cast<size_t>(token[column]) * outputs;
        row[0] = sum(n, c);
        row[8] = sum(n, 2 + c);
      }
    }
  } else {
    // Transposed through shared memory, so that a token's 64 outputs leave as one row.
    const int group = warp / 4, member = warp % 4;
    const uint32_t rows = staging + group * (kTileTokens * 128);
    sync_threads<128>(2 + group);  // the rows of the item before have been read
#pragma unroll
    for (int n = 0; n < 2 * kWidth; n += 2) {
      const uint32_t packed[4] = {pack_bf16(sum(n, 0), sum(n, 1)), pack_bf16(sum(n, 2), sum(n, 3)),
                                  pack_bf16(sum(n + 1, 0), sum(n + 1, 1)), pack_bf16(sum(n + 1, 2), sum(n + 1, 3))};
      const int column = 8 * (n + lane / 16) + lane % 8, chunk = 2 * member + lane / 8 % 2;
      store_matrices_transposed(rows + column * 128 + (chunk ^ (column & 7)) * 16, packed);
    }
    sync_threads<128>(2 + group);
    __nv_bfloat16* out = static_cast<__nv_bfloat16*>(args.out);
    for (int i = threadIdx.x % 128; i < kColumns * 8; i += 128) {
      const int column = i / 8, chunk = i % 8, tile = item.tile + 4 * group + chunk / 2;
      if (column >= item.tokens || tile >= item.end_tile) continue;
      const uint4 values = load_shared16(rows + column * 128 + (chunk ^ (column & 7)) * 16);
      *reinterpret_cast<uint4*>(out + static_cast<size_t>(token[column]) * outputs + tile * kTileOutputs +
                                chunk % 2 * 8) = values;
    }
  }
}

// Calls `run` with each width, the widest first, as a constant.
template <int kWidth = kWidths, typename Run>
__device__ __forceinline__ void for_widths(const Run& run) {
  run(std::integral_constant<int, kWidth>());
  if constexpr (kWidth > 1) for_widths<kWidth - 1>(run);
}

template <int GB, typename Out>
__global__ void __launch_bounds__(kPrefillThreads, 1) prefill_kernel(const __grid_constant__ PrefillArgs args) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const uint32_t full = shared_address(shared), empty = full + kStages * 8, stages = full + 1024;
  const uint32_t staging = stages + kStages * kStageBytes;
  const int rank = blockIdx.x % kCluster, step = gridDim.x / kCluster;
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      barrier_init(full + s * 8, 1);
      barrier_init(empty + s * 8, 8 * kCluster);  // each consumer's warp, of both blocks
    }
    barrier_init_fence();
  }
  __syncwarp();
  cluster_arrive();
  cluster_wait();
  wait_for_previous();
  const Plan plan(args.plan, args.tokens);
  PrefillItems items(args, plan, rank);
  Ring ring{0, 0};

  if (threadIdx.x < 128) {
    give_registers<40>();
    if (threadIdx.x == 0) {
      const int padded = args.weights.blocks * kBlockInputs;
      for (int index = blockIdx.x / kCluster;; index += step) {
        const PrefillItem item = items.at(index);
        if (item.tokens == 0) break;
        const int rows = width_of(item.tokens) * kUnit, bytes = rows * kStageInputs * 2, half = bytes / kCluster;
        const __nv_bfloat16* tile =
            args.packed + static_cast<size_t>(item.segment * packed_rows(args.tokens) + item.row) * padded;
        const char* from = reinterpret_cast<const char*>(tile) + rank * half;
        for (int input = 0; input < padded; input += kStageInputs, from += bytes) {
          barrier_wait(empty + ring.stage * 8, ring.parity ^ 1);
          barrier_expect(full + ring.stage * 8, bytes);
          copy_bulk_multicast(stages + ring.stage * kStageBytes + rank * half, from, half, full + ring.stage * 8,
                              (1 << kCluster) - 1);
          ring.advance();
        }
      }
    }
  } else {
    take_registers<232>();
    const int warp = threadIdx.x / 32 - 4, lane = threadIdx.x % 32;
    const size_t layer_pieces = args.weights.which_layer() * args.weights.tiles * args.weights.blocks;
    int index = blockIdx.x / kCluster;
    PrefillItem item = items.at(index);
    Codes<GB> codes;
    {
      RawBlock<GB> raw;
      load_raw(raw, args, layer_pieces, RawSource(args, item, warp).piece, item.depth, lane);
      codes.take(raw, item.depth);
    }
    for_widths([&](auto width) {
      while (width_of(item.tokens) == width.value) {
        const PrefillItem following = items.at(index += step);
        consume<GB, width.value, Out>(args, plan, layer_pieces, item, RawSource(args, following, warp), codes, ring,
                                      stages, full, empty, staging);
        item = following;
      }
    });
  }
  __syncwarp();
  cluster_arrive_release();  // the other block still writes here and counts here
  cluster_wait();
}

}  // namespace mobiquant
