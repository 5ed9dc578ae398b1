// The prefill kernel: many tokens against a sliced weight, for the work of one dense bfloat16 product.
//
// Tokens sorted by depth form at most four runs, cut into tiles of up to 256 tokens of one depth. A work item is such a
// tile times 128 outputs. Weights go packed -> registers -> wgmma's A operand: eight instructions' codes of all slices
// are merged into bytes (one logic operation a weight), moved into the mantissa of 512 (one), scaled and centred in
// float32 (one) and rounded to bfloat16 in pairs, while the tensor cores run the instruction before:
//     W = s v + s (2^(1 - 2 depth) - z / 64 - 512),   v = 512 + Q / 64,   Q the 8-bit code without the slices not read
// At 256 tokens that is 28 issue slots a warp for 128 cycles of its tensor core.
//
// The second-level cache bounds it more than these slots do, so two thread blocks of a cluster, of neighbouring outputs,
// share a token tile: each fetches half of every stage for both. `pack_kernel` has gathered the tokens by then, each
// stage of a tile as the bytes that it is in shared memory, swizzled, so that one bulk copy brings half a stage. One
// thread issues the copies; two warpgroups of consumers take 64 outputs each.
#pragma once

#include <type_traits>

#include "common.cuh"

namespace mobiquant {

constexpr int kTileTokens = 256;
constexpr int kWidths = 4;  // a tile is computed as 64, 128, 192 or 256 tokens wide
constexpr int kItemTiles = 8;  // of 16 outputs: two warpgroups of four warps
constexpr int kStages = 5;
constexpr int kStageInputs = 64;
constexpr int kStageBytes = kTileTokens * kStageInputs * 2;
constexpr int kCluster = 2;  // thread blocks that share a token tile
constexpr int kPrefillThreads = 384;
constexpr int kPrefillShared = 1024 + kStages * kStageBytes + 2 * kTileTokens * 128;
constexpr int kPlanThreads = 1024;
constexpr int kPackThreads = 256;
constexpr int kPackStages = 4;  // a warp copies 512 bytes of a token at a time

// Rows of the packed tokens of a segment: each of the runs ends with a tile that is filled up to 64.
__host__ __device__ inline int packed_rows(int tokens) { return tokens + kMaxSlices * 64; }

struct PrefillArgs {
  Weights weights;
  Segments segments;
  const __nv_bfloat16* x;  // [tokens, inputs]
  const int32_t* depth;    // [segments, tokens]
  int32_t* plan;           // see Plan
  __nv_bfloat16* packed;   // [segments, packed_rows(tokens), 128 * blocks]: see `pack_kernel`
  void* out;               // [tokens, 16 * tiles]
  int tokens, inputs;
};

// What `plan_kernel` writes: token tiles of each segment, the wide ones first, and each segment's tokens by depth.
struct Plan {
  int* count;  // [segments, widths]: tiles of each width, widest first
  int4* tile;  // [segments, most]: depth, first, tokens, first packed row
  int* token;  // [segments, tokens]
  int most;
  __host__ __device__ Plan(int32_t* base, int tokens) : most(tokens / kTileTokens + kMaxSlices) {
    tile = reinterpret_cast<int4*>(base);
    count = base + kMaxSegments * most * 4;
    token = count + kMaxSegments * kWidths;
  }
  __host__ __device__ static int ints(int tokens) {
    return kMaxSegments * (tokens / kTileTokens + kMaxSlices) * 4 + kMaxSegments * kWidths + kMaxSegments * tokens;
  }
};

// Sorts the tokens of one segment (a thread block each) by depth, in order, and cuts the runs into even tiles.
__global__ void __launch_bounds__(kPlanThreads) plan_kernel(const __grid_constant__ PrefillArgs args) {
  __shared__ uint64_t warp_counts[kPlanThreads / 32];
  const Plan plan(args.plan, args.tokens);
  const int segment = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int32_t* depth = args.depth + segment * args.tokens;
  const int share = (args.tokens + kPlanThreads - 1) / kPlanThreads;
  const int begin = min(static_cast<int>(threadIdx.x) * share, args.tokens), end = min(begin + share, args.tokens);
  uint64_t mine = 0;  // four counts of 16 bits
  for (int i = begin; i < end; ++i) mine += 1ull << (16 * (depth[i] - 1));
  uint64_t before = mine;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const uint64_t other = __shfl_up_sync(~0u, before, step);
    if (lane >= step) before += other;
  }
  if (lane == 31) warp_counts[warp] = before;
  __syncthreads();
  uint64_t total = 0, offset = 0;
  for (int w = 0; w < kPlanThreads / 32; ++w) {
    if (w == warp) offset = total;
    total += warp_counts[w];
  }
  before += offset - mine;
  int next[kMaxSlices], start = 0;
#pragma unroll
  for (int k = 0; k < kMaxSlices; ++k) {
    next[k] = start + static_cast<int>(before >> (16 * k) & 0xffff);
    start += static_cast<int>(total >> (16 * k) & 0xffff);
  }
  for (int i = begin; i < end; ++i) {
    int position = 0;
#pragma unroll
    for (int k = 0; k < kMaxSlices; ++k)
      if (depth[i] == k + 1) position = next[k]++;
    plan.token[segment * args.tokens + position] = i;
  }
  if (threadIdx.x == 0) {
    int count = 0, row = 0;
    for (int width = kWidths; width > 0; --width) {
      const int before_width = count;
      for (int k = 0, first = 0; k < kMaxSlices; ++k) {
        const int run = static_cast<int>(total >> (16 * k) & 0xffff);
        const int tiles = (run + kTileTokens - 1) / kTileTokens;
        const int even = tiles ? ((run + tiles - 1) / tiles + 63) / 64 * 64 : 0;
        for (int done = 0; done < run; done += even) {
          const int size = min(even, run - done);
          if ((size + 63) / 64 != width) continue;
          plan.tile[segment * plan.most + count++] = make_int4(k + 1, first + done, size, row);
          row += width * 64;
        }
        first += run;
      }
      plan.count[segment * kWidths + kWidths - width] = count - before_width;
    }
  }
}

