// The decode kernel: 1 to 16 tokens against a sliced weight, each token and segment of outputs at its own depth.
//
//     y[t] = sum_g s_g X_g ( sum_{e <= d(t)} 4^(1-e) q_e . u_t  +  U_t (2^(1-2 d(t)) - z_g / 64) )
//
// where x_t = X_g u_t within group g, u_t integers of 16 bits and U_t their sum over the group. Both factors of
// q_e . u_t are integers, so the tensor cores multiply bytes, mma.m16n8k32, twice the products of a bfloat16
// instruction: weights as the A operand (16 outputs), and as B (8 columns) the high and low bytes of u for four tokens.
// Four codes become an A register by one AND, which leaves them where they are in their byte: what comes out is 1, 4,
// 16 or 64 times too large, which the sum over the four instructions of a block undoes by shifts.
//
// A thread block walks over tiles of 16 outputs. Its warps share the inputs, a block of 128 each at a time, and add up
// through shared memory once every few tiles. One more warp keeps a ring of slots full with bulk copies.
#pragma once

#include "common.cuh"

namespace mobiquant {

struct DecodeArgs {
  Weights weights;
  Segments segments;
  const __nv_bfloat16* x;   // [tokens, inputs]
  const int32_t* depth;     // [segments, tokens]
  const int32_t* expected;  // how many slices will probably be read: a scalar on the device, or null for 1
  float* out;               // [splits, tokens, 16 * tiles]
  int tokens, inputs;
  int split_blocks;   // blocks of a split: blockIdx.y
  int prefetch;       // bytes of slices a thread block fetches before x and the depths are there, see route.cuh; half as
                      // many more where three slices or four are expected
  int reduced_tiles;  // tiles added up at once: see `reduced_tiles`
};

constexpr int kDecodeTokens = 16;
constexpr int kColumnTokens = 4;  // tokens in the 8 columns of a matrix instruction
constexpr int kPartialBytes = 16 * 1024;
constexpr float kLargest = 127 * 257;  // of u: both of its bytes are signed

// How many tiles' partial sums fit beside each other.
inline int reduced_tiles(int warps, int tokens) { return kPartialBytes / (warps * tokens * kTileOutputs * 4); }

template <int GB, int WARPS, int SLOTS>
struct DecodeShape {
  static constexpr int kThreads = 32 * (WARPS + 1);
  static constexpr int kSlotBytes = WARPS * (kPieceBytes + GB * 64);
  // Bytes from the start of shared memory.
  static constexpr int kBarriers = kMaxSegments * (kDecodeTokens + 1) * 4;
  static constexpr int kRing = (kBarriers + 2 * SLOTS * 8 + 127) / 128 * 128;
  static constexpr int kPartial = kRing + SLOTS * kSlotBytes;
  static constexpr int kX = kPartial + 2 * kPartialBytes;
  __host__ __device__ static int row_bytes(int blocks) { return blocks * kBlockInputs * 2; }
  __host__ __device__ static int sums(int tokens, int blocks) { return kX + tokens * row_bytes(blocks); }
  __host__ __device__ static int total(int tokens, int blocks) {
    return sums(tokens, blocks) + tokens * blocks * GB * static_cast<int>(sizeof(float2));
  }
};

// Sixteen inputs of one token, two chunks of eight: inputs 32 i + 16 s + 8 half of a block, s = 0 and 1.
struct StagedInputs {
  int token, place;  // place: (block, i, half)
  uint32_t words[8];
};

__device__ inline void load_inputs(StagedInputs& in, const DecodeArgs& args, int first_block, int blocks) {
  while (in.place >= blocks * 8 && in.token < args.tokens) in.place -= blocks * 8, ++in.token;
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    const int input = (first_block + in.place / 8) * kBlockInputs + in.place / 2 % 4 * 32 + 16 * s + in.place % 2 * 8;
    uint4 v = make_uint4(0, 0, 0, 0);
    if (in.token < args.tokens && input < args.inputs)
      v = *reinterpret_cast<const uint4*>(args.x + static_cast<size_t>(in.token) * args.inputs + input);
    in.words[4 * s] = v.x, in.words[4 * s + 1] = v.y, in.words[4 * s + 2] = v.z, in.words[4 * s + 3] = v.w;
  }
}

