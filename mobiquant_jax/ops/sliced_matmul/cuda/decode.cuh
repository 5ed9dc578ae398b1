// The decode kernel: 1 to 16 tokens against a sliced weight, each token and segment of outputs at its own depth.
//
//     y[t] = sum_g s_g X_g ( sum_{e <= d(t)} 4^(1-e) q_e . u_t  +  U_t (2^(1-2 d(t)) - z_g / 64) )
//
// where x_t = X_g u_t within group g, u_t integers of 16 bits and U_t their sum over the group. Both factors of q_e . u_t
// are integers, so the tensor cores multiply bytes, mma.m16n8k32, twice the products of a bfloat16 instruction: weights
// as the A operand (16 outputs), and as B (8 columns) the high and low bytes of u for four tokens. Four codes become an
// A register by one AND, which leaves them where they are in their byte: what comes out is 1, 4, 16 or 64 times too
// large, which the sum over the four instructions of a block undoes by shifts.
//
// A thread block walks over tiles of 16 outputs. Its warps share the inputs, block by block of 128, and add up through
// shared memory once every few tiles. One more warp keeps a ring of slots full with bulk copies.
#pragma once

#include "common.cuh"

namespace mobiquant {

struct DecodeArgs {
  Weights weights;
  Segments segments;
  const __nv_bfloat16* x;  // [tokens, inputs]
  const int32_t* depth;    // [segments, tokens]
  float* out;              // [splits, tokens, 16 * tiles]
  int tokens, inputs, splits;
};

constexpr int kDecodeTokens = 16;
constexpr int kColumnTokens = 4;  // tokens in the 8 columns of a matrix instruction
constexpr int kPartialBytes = 16 * 1024;
constexpr float kLargest = 127 * 257;  // of u: both of its bytes are signed

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

// Sixteen inputs of one token: two chunks of eight, which share the words of one instruction's B operand.
struct StagedInputs {
  int token, block, i, half;
  uint32_t words[8];
};

__device__ inline StagedInputs load_inputs(const DecodeArgs& args, int item, int first_block, int blocks) {
  StagedInputs in{item / (blocks * 8), item / 8 % blocks, item % 8 / 2, item % 2, {}};
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    const int input = (first_block + in.block) * kBlockInputs + 32 * in.i + 16 * s + 8 * in.half;
    if (in.token < args.tokens && input < args.inputs) {
      const uint4 v = *reinterpret_cast<const uint4*>(args.x + static_cast<size_t>(in.token) * args.inputs + input);
      in.words[4 * s] = v.x, in.words[4 * s + 1] = v.y, in.words[4 * s + 2] = v.z, in.words[4 * s + 3] = v.w;
    }
  }
  return in;
}

// Puts u in shared memory, and (X, U) of each token and group. A group's threads are neighbours in a warp.
template <int GB>
__device__ inline void stage_inputs(const DecodeArgs& args, const StagedInputs& in, int item, unsigned char* x,
                                    float2* sums, int blocks) {
  constexpr int kLanes = 8 / GB;
  uint32_t most = 0;  // as bits, so that what is not finite stays so
#pragma unroll
  for (int k = 0; k < 8; ++k) most = max(most, max(in.words[k] << 16 & 0x7fffffffu, in.words[k] & 0x7fff0000u));
#pragma unroll
  for (int step = 1; step < kLanes; step *= 2) most = max(most, __shfl_xor_sync(~0u, most, step));
  const float largest = __uint_as_float(most);
  const float inverse = largest < 1e-30f ? 0.0f : kLargest / largest;
  int sum = 0;
  uint32_t high[4], low[4];  // of four quads: bytes of inputs 2 quad, 2 quad + 1 of both chunks
#pragma unroll
  for (int quad = 0; quad < 4; ++quad) {
    int u[4];
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      u[2 * s] = __float2int_rn(__uint_as_float(in.words[4 * s + quad] << 16) * inverse);
      u[2 * s + 1] = __float2int_rn(__uint_as_float(in.words[4 * s + quad] & 0xffff0000u) * inverse);
    }
    sum += u[0] + u[1] + u[2] + u[3];
    low[quad] = __byte_perm(__byte_perm(u[0], u[1], 0x0040), __byte_perm(u[2], u[3], 0x0040), 0x5410);
#pragma unroll
    for (int k = 0; k < 4; ++k) u[k] += 128;
    high[quad] = __byte_perm(__byte_perm(u[0], u[1], 0x0051), __byte_perm(u[2], u[3], 0x0051), 0x5410);
  }