// Copies tokens into the order of the plan: of a tile of r rows, a multiple of 64, stage after stage of r rows of 128
// bytes, whose 16-byte chunks are swizzled. Rows and inputs that there are none of become zero.
__global__ void __launch_bounds__(kPackThreads) pack_kernel(const __grid_constant__ PrefillArgs args) {
  const Plan plan(args.plan, args.tokens);
  const int segment = blockIdx.y, lane = threadIdx.x % 32;
  int tiles = 0;
#pragma unroll
  for (int width = 0; width < kWidths; ++width) tiles += plan.count[segment * kWidths + width];
  if (static_cast<int>(blockIdx.x) >= tiles) return;
  const int4 tile = plan.tile[segment * plan.most + blockIdx.x];
  const int stage = blockIdx.z * kPackStages + lane / 8, chunk = lane % 8, rows = (tile.z + 63) / 64 * 64;
  const int padded = args.weights.blocks * kBlockInputs, input = stage * kStageInputs + chunk * 8;
  if (input >= padded) return;
  __nv_bfloat16* to = args.packed + static_cast<size_t>(segment * packed_rows(args.tokens) + tile.w) * padded +
                      static_cast<size_t>(stage) * rows * kStageInputs;
  const int* token = plan.token + segment * args.tokens + tile.y;
  for (int row = threadIdx.x / 32; row < rows; row += kPackThreads / 32) {
    uint4 value = make_uint4(0, 0, 0, 0);
    if (row < tile.z && input < args.inputs)
      value = __ldg(reinterpret_cast<const uint4*>(args.x + static_cast<size_t>(token[row]) * args.inputs + input));
    *reinterpret_cast<uint4*>(to + row * kStageInputs + (chunk ^ (row & 7)) * 8) = value;
  }
}

// One work item of this thread block; `tokens` is 0 past the last. Both blocks of a cluster have the same but for `tile`.
struct PrefillItem {
  int segment, depth, first, tokens, row, tile, end_tile;
};

// Items in order of falling width; within one width and segment the token tiles of one set of weights are neighbours.
__device__ __forceinline__ PrefillItem prefill_item(const PrefillArgs& args, const Plan& plan, int index, int rank) {
  constexpr int kShared = kCluster * kItemTiles;
  for (int width = 0; width < kWidths; ++width) {
    for (int segment = 0; segment < args.segments.count; ++segment) {
      const int begin = segment > 0 ? args.segments.ends[segment - 1] : 0, end = args.segments.ends[segment];
      const int* counts = plan.count + segment * kWidths;
      const int count = counts[width], items = (end - begin + kShared - 1) / kShared * count;
      if (index < items) {
        int tile_index = segment * plan.most + index % count;
        for (int w = 0; w < width; ++w) tile_index += counts[w];
        const int4 tile = plan.tile[tile_index];
        const int first_tile = begin + index / count * kShared + rank * kItemTiles;
        return {segment, tile.x, tile.y, tile.z, tile.w, first_tile, end};
      }
      index -= items;
    }
  }
  return {0, 0, 0, 0, 0, 0, 0};
}