// Puts u in shared memory, and (X, U) of each token and group. A group's threads are neighbours in a warp.
template <int GB>
__device__ inline void stage_inputs(const StagedInputs& in, const DecodeArgs& args, unsigned char* x, float2* sums,
                                    int blocks) {
  constexpr int kLanes = 8 / GB;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: added, it leaves an integer in the low bits
  uint32_t most = 0;                     // as bits, so that what is not finite stays so
#pragma unroll
  for (int k = 0; k < 8; ++k) most = max(most, max(in.words[k] << 16 & 0x7fffffffu, in.words[k] & 0x7fff0000u));
#pragma unroll
  for (int step = 1; step < kLanes; step *= 2) most = max(most, __shfl_xor_sync(~0u, most, step));
  const float inverse = most < __float_as_uint(1e-30f) ? 0.0f : __fdividef(kLargest, __uint_as_float(most));
  float sum = 0.0f;
  uint32_t high[4], low[4];  // of four quads: bytes of inputs 2 quad, 2 quad + 1 of both chunks
#pragma unroll
  for (int quad = 0; quad < 4; ++quad) {
    uint32_t u[4];
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const float first = fmaf(__uint_as_float(in.words[4 * s + quad] << 16), inverse, kRound);
      const float second = fmaf(__uint_as_float(in.words[4 * s + quad] & 0xffff0000u), inverse, kRound);
      sum += (first - kRound) + (second - kRound);
      u[2 * s] = __float_as_uint(first);
      u[2 * s + 1] = __float_as_uint(second);
    }
    low[quad] = __byte_perm(__byte_perm(u[0], u[1], 0x0040), __byte_perm(u[2], u[3], 0x0040), 0x5410);
#pragma unroll
    for (int k = 0; k < 4; ++k) u[k] += 128;  // so that the high byte is rounded
    high[quad] = __byte_perm(__byte_perm(u[0], u[1], 0x0051), __byte_perm(u[2], u[3], 0x0051), 0x5410);
  }
#pragma unroll
  for (int step = 1; step < kLanes; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
  if (in.token >= args.tokens) return;
  // A lane of the matrix instructions reads 16 bytes: two words each of instructions 0 and 1, or 2 and 3.
  const int block = in.token * blocks + in.place / 8;
  uint32_t* to = reinterpret_cast<uint32_t*>(x) + block * 64 + in.place / 4 % 2 * 32 + in.place % 4;
#pragma unroll
  for (int quad = 0; quad < 4; ++quad) {
    to[quad * 4] = high[quad];
    to[quad * 4 + 16] = low[quad];
  }
  // The reciprocal of what is near the end of the range is 0: such inputs give no finite result.
  const float largest = most < __float_as_uint(0x1p125f) ? __uint_as_float(most) : INFINITY;
  if (in.place % kLanes == 0)
    sums[block * GB + in.place % 8 / kLanes] = make_float2(largest * (1.0f / kLargest), sum);
}

// The sum over a group's instructions, high and low bytes of u together, in units of the last one's, for one row.
template <int GB>
__device__ __forceinline__ float combine(const int (&acc)[4][4], int group, int row) {
  constexpr int kEach = 4 / GB;
  int sum[2];
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    sum[part] = acc[kEach * group][2 * row + part];
#pragma unroll
    for (int i = 1; i < kEach; ++i) sum[part] = sum[part] * 4 + acc[kEach * group + i][2 * row + part];
  }
  return static_cast<float>(sum[0] * 256 + sum[1]);
}

