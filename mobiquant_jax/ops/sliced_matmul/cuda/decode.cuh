// The decode kernel: 1 to 16 tokens against a sliced weight, each token and segment of outputs at its own depth.
//
// Every slice is its own set of matrix instructions, weights as the A operand (16 outputs), tokens as B (n = 8 each):
//     y[t] = sum_g s_g ( sum_{e <= d(t)} 4^(1-e) q_e . x_t  +  S_t (2^(1-2 d(t)) - z_g / 64) ),   S_t = sum of x_t over g
// A code becomes a bfloat16 by OR-ing it into the mantissa of a power of two, two codes an instruction: bits p, p+1 under
// exponent 2^(7-p-2(e-1)) give magic + 4^(1-e) q exactly. What the magics add, 4^(1-e) M_t with M_t = sum of magic . x_t,
// is known beforehand and enters as the accumulators' start.
//
// A thread block walks over tiles of 16 outputs; its warps share the inputs, block by block of 128, and add up through
// shared memory. Each lane copies its own 16 bytes a piece into its own ring slots, so the ring needs no barrier.
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

// Position of instruction j's code in a mantissa, and how far the word is shifted down for it.
__host__ __device__ constexpr int mantissa_position(int j) { return 2 * (j % 3); }
__host__ __device__ constexpr int word_shift(int j) { return 6 * (j / 3); }
__host__ __device__ constexpr float magic(int j) { return static_cast<float>(1 << (7 - mantissa_position(j))); }
// Two bfloat16 of value magic(j): exponent 127 + 7 - position, mantissa 0.
__host__ __device__ constexpr uint32_t magic_bits(int j) {
  return static_cast<uint32_t>(134 - mantissa_position(j)) * 0x00800080u;
}

// One slice of one (tile, block) for 8 NT tokens. acc[c] are CH chains of accumulators, instruction j adds to chain
// j * CH / 8 where CH groups share the block, or alternates between two to shorten the dependence.
template <int NT, int CH, bool kAlternate>
__device__ inline void multiply_piece(float (&acc)[CH][NT][4], uint4 piece, int slice, const uint32_t (&b)[NT][16]) {
  uint32_t w[4] = {piece.x, piece.y, piece.z, piece.w};
  const uint32_t lower = slice * 0x01000100u;  // exponents two lower for each slice
  const uint32_t magics[3] = {magic_bits(0) - lower, magic_bits(1) - lower, magic_bits(2) - lower};
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    uint32_t a[4];
#pragma unroll
    for (int c = 0; c < 4; ++c)
      a[c] = ((w[c] >> word_shift(j)) & (0x00030003u << mantissa_position(j))) | magics[j % 3];
    const int chain = kAlternate ? j % CH : j * CH / 8;
#pragma unroll
    for (int n = 0; n < NT; ++n) mma_bf16(acc[chain][n], a, b[n][2 * j], b[n][2 * j + 1]);
  }
}

enum class Pipe { kAsync, kBulk };

template <int NT, int GB, int WARPS, int SLOTS, Pipe PIPE>
struct DecodeShape {
  static constexpr int kThreads = 32 * (WARPS + (PIPE == Pipe::kBulk));
  static constexpr int kSlotBytes = PIPE == Pipe::kBulk ? WARPS * (kPieceBytes + GB * 64) : kPieceBytes + GB * 256;
  static constexpr int kRingBytes = SLOTS * kSlotBytes * (PIPE == Pipe::kBulk ? 1 : WARPS);
  static constexpr int kPartialFloats = NT * 8 * 20;  // rows of 16 padded to 20: no bank conflicts
  // Bytes from the start of shared memory.
  static constexpr int kBarriers = kMaxSegments * 17 * 4;
  static constexpr int kRing = (kBarriers + 2 * SLOTS * 8 + 127) / 128 * 128;
  static constexpr int kPartial = kRing + kRingBytes;
  static constexpr int kX = kPartial + 2 * WARPS * kPartialFloats * 4;
  // Rows of an odd number of half bank rows: the loads of two tokens do not collide.
  __host__ __device__ static int row_bytes(int blocks) { return blocks * kBlockInputs * 2 + 64; }
  __host__ __device__ static int sums(int tokens, int blocks) { return kX + tokens * row_bytes(blocks); }
  __host__ __device__ static int total(int tokens, int blocks) {
    return sums(tokens, blocks) + blocks * GB * NT * 4 * 16;
  }
};