struct Ring {
  int stage;
  uint32_t parity;
  __device__ void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

// One block's raw words of a lane's two outputs, ahead of their use.
template <int GB>
struct RawBlock {
  uint4 slice[kMaxSlices];
  uint2 affine[GB];
};

template <int GB>
__device__ __forceinline__ void load_raw(RawBlock<GB>& raw, const PrefillArgs& args, size_t layer,
                                         const PrefillItem& item, int warp, int lane, int block) {
  const int tile = min(item.tile + warp, item.end_tile - 1);
  const size_t piece = (layer * args.weights.tiles + tile) * args.weights.blocks + block;
#pragma unroll
  for (int e = 0; e < kMaxSlices; ++e)
    raw.slice[e] = e < item.depth
                       ? __ldg(reinterpret_cast<const uint4*>(args.weights.planes[e] + piece * kPieceBytes) + lane)
                       : make_uint4(0, 0, 0, 0);
#pragma unroll
  for (int g = 0; g < GB; ++g) raw.affine[g] = __ldg(args.weights.affine + (piece * GB + g) * 8 + lane / 4);
}

// Bytes of codes, of word c for instructions (0, 1), (4, 5), (2, 3), (6, 7).
__device__ __forceinline__ void merge_codes(uint32_t (&bytes)[4], uint32_t w1, uint32_t w2, uint32_t w3, uint32_t w4) {
  constexpr uint32_t kHigh = 0xcccccccc, kLow = 0x33333333, kUpper = 0xf0f0f0f0, kLower = 0x0f0f0f0f;
  const uint32_t even = ((w1 << 2) & kHigh) | (w2 & kLow), odd = (w1 & kHigh) | ((w2 >> 2) & kLow);
  const uint32_t even2 = ((w3 << 2) & kHigh) | (w4 & kLow), odd2 = (w3 & kHigh) | ((w4 >> 2) & kLow);
  bytes[0] = ((even << 4) & kUpper) | (even2 & kLower);
  bytes[1] = (even & kUpper) | ((even2 >> 4) & kLower);
  bytes[2] = ((odd << 4) & kUpper) | (odd2 & kLower);
  bytes[3] = (odd & kUpper) | ((odd2 >> 4) & kLower);
}

// A operand of instruction j.
__device__ __forceinline__ void dequantize(uint32_t (&a)[4], const uint32_t (&bytes)[4][4], int j,
                                           const float (&scale)[2], const float (&offset)[2]) {
  const int word = (j >> 1 & 1) * 2 + (j >> 2), byte = j % 2 * 2;
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    const float low = __uint_as_float(__byte_perm(bytes[c][word], 0x44000000u, 0x7404 | byte << 4));
    const float high = __uint_as_float(__byte_perm(bytes[c][word], 0x44000000u, 0x7404 | (byte + 1) << 4));
    a[c] = pack_bf16(fmaf(scale[c & 1], low, offset[c & 1]), fmaf(scale[c & 1], high, offset[c & 1]));
  }
}