// NT times 4 tokens, GB groups a block of inputs, WARPS consumers, SLOTS pieces of each on their way.
template <int NT, int GB, int WARPS, int SLOTS>
__global__ void __launch_bounds__(DecodeShape<GB, WARPS, SLOTS>::kThreads, 1)
    decode_kernel(const __grid_constant__ DecodeArgs args) {
  using Shape = DecodeShape<GB, WARPS, SLOTS>;
  extern __shared__ __align__(1024) unsigned char shared[];
  launch_dependents();
  const int warp = keep(threadIdx.x / 32), lane = keep(threadIdx.x % 32), row = keep(lane / 4), quad = keep(lane % 4);
  const int tokens = keep(args.tokens), tiles = keep(args.weights.tiles);
  const int first_tile = blockIdx.x, stride = gridDim.x;
  const int first_block = blockIdx.y * args.split_blocks;
  const int blocks = keep(max(0, min(args.split_blocks, args.weights.blocks - first_block)));
  int* const depths = reinterpret_cast<int*>(shared);          // [segments, 16]
  int* const deepest = depths + kMaxSegments * kDecodeTokens;  // [segments]
  const uint32_t base = keep(shared_address(shared));
  const uint32_t full = base + Shape::kBarriers, empty = full + SLOTS * 8;

  if (warp == WARPS) {  // the producer
    const size_t layer = args.weights.which_layer();
    if (lane == 0) {
      // The first slice is read whatever the depths are, and so fetched while it is still being loaded how many others
      // are expected.
      const int expected = args.expected ? *args.expected : 1;
      int left = blocks > 0 ? args.prefetch : 0, slice = 0;
      bool more = true;
      do {
        for (int tile = first_tile; tile < tiles; tile += stride) {
          if (more && left < blocks * kPieceBytes && expected > 2) left += args.prefetch / 2, more = false;
          if (left < kPieceBytes) break;
          const size_t piece = (layer * tiles + tile) * args.weights.blocks + first_block;
          const int count = min(blocks, left / kPieceBytes);
          prefetch_bulk(args.weights.planes[slice] + piece * kPieceBytes, count * kPieceBytes);
          if (slice == 0) prefetch_bulk(args.weights.affine + piece * GB * 8, count * GB * 64);
          left -= count * kPieceBytes;
        }
      } while (++slice < min(expected, kMaxSlices));
    }
    wait_for_previous();
    int of_lane[kMaxSegments];  // all loads before the first use
#pragma unroll
    for (int s = 0; s < kMaxSegments; ++s)
      of_lane[s] = s < args.segments.count && lane < tokens ? args.depth[s * tokens + lane] : 1;
    if (lane == 0) {
      for (int s = 0; s < SLOTS; ++s) {
        barrier_init(full + s * 8, 1);
        barrier_init(empty + s * 8, WARPS);
      }
      barrier_init_fence();
    }
#pragma unroll
    for (int s = 0; s < kMaxSegments; ++s) {
      if (lane < kDecodeTokens) depths[s * kDecodeTokens + lane] = of_lane[s];
      const int most = __reduce_max_sync(~0u, of_lane[s]);
      if (lane == 0) deepest[s] = most;
    }
    __syncwarp();
    arrive_threads<Shape::kThreads>(0);  // the first copies need not wait for x
    if (lane > 0) return;
    const uint64_t policy = evict_first();
    int slot = 0;
    uint32_t parity = 1;  // the first round finds the slots empty
    for (int tile = first_tile; tile < tiles; tile += stride) {
      const int slices = deepest[segment_of(args.segments, tile)];
      for (int block = 0; block < blocks; block += WARPS) {
        const int count = min(WARPS, blocks - block);
        const size_t piece = (layer * tiles + tile) * args.weights.blocks + first_block + block;
#pragma unroll 1
        for (int slice = 0; slice < slices; ++slice) {
          barrier_wait(empty + slot * 8, parity);
          const int affine_bytes = slice == 0 ? count * GB * 64 : 0;
          const uint32_t to = base + Shape::kRing + slot * Shape::kSlotBytes;
          barrier_expect(full + slot * 8, count * kPieceBytes + affine_bytes);
          copy_bulk(to, args.weights.planes[slice] + piece * kPieceBytes, count * kPieceBytes, full + slot * 8, policy);
          if (slice == 0)
            copy_bulk(to + WARPS * kPieceBytes, args.weights.affine + piece * GB * 8, affine_bytes, full + slot * 8,
                      policy);
          if (++slot == SLOTS) slot = 0, parity ^= 1;
        }
      }
    }
    return;
  }

  unsigned char* const x = shared + Shape::kX;
  float2* const sums = reinterpret_cast<float2*>(shared + Shape::sums(tokens, blocks));
  StagedInputs staged{0, static_cast<int>(threadIdx.x), {}};
  wait_for_previous();
  load_inputs(staged, args, first_block, blocks);
  uint32_t x_row[NT], sum_row[NT];  // of the token whose columns this lane holds as B, and of the one it gets as D
#pragma unroll
  for (int n = 0; n < NT; ++n) {
    const int holds = min(kColumnTokens * n + row / 2, tokens - 1), gets = min(kColumnTokens * n + quad, tokens - 1);
    x_row[n] = keep(base + Shape::kX + holds * Shape::row_bytes(blocks) + warp * 256 + row % 2 * 64 + quad * 16);
    sum_row[n] = keep(base + Shape::sums(tokens, blocks) + (gets * blocks + warp) * GB * 8);
  }
  const int outputs = tiles * kTileOutputs;
  const int rounds = keep((blocks + WARPS - 1) / WARPS);
  const uint32_t from_piece = keep(base + Shape::kRing + warp * kPieceBytes + lane * 16);
  const uint32_t from_affine = keep(base + Shape::kRing + WARPS * kPieceBytes + warp * GB * 64 + row * 8);
  for (int item = warp * 32; item < tokens * blocks * 8; item += 32 * WARPS) {
    StagedInputs next{staged.token, staged.place + 32 * WARPS, {}};
    load_inputs(next, args, first_block, blocks);
    stage_inputs<GB>(staged, args, x, sums, blocks);
    staged = next;
  }
  sync_threads<Shape::kThreads>(0);

  int slot = 0, held = 0, buffer = 0;  // held: tiles waiting to be added up, in one of two buffers
  uint32_t parity = 0;
  for (int tile = first_tile; tile < tiles; tile += stride) {
    const int segment = segment_of(args.segments, tile), slices = deepest[segment];
    int depth[NT];
    float middle[NT];  // half of the last step: 2^(1 - 2 depth)
    float y[NT][2];
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      depth[n] = depths[segment * kDecodeTokens + min(kColumnTokens * n + quad, tokens - 1)];
      middle[n] = __int_as_float((128 - 2 * depth[n]) << 23);
      y[n][0] = y[n][1] = 0.0f;
    }
    for (int r = 0; r < rounds; ++r) {
      const bool active = r * WARPS + warp < blocks;
      const int block = active ? r * WARPS : -warp;  // after this warp's first; where there is none, any, and left out
      uint4 b[NT][2];
      float total[GB][NT][2] = {};
      uint2 affine[GB];
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int h = 0; h < 2; ++h) b[n][h] = load_shared16(x_row[n] + block * 256 + h * 128);
      float step = 1.0f;  // 4^(1 - e)
#pragma unroll 1
      for (int slice = 0; slice < slices; ++slice, step *= 0.25f) {
        barrier_wait(full + slot * 8, parity);
        const uint32_t offset = slot * Shape::kSlotBytes;
        const uint4 piece = load_shared16(from_piece + offset);
        if (slice == 0) {
#pragma unroll
          for (int g = 0; g < GB; ++g) affine[g] = load_shared8(from_affine + offset + g * 64);
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(empty + slot * 8);
        if (++slot == SLOTS) slot = 0, parity ^= 1;
        int acc[NT][4][4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint32_t mask = 0x03030303u << (2 * i);
          const uint32_t a[4] = {piece.x & mask, piece.y & mask, piece.z & mask, piece.w & mask};
#pragma unroll
          for (int n = 0; n < NT; ++n) {
            const uint4& h = b[n][i / 2];
            mma_bytes(acc[n][i], a, i % 2 ? h.z : h.x, i % 2 ? h.w : h.y);
          }
        }
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          const float used = slice < depth[n] ? step : 0.0f;
#pragma unroll
          for (int g = 0; g < GB; ++g) {
            const float weight = used / static_cast<float>(1 << (2 * (4 / GB * (g + 1) - 1)));
#pragma unroll
            for (int o = 0; o < 2; ++o) total[g][n][o] = fmaf(weight, combine<GB>(acc[n], g, o), total[g][n][o]);
          }
        }
      }
      if (!active) continue;
#pragma unroll
      for (int g = 0; g < GB; ++g) {
        float scale[2], zero[2];
        decode_affine(affine[g].x, scale[0], zero[0]);
        decode_affine(affine[g].y, scale[1], zero[1]);
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          const uint2 of_x = load_shared8(sum_row[n] + (block * GB + g) * 8);
          const float unit = __uint_as_float(of_x.x), sum = __uint_as_float(of_x.y);
#pragma unroll
          for (int o = 0; o < 2; ++o)
            y[n][o] = fmaf(scale[o] * unit, fmaf(sum, middle[n] - zero[o], total[g][n][o]), y[n][o]);
        }
      }
    }

    // Two buffers, so that one barrier is enough: by the next, everyone has read this one.
    float* const mine = reinterpret_cast<float*>(shared + Shape::kPartial) + buffer * (kPartialBytes / 4);
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const int token = kColumnTokens * n + quad;
      float* const to = mine + ((held * WARPS + warp) * tokens + token) * kTileOutputs + row;
      if (token < tokens) to[0] = y[n][0], to[8] = y[n][1];
    }
    ++held;
    if (held < args.reduced_tiles && tile + stride < tiles) continue;
    sync_threads<32 * WARPS>(1);
#pragma unroll 1
    for (int item = threadIdx.x; item < held * tokens * kTileOutputs; item += 32 * WARPS) {
      const int unit = item / kTileOutputs, output = item % kTileOutputs;
      const int kept = static_cast<int>(__fdividef(unit + 0.5f, tokens)), token = unit - kept * tokens;
      const float* from = mine + (kept * WARPS * tokens + token) * kTileOutputs + output;
      float value = 0.0f;
#pragma unroll
      for (int w = 0; w < WARPS; ++w) value += from[w * tokens * kTileOutputs];
      const int to_tile = tile - (held - 1 - kept) * stride;
      args.out[(static_cast<size_t>(blockIdx.y) * tokens + token) * outputs + to_tile * kTileOutputs + output] = value;
    }
    held = 0;
    buffer ^= 1;
  }
}

}  // namespace mobiquant