// Stages x in shared memory with the sums (M_a, M_b, S_a, S_b) of each group and pair of tokens.
template <int NT, int GB, int THREADS>
__device__ inline void stage_x(const DecodeArgs& args, unsigned char* x, float* sums, int row_bytes, int first_block,
                               int blocks) {
  constexpr int kLanes = 16 / GB;  // threads of 8 inputs that make a group
  const int per_row = blocks * (kBlockInputs / 8);
  const int total = args.tokens * per_row;
  for (int base = threadIdx.x / 32 * 32; base < total; base += THREADS) {
    const int i = base + threadIdx.x % 32;
    const int token = i / per_row, chunk = i % per_row;  // 8 inputs
    const int input = first_block * kBlockInputs + chunk * 8;
    uint4 values = make_uint4(0, 0, 0, 0);
    if (i < total && input < args.inputs)
      values = __ldg(reinterpret_cast<const uint4*>(args.x + static_cast<size_t>(token) * args.inputs + input));
    const uint32_t words[4] = {values.x, values.y, values.z, values.w};
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < 4; ++k) sum += __uint_as_float(words[k] << 16) + __uint_as_float(words[k] & 0xffff0000u);
    const int j = chunk % 16 / 2;  // the instruction that reads these inputs
    float weighted = sum * (j % 3 == 0 ? magic(0) : j % 3 == 1 ? magic(1) : magic(2));
#pragma unroll
    for (int step = 1; step < kLanes; step *= 2) {
      sum += __shfl_xor_sync(~0u, sum, step);
      weighted += __shfl_xor_sync(~0u, weighted, step);
    }
    if (i >= total) continue;
    // Operand order: 16 bytes of a lane are b0 and b1 of two instructions.
    uint32_t* to = reinterpret_cast<uint32_t*>(x + token * row_bytes + chunk / 4 * 64) + chunk % 4;
#pragma unroll
    for (int k = 0; k < 4; ++k) to[4 * k] = words[k];
    if (chunk % kLanes == 0) {
      float* pair = sums + (chunk / kLanes * NT * 4 + token / 2) * 4 + token % 2;
      pair[0] = weighted;
      pair[2] = sum;
    }
  }
}