template <int GB, int U, typename Out>
__device__ __forceinline__ void consume(const PrefillArgs& args, const Plan& plan, size_t layer,
                                        const PrefillItem& item, const PrefillItem& following, RawBlock<GB>& raw,
                                        Ring& ring, uint32_t stages, uint32_t full, uint32_t empty, uint32_t staging) {
  const int warp = threadIdx.x / 32 - 4, lane = threadIdx.x % 32;
  const float middle = __int_as_float((128 - 2 * item.depth) << 23);
  float acc[U][32];
  uint32_t a[2][4];
  int previous = -1;  // stage to hand back
  for (int block = 0; block < args.weights.blocks; ++block) {
    uint32_t bytes[4][4];
    merge_codes(bytes[0], raw.slice[0].x, raw.slice[1].x, raw.slice[2].x, raw.slice[3].x);
    merge_codes(bytes[1], raw.slice[0].y, raw.slice[1].y, raw.slice[2].y, raw.slice[3].y);
    merge_codes(bytes[2], raw.slice[0].z, raw.slice[1].z, raw.slice[2].z, raw.slice[3].z);
    merge_codes(bytes[3], raw.slice[0].w, raw.slice[1].w, raw.slice[2].w, raw.slice[3].w);
    float scale[GB][2], offset[GB][2];
#pragma unroll
    for (int g = 0; g < GB; ++g) {
      float zero[2];
      decode_affine(raw.affine[g].x, scale[g][0], zero[0]);
      decode_affine(raw.affine[g].y, scale[g][1], zero[1]);
#pragma unroll
      for (int r = 0; r < 2; ++r) offset[g][r] = scale[g][r] * (middle - 512.0f - zero[r]);
    }
    if (block + 1 < args.weights.blocks)
      load_raw(raw, args, layer, item, warp, lane, block + 1);
    else if (following.tokens > 0)
      load_raw(raw, args, layer, following, warp, lane, 0);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      dequantize(a[j & 1], bytes, j, scale[j * GB / 8], offset[j * GB / 8]);
      if (j % 4 == 0) barrier_wait(full + ring.stage * 8, ring.parity);
      const uint64_t b = wgmma_descriptor(stages + ring.stage * kStageBytes + j % 4 * 32);
      const bool accumulate = block > 0 || j > 0;
      wgmma_fence();
#pragma unroll
      for (int u = 0; u + 1 < U; u += 2) wgmma_n128(acc[u], acc[u + 1], a[j & 1], b + u * (64 * 128 / 16), accumulate);
      if constexpr (U % 2) wgmma_n64(acc[U - 1], a[j & 1], b + (U - 1) * (64 * 128 / 16), accumulate);
      wgmma_commit();
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
  for (int u = 0; u < U; ++u) wgmma_keep(acc[u]);
  if (lane < kCluster) barrier_arrive_at(empty + previous * 8, lane);

  const int outputs = args.weights.tiles * kTileOutputs;
  const int* token = plan.token + item.segment * args.tokens + item.first;
  if constexpr (sizeof(Out) == 4) {
    if (item.tile + warp >= item.end_tile) return;
    float* out = static_cast<float*>(args.out) + (item.tile + warp) * kTileOutputs + lane / 4;
#pragma unroll
    for (int n = 0; n < 8 * U; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int column = 8 * n + 2 * (lane % 4) + c;
        if (column >= item.tokens) continue;
        float* row = out + static_cast<size_t>(token[column]) * outputs;
        row[0] = acc[n / 8][n % 8 * 4 + c];
        row[8] = acc[n / 8][n % 8 * 4 + 2 + c];
      }
    }
  } else {
    // Transposed through shared memory, so that a token's 64 outputs leave as one row.
    const int group = warp / 4, member = warp % 4;
    const uint32_t rows = staging + group * (kTileTokens * 128);
    sync_threads<128>(2 + group);  // the rows of the item before have been read
#pragma unroll
    for (int n = 0; n < 8 * U; n += 2) {
      const float* d = &acc[n / 8][n % 8 * 4];
      const uint32_t packed[4] = {pack_bf16(d[0], d[1]), pack_bf16(d[2], d[3]), pack_bf16(d[4], d[5]),
                                  pack_bf16(d[6], d[7])};
      const int column = 8 * (n + lane / 16) + lane % 8, chunk = 2 * member + lane / 8 % 2;
      store_matrices_transposed(rows + column * 128 + (chunk ^ (column & 7)) * 16, packed);
    }
    sync_threads<128>(2 + group);
    __nv_bfloat16* out = static_cast<__nv_bfloat16*>(args.out);
    for (int i = threadIdx.x % 128; i < 64 * U * 8; i += 128) {
      const int column = i / 8, chunk = i % 8, tile = item.tile + 4 * group + chunk / 2;
      if (column >= item.tokens || tile >= item.end_tile) continue;
      const uint4 values = load_shared16(rows + column * 128 + (chunk ^ (column & 7)) * 16);
      *reinterpret_cast<uint4*>(out + static_cast<size_t>(token[column]) * outputs + tile * kTileOutputs +
                                chunk % 2 * 8) = values;
    }
  }
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
  const Plan plan(args.plan, args.tokens);
  Ring ring{0, 0};

  if (threadIdx.x < 128) {
    give_registers<40>();
    if (threadIdx.x == 0) {
      const int padded = args.weights.blocks * kBlockInputs;
      for (int index = blockIdx.x / kCluster;; index += step) {
        const PrefillItem item = prefill_item(args, plan, index, rank);
        if (item.tokens == 0) break;
        const int rows = (item.tokens + 63) / 64 * 64, bytes = rows * kStageInputs * 2, half = bytes / kCluster;
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
    const size_t layer = args.weights.which_layer();
    int index = blockIdx.x / kCluster;
    PrefillItem item = prefill_item(args, plan, index, rank);
    RawBlock<GB> raw;
    if (item.tokens > 0) load_raw(raw, args, layer, item, warp, lane, 0);
    const auto run = [&](auto width) {
      while (item.tokens > 64 * (width.value - 1)) {
        const PrefillItem following = prefill_item(args, plan, index += step, rank);
        consume<GB, width.value, Out>(args, plan, layer, item, following, raw, ring, stages, full, empty, staging);
        item = following;
      }
    };
    run(std::integral_constant<int, 4>());
    run(std::integral_constant<int, 3>());
    run(std::integral_constant<int, 2>());
    run(std::integral_constant<int, 1>());
  }
  __syncwarp();
  cluster_arrive();  // the other block still writes here and counts here
  cluster_wait();
}

}  // namespace mobiquant