#pragma unroll
  for (int step = 1; step < kLanes; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
  if (in.token >= args.tokens) return;
  // A lane of the matrix instructions reads 16 bytes: two words each of instructions 0 and 1, or 2 and 3.
  uint32_t* to = reinterpret_cast<uint32_t*>(x + (in.token * blocks + in.block) * (kBlockInputs * 2)) +
                 in.i / 2 * 32 + in.i % 2 * 2 + in.half;
#pragma unroll
  for (int quad = 0; quad < 4; ++quad) {
    to[quad * 4] = high[quad];
    to[quad * 4 + 16] = low[quad];
  }
  if (item % kLanes == 0)
    sums[(in.token * blocks + in.block) * GB + item % 8 / kLanes] =
        make_float2(largest * (1.0f / kLargest), static_cast<float>(sum));
}

// NT columns sets of 4 tokens, GB groups a block, WARPS consumers, CTAS thread blocks a processor.
template <int NT, int GB, int WARPS, int CTAS, int SLOTS>
__global__ void __launch_bounds__(DecodeShape<GB, WARPS, SLOTS>::kThreads, CTAS)
    decode_kernel(const __grid_constant__ DecodeArgs args) {
  using Shape = DecodeShape<GB, WARPS, SLOTS>;
  extern __shared__ __align__(1024) unsigned char shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, quad = lane % 4;
  const int tiles = args.weights.tiles;
  const int split = blockIdx.x % args.splits;
  const int first_block = args.weights.blocks * split / args.splits;
  const int blocks = args.weights.blocks * (split + 1) / args.splits - first_block;
  const int first_tile = blockIdx.x / args.splits, stride = gridDim.x / args.splits;
  int* const depths = reinterpret_cast<int*>(shared);             // [segments, 16]
  int* const deepest = depths + kMaxSegments * kDecodeTokens;     // [segments]
  const uint32_t full = shared_address(shared + Shape::kBarriers), empty = full + SLOTS * 8;
  launch_dependents();
  wait_for_dependencies();

  if (warp == WARPS) {  // the producer
    const size_t layer = *args.weights.layer;
    int of_lane[kMaxSegments];  // all loads before the first use
#pragma unroll
    for (int s = 0; s < kMaxSegments; ++s)
      of_lane[s] = s < args.segments.count && lane < args.tokens ? args.depth[s * args.tokens + lane] : 1;
#pragma unroll
    for (int s = 0; s < kMaxSegments; ++s) {
      if (lane < kDecodeTokens) depths[s * kDecodeTokens + lane] = of_lane[s];
      const int most = __reduce_max_sync(~0u, of_lane[s]);
      if (lane == 0) deepest[s] = most;
    }
    if (lane == 0) {
      for (int s = 0; s < SLOTS; ++s) {
        barrier_init(full + s * 8, 1);
        barrier_init(empty + s * 8, WARPS);
      }
      barrier_init_fence();
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
        for (int slice = 0; slice < slices; ++slice) {
          barrier_wait(empty + slot * 8, parity);
          const int affine_bytes = slice == 0 ? count * GB * 64 : 0;
          const uint32_t to = shared_address(shared + Shape::kRing) + slot * Shape::kSlotBytes;
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
  float2* const sums = reinterpret_cast<float2*>(shared + Shape::sums(args.tokens, blocks));
  for (int item = threadIdx.x; item - lane < args.tokens * blocks * 8; item += 64 * WARPS) {
    const StagedInputs here = load_inputs(args, item, first_block, blocks);
    const StagedInputs next = load_inputs(args, item + 32 * WARPS, first_block, blocks);
    stage_inputs<GB>(args, here, item, x, sums, blocks);
    stage_inputs<GB>(args, next, item + 32 * WARPS, x, sums, blocks);
  }
  sync_threads<Shape::kThreads>(0);

  const uint4* x_row[NT];  // of the token whose columns this lane holds as B, and of the one whose it gets as D
  const float2* sum_row[NT];
#pragma unroll
  for (int n = 0; n < NT; ++n) {
    const int held = min(kColumnTokens * n + row / 2, args.tokens - 1);
    const int got = min(kColumnTokens * n + quad, args.tokens - 1);
    x_row[n] = reinterpret_cast<const uint4*>(x + held * Shape::row_bytes(blocks)) + row % 2 * 4 + quad;
    sum_row[n] = sums + got * blocks * GB;
  }
  const int outputs = tiles * kTileOutputs;
  const int capacity = max(1, kPartialBytes / (WARPS * args.tokens * kTileOutputs * 4));  // tiles added up at once
  float* const partial = reinterpret_cast<float*>(shared + Shape::kPartial);
  const int rounds = (blocks + WARPS - 1) / WARPS;

  int slot = 0, held = 0, buffer = 0;  // tiles waiting to be added up, and where
  uint32_t parity = 0;
  for (int tile = first_tile; tile < tiles; tile += stride) {
    const int segment = segment_of(args.segments, tile), slices = deepest[segment];
    int depth[NT];
    float middle[NT];  // half of the last step: 2^(1 - 2 depth)
    float y[NT][2];
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      depth[n] = depths[segment * kDecodeTokens + min(kColumnTokens * n + quad, args.tokens - 1)];
      middle[n] = __int_as_float((128 - 2 * depth[n]) << 23);
      y[n][0] = y[n][1] = 0.0f;
    }
    for (int r = 0; r < rounds; ++r) {
      const bool active = r * WARPS + warp < blocks;
      const int block = active ? r * WARPS + warp : 0;
      uint4 b[NT][2];
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int h = 0; h < 2; ++h) b[n][h] = x_row[n][block * 16 + h * 8];
      float total[GB][NT][2] = {};
      uint2 affine[GB];
      float step = 1.0f;  // 4^(1 - e)
#pragma unroll 1
      for (int slice = 0; slice < slices; ++slice, step *= 0.25f) {
        barrier_wait(full + slot * 8, parity);
        const unsigned char* at = shared + Shape::kRing + slot * Shape::kSlotBytes;
        const uint4 piece = *reinterpret_cast<const uint4*>(at + warp * kPieceBytes + lane * 16);
        if (slice == 0) {
#pragma unroll
          for (int g = 0; g < GB; ++g)
            affine[g] = *reinterpret_cast<const uint2*>(at + WARPS * kPieceBytes + (warp * GB + g) * 64 + row * 8);
        }
        int acc[4][NT][4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint32_t mask = 0x03030303u << (2 * i);
          const uint32_t a[4] = {piece.x & mask, piece.y & mask, piece.z & mask, piece.w & mask};
#pragma unroll
          for (int n = 0; n < NT; ++n) {
            const uint4& h = b[n][i / 2];
            mma_bytes(acc[i][n], a, i % 2 ? h.z : h.x, i % 2 ? h.w : h.y);
          }
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(empty + slot * 8);
        if (++slot == SLOTS) slot = 0, parity ^= 1;
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          const float used = slice < depth[n] ? step : 0.0f;
#pragma unroll
          for (int g = 0; g < GB; ++g) {
            constexpr int kEach = 4 / GB;  // instructions of a group
            const int last = kEach * (g + 1) - 1;
#pragma unroll
            for (int k = 0; k < 2; ++k) {
              int sum[2];
#pragma unroll
              for (int part = 0; part < 2; ++part) {
                sum[part] = acc[kEach * g][n][2 * k + part];
#pragma unroll
                for (int i = kEach * g + 1; i <= last; ++i) sum[part] = sum[part] * 4 + acc[i][n][2 * k + part];
              }
              const float weight = 1.0f / static_cast<float>(1 << (2 * last));
              total[g][n][k] = fmaf(used * weight, static_cast<float>(sum[0] * 256 + sum[1]), total[g][n][k]);
            }
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
          const float2 of_x = sum_row[n][block * GB + g];
#pragma unroll
          for (int k = 0; k < 2; ++k)
            y[n][k] = fmaf(scale[k] * of_x.x, fmaf(of_x.y, middle[n] - zero[k], total[g][n][k]), y[n][k]);
        }
      }
    }

    // Two buffers, so that one barrier is enough: by the next, everyone has read this one.
    float* const mine = partial + buffer * (kPartialBytes / 4);
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const int token = kColumnTokens * n + quad;
      float* const to = mine + ((held * WARPS + warp) * args.tokens + token) * kTileOutputs + row;
      if (token < args.tokens) to[0] = y[n][0], to[8] = y[n][1];
    }
    ++held;
    if (held < capacity && tile + stride < tiles) continue;
    sync_threads<32 * WARPS>(1);
    const int each = args.tokens * kTileOutputs;
    for (int item = threadIdx.x; item < held * each; item += 32 * WARPS) {
      const int kept = item / each, within = item % each;
      float value = 0.0f;
#pragma unroll
      for (int w = 0; w < WARPS; ++w) value += mine[(kept * WARPS + w) * each + within];
      const int to_tile = tile - (held - 1 - kept) * stride;
      args.out[(static_cast<size_t>(split) * args.tokens + within / kTileOutputs) * outputs + to_tile * kTileOutputs +
               within % kTileOutputs] = value;
    }
    held = 0;
    buffer ^= 1;
  }
}

}  // namespace mobiquant