template <int NT, int GB, int WARPS, int CTAS, int SLOTS, Pipe PIPE>
__global__ void __launch_bounds__(DecodeShape<NT, GB, WARPS, SLOTS, PIPE>::kThreads, CTAS)
    decode_kernel(const __grid_constant__ DecodeArgs args) {
  using Shape = DecodeShape<NT, GB, WARPS, SLOTS, PIPE>;
  constexpr int CH = GB == 1 ? 2 : GB;
  extern __shared__ __align__(1024) unsigned char shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, quad = lane % 4;
  const int tiles = args.weights.tiles;
  const int split = blockIdx.x % args.splits;
  const int first_block = args.weights.blocks * split / args.splits;
  const int blocks = args.weights.blocks * (split + 1) / args.splits - first_block;
  const int first_tile = blockIdx.x / args.splits, stride = gridDim.x / args.splits;
  const size_t layer = *args.weights.layer;

  int* const depths = reinterpret_cast<int*>(shared);  // [segments, 16]
  int* const deepest = depths + kMaxSegments * 16;     // [segments]
  if (warp < args.segments.count) {
    const int d = lane < args.tokens ? args.depth[warp * args.tokens + lane] : 1;
    if (lane < 16) depths[warp * 16 + lane] = d;
    const int most = __reduce_max_sync(~0u, d);
    if (lane == 0) deepest[warp] = most;
  }
  const uint32_t full = shared_address(shared + Shape::kBarriers), empty = full + SLOTS * 8;
  if (PIPE == Pipe::kBulk && threadIdx.x == 32 * WARPS) {
    for (int s = 0; s < SLOTS; ++s) {
      barrier_init(full + s * 8, 1);
      barrier_init(empty + s * 8, WARPS);
    }
    barrier_init_fence();
  }
  __syncthreads();
  const auto slices_of = [&](int tile) { return tile < tiles ? deepest[segment_of(args.segments, tile)] : 0; };

  if constexpr (PIPE == Pipe::kBulk) {
    if (warp == WARPS) {  // the producer
      if (lane == 0) {
        const uint64_t policy = evict_first();
        int slot = 0, round = 0;
        for (int tile = first_tile; tile < tiles; tile += stride) {
          const int slices = slices_of(tile);
          for (int block = 0; block < blocks; block += WARPS) {
            const int count = min(WARPS, blocks - block);
            const size_t piece = (layer * tiles + tile) * args.weights.blocks + first_block + block;
            for (int slice = 0; slice < slices; ++slice) {
              if (round > 0) barrier_wait(empty + slot * 8, (round - 1) & 1);
              const int affine_bytes = slice == 0 ? count * GB * 64 : 0;
              barrier_expect(full + slot * 8, count * kPieceBytes + affine_bytes);
              const uint32_t to = shared_address(shared + Shape::kRing) + slot * Shape::kSlotBytes;
              copy_bulk(to, args.weights.planes[slice] + piece * kPieceBytes, count * kPieceBytes, full + slot * 8,
                        policy);
              if (slice == 0)
                copy_bulk(to + WARPS * kPieceBytes, args.weights.affine + piece * GB * 8, affine_bytes,
                          full + slot * 8, policy);
              if (++slot == SLOTS) slot = 0, ++round;
            }
          }
        }
      }
      return;
    }
  }

  // The asynchronous ring: each lane fills its own 16 bytes of its warp's slots, SLOTS - 1 pieces ahead.
  const uint32_t ring = shared_address(shared + Shape::kRing) + (PIPE == Pipe::kBulk ? 0 : warp * SLOTS * Shape::kSlotBytes);
  struct {
    int tile, block, slice, slices, slot;
  } ahead{warp < blocks ? first_tile : tiles, warp, 0, slices_of(first_tile), 0};
  const auto prefetch = [&]() {
    if constexpr (PIPE == Pipe::kAsync) {
      if (ahead.tile < tiles) {
        const size_t piece = (layer * tiles + ahead.tile) * args.weights.blocks + first_block + ahead.block;
        const uint32_t to = ring + ahead.slot * Shape::kSlotBytes;
        copy_async16(to + lane * 16, args.weights.planes[ahead.slice] + piece * kPieceBytes + lane * 16);
        if (ahead.slice == 0) {
#pragma unroll
          for (int g = 0; g < GB; ++g)
            copy_async8(to + kPieceBytes + g * 256 + lane * 8, args.weights.affine + (piece * GB + g) * 8 + row);
        }
        if (++ahead.slice == ahead.slices) {
          ahead.slice = 0;
          if ((ahead.block += WARPS) >= blocks) {
            ahead.block = warp;
            ahead.tile += stride;
            ahead.slices = slices_of(ahead.tile);
          }
        }
        if (++ahead.slot == SLOTS) ahead.slot = 0;
      }
      copy_async_commit();
    }
  };
  if constexpr (PIPE == Pipe::kAsync) {
    for (int s = 0; s < SLOTS - 1; ++s) prefetch();
  }

  unsigned char* const x = shared + Shape::kX;
  const int row_bytes = Shape::row_bytes(blocks);
  const float4* const sums = reinterpret_cast<const float4*>(shared + Shape::sums(args.tokens, blocks));
  stage_x<NT, GB, 32 * WARPS>(args, x, const_cast<float*>(&sums->x), row_bytes, first_block, blocks);
  sync_threads<32 * WARPS>();

  uint32_t x_row[NT];  // of the token whose B operands this lane holds
#pragma unroll
  for (int n = 0; n < NT; ++n)
    x_row[n] = shared_address(x) + min(8 * n + row, args.tokens - 1) * row_bytes + quad * 16;

  int slot = 0;
  uint32_t parity = 0;
  int buffer = 0;
  for (int tile = first_tile; tile < tiles; tile += stride, buffer ^= 1) {
    const int segment = segment_of(args.segments, tile), slices = deepest[segment];
    int depth[NT][2];
    float share[NT][2], middle[NT][2];  // sum of 4^(1-e) up to the depth; half of the last step
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        depth[n][c] = depths[segment * 16 + 8 * n + 2 * quad + c];
        middle[n][c] = __int_as_float((128 - 2 * depth[n][c]) << 23);  // 2^(1 - 2 depth)
        share[n][c] = (4.0f - 2.0f * middle[n][c]) * (1.0f / 3.0f);
      }
    float y[NT][4] = {};
    const int rounds = PIPE == Pipe::kBulk ? (blocks + WARPS - 1) / WARPS : (blocks - warp + WARPS - 1) / WARPS;
    for (int r = 0; r < rounds; ++r) {
      const int block = min(r * WARPS + warp, blocks - 1);
      const bool active = PIPE == Pipe::kAsync || r * WARPS + warp < blocks;
      uint32_t b[NT][16];
      float4 sum[GB][NT];
      float total[GB][NT][4];
      uint2 affine[GB];
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          *reinterpret_cast<uint4*>(&b[n][4 * i]) = load_shared16(x_row[n] + block * (kBlockInputs * 2) + i * 64);
#pragma unroll
      for (int g = 0; g < GB; ++g)
#pragma unroll
        for (int n = 0; n < NT; ++n) sum[g][n] = sums[((block * GB + g) * NT + n) * 4 + quad];

      float start[GB][NT][2];  // what the accumulators of slice 1 begin with
#pragma unroll
      for (int g = 0; g < GB; ++g)
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          start[g][n][0] = middle[n][0] * sum[g][n].z - share[n][0] * sum[g][n].x;
          start[g][n][1] = middle[n][1] * sum[g][n].w - share[n][1] * sum[g][n].y;
#pragma unroll
          for (int c = 0; c < 4; ++c) total[g][n][c] = 0.0f;
        }
#pragma unroll 1
      for (int slice = 0; slice < slices; ++slice) {
        const uint32_t at = ring + slot * Shape::kSlotBytes;
        if constexpr (PIPE == Pipe::kAsync)
          copy_async_wait<SLOTS - 2>();
        else
          barrier_wait(full + slot * 8, parity);
        const uint4 piece = load_shared16(at + (PIPE == Pipe::kBulk ? warp * kPieceBytes : 0) + lane * 16);
        if (slice == 0) {
#pragma unroll
          for (int g = 0; g < GB; ++g)
            affine[g] = load_shared8(PIPE == Pipe::kAsync
                                         ? at + kPieceBytes + g * 256 + lane * 8
                                         : at + WARPS * kPieceBytes + (warp * GB + g) * 64 + row * 8);
        }
        if constexpr (PIPE == Pipe::kAsync) {
          if (++slot == SLOTS) slot = 0;
          prefetch();
        } else {
          __syncwarp();
          if (lane == 0) barrier_arrive(empty + slot * 8);
          if (++slot == SLOTS) slot = 0, parity ^= 1;
        }
        if (!active) continue;
        float acc[CH][NT][4];
#pragma unroll
        for (int h = 0; h < CH; ++h)
#pragma unroll
          for (int n = 0; n < NT; ++n)
#pragma unroll
            for (int c = 0; c < 4; ++c) acc[h][n][c] = h < GB ? start[h % GB][n][c % 2] : 0.0f;
        multiply_piece<NT, CH, GB == 1>(acc, piece, slice, b);
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          const float used[2] = {depth[n][0] > slice ? 1.0f : 0.0f, depth[n][1] > slice ? 1.0f : 0.0f};
#pragma unroll
          for (int g = 0; g < GB; ++g) {
#pragma unroll
            for (int c = 0; c < 4; ++c) {
              const float value = GB == 1 ? acc[0][n][c] + acc[CH - 1][n][c] : acc[g][n][c];
              total[g][n][c] = fmaf(used[c % 2], value, total[g][n][c]);
            }
            start[g][n][0] = start[g][n][1] = 0.0f;
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
        for (int n = 0; n < NT; ++n)
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            const float plain = c % 2 ? sum[g][n].w : sum[g][n].z;
            y[n][c] = fmaf(scale[c / 2], fmaf(-zero[c / 2], plain, total[g][n][c]), y[n][c]);
          }
      }
    }

    // Add up over the warps; two buffers, so that one barrier a tile is enough.
    float* const partial = reinterpret_cast<float*>(shared + Shape::kPartial) + buffer * WARPS * Shape::kPartialFloats;
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int token = 8 * n + 2 * quad + c % 2;
        if (token < args.tokens) partial[warp * Shape::kPartialFloats + token * 20 + row + 8 * (c / 2)] = y[n][c];
      }
    sync_threads<32 * WARPS>();
    const int token = threadIdx.x / 16, output = threadIdx.x % 16;
    if (token < args.tokens) {
      float value = 0.0f;
#pragma unroll
      for (int w = 0; w < WARPS; ++w) value += partial[w * Shape::kPartialFloats + token * 20 + output];
      args.out[(static_cast<size_t>(split) * args.tokens + token) * (tiles * kTileOutputs) + tile * kTileOutputs + output] = value;
    }
  }
}

}  // namespace mobiquant
