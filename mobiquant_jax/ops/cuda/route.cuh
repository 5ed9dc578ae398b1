// Before a decode product: what a site's input is made of, and how many slices each token reads of each of its linears.
//
// The input is one of
//     plain    x
//     normed   rms_norm(r) gain,  r = x + update      the residual stream with what the site before added to it
//     gated    silu(gate) up                          the halves of what the site before computed
// and the router of linear s, on the input u of one token with RMS m,
//     hidden = silu(u H_s / m + log(m) magnitude_s + bias_s),   score_e = hidden . output_se + bias_se
//     depth = 1 + how many of score_1, score_2, ... in a row exceed the linear's threshold.
//
// One cluster of thread blocks computes one linear's router for two tokens, each block a part of the inputs; sums meet
// in the first block's shared memory in a fixed order, so that the same input gives the same depths. The first linear's
// clusters also write the input. Nothing here is large: what counts is that it is one launch, and that the product's
// kernel, launched behind it, meanwhile fetches its first slice and what else it expects to read. Loops are rolled, but
// for the innermost and for loads that should overlap: all kernels of a step share the instruction caches, and what does
// not fit is fetched anew in every layer.
#pragma once

#include "bf16.cuh"
#include "common.cuh"
#include "launch.cuh"

namespace mobiquant {

enum RouteSource { kPlain = 0, kNormed = 1, kGated = 2 };

// Of one layer.
struct RouteArgs {
  int source;
  const __nv_bfloat16* x;  // [tokens, inputs]; none where gated
  const float* update;     // [parts, tokens, inputs] where normed, [parts, tokens, 2 inputs] where gated: to be summed
  int parts;
  const float* gain;  // [inputs] where normed
  float eps;
  const __nv_bfloat16* hidden;  // [inputs, linears * width]
  const float* magnitude;       // [linears, width]
  const float* hidden_bias;     // [linears, width]
  const float* output;          // [linears, width, slices - 1]
  const float* output_bias;     // [linears, slices - 1]
  const float* threshold;       // [linears, tokens]
  __nv_bfloat16* residual;      // [tokens, inputs] where normed: r
  __nv_bfloat16* input;         // [tokens, inputs] unless plain: u
  int32_t* depth;               // [linears, tokens]
  int tokens, inputs, linears, width;
};

constexpr int kRouteRanks = 16;  // thread blocks of a cluster
constexpr int kRouteTokens = 2;  // of a cluster
constexpr int kRouteThreads = 256;
constexpr int kRouteWarps = kRouteThreads / 32;
constexpr int kRouteRows = 8;  // rows of `hidden` a lane holds at once
constexpr int kScores = kMaxSlices - 1;

// Shared memory, in bytes from its start: a barrier that counts what the blocks send each other; this block's inputs and
// gains, each warp's sums of hidden units and the squares of every eight inputs; what all blocks have summed; of the first
// block the rest of the router.
struct RouteShape {
  int share;  // inputs of a block
  int barrier, x, gain, sums, eights, squares, gathered, head, total;
  __host__ __device__ RouteShape(int tokens, int inputs, int width) {
    share = (inputs + 8 * kRouteRanks - 1) / (8 * kRouteRanks) * 8;
    barrier = 0;
    x = 16;
    gain = x + tokens * share * 4;
    sums = gain + share * 4;
    eights = sums + kRouteWarps * tokens * width * 4;
    squares = eights + tokens * share / 8 * 8;
    gathered = (squares + kRouteRanks * tokens * 8 + 15) / 16 * 16;
    head = gathered + kRouteRanks * tokens * width * 4;
    total = head + (width * (2 + kScores) + kScores + tokens) * 4;
  }
};

// What the blocks of a cluster send to one of them: the squares, and to the first its hidden units, four at a time.
__device__ inline int route_bytes_sent(int rank, int tokens, int width) {
  return kRouteRanks * tokens * (rank == 0 ? 8 + width * 4 : 8);
}

// Eight neighbouring numbers of a sum of parts, at each of COUNT places, rounded as the product's result would be.
template <int COUNT>
__device__ __forceinline__ void sum_parts8(float (&values)[COUNT][8], const float* from, int apart, int parts,
                                           size_t stride) {
#pragma unroll
  for (int c = 0; c < COUNT; ++c)
#pragma unroll
    for (int k = 0; k < 8; ++k) values[c][k] = 0.0f;
#pragma unroll 1
  for (int p = 0; p < parts; ++p) {
    float4 part[COUNT][2];  // loads before their use, as far as registers last
#pragma unroll
    for (int i = 0; i < 2 * COUNT; ++i)
      part[i / 2][i % 2] = reinterpret_cast<const float4*>(from + p * stride + i / 2 * apart)[i % 2];
#pragma unroll
    for (int c = 0; c < COUNT; ++c) {
      const float4 &low = part[c][0], &high = part[c][1];
      const float more[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
      for (int k = 0; k < 8; ++k) values[c][k] += more[k];
    }
  }
#pragma unroll
  for (int c = 0; c < COUNT; ++c)
#pragma unroll
    for (int k = 0; k < 8; ++k) values[c][k] = round_bf16(values[c][k]);
}

// Eight inputs of a token before any norm.
__device__ __forceinline__ void read_source8(float (&values)[8], const RouteArgs& args, int token, int input) {
  if (args.source == kGated) {
    const float* from = args.update + static_cast<size_t>(token) * 2 * args.inputs + input;
    float both[2][8];  // gate and up
    sum_parts8(both, from, args.inputs, args.parts, static_cast<size_t>(args.tokens) * 2 * args.inputs);
#pragma unroll
    for (int k = 0; k < 8; ++k)
      values[k] = round_bf16(__fdividef(both[0][k], 1.0f + __expf(-both[0][k])) * both[1][k]);
    return;
  }
  const size_t place = static_cast<size_t>(token) * args.inputs + input;
  const uint4 packed = *reinterpret_cast<const uint4*>(args.x + place);  // on its way with the update
  float update[1][8] = {};
  if (args.source == kNormed)
    sum_parts8(update, args.update + place, 0, args.parts, static_cast<size_t>(args.tokens) * args.inputs);
  unpack8(values, packed);
  if (args.source == kNormed) {
#pragma unroll
    for (int k = 0; k < 8; ++k) values[k] = round_bf16(values[k] + update[0][k]);
  }
}

// Sums over the warp of two numbers.
__device__ __forceinline__ float2 warp_sum(float2 value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    value.x += __shfl_xor_sync(~0u, value.x, step);
    value.y += __shfl_xor_sync(~0u, value.y, step);
  }
  return value;
}

// Few registers, so that the product's kernel and attention fit beside it: one that waits for room starts late.
__global__ void __launch_bounds__(kRouteThreads, 3) route_kernel(const __grid_constant__ RouteArgs args) {
  extern __shared__ __align__(16) unsigned char shared[];
  launch_dependents();
  const int linear = blockIdx.x / kRouteRanks % args.linears, rank = blockIdx.x % kRouteRanks;
  const int first_token = blockIdx.x / kRouteRanks / args.linears * kRouteTokens;
  const int tokens = min(args.tokens - first_token, kRouteTokens), inputs = args.inputs, width = args.width;
  const RouteShape shape(kRouteTokens, inputs, width);
  const auto floats = [&](int at) { return reinterpret_cast<float*>(shared + at); };
  float* const x = floats(shape.x);                // [tokens, share]
  float* const gain = floats(shape.gain);          // [share]
  float* const sums = floats(shape.sums);          // [warps, tokens, width]
  float* const head = floats(shape.head);          // magnitude, bias, output; their bias; thresholds
  float* const gathered = floats(shape.gathered);  // [ranks, tokens, width]
  float2* const eights = reinterpret_cast<float2*>(shared + shape.eights);    // [tokens, share / 8]
  float2* const squares = reinterpret_cast<float2*>(shared + shape.squares);  // [ranks, tokens]
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int begin = rank * shape.share, count = max(0, min(shape.share, inputs - begin));
  const bool writes = linear == 0;
  const uint32_t sent = shared_address(shared + shape.barrier);  // passed when all blocks' sums are here
  if (threadIdx.x == 0) {
    barrier_init(sent, 1);
    barrier_init_fence();
    barrier_expect(sent, route_bytes_sent(rank, tokens, width));
  }
  __syncwarp();
  cluster_arrive();  // waited for before the first store to another block

  // First what does not depend on the kernel before. A row of `hidden` is read by width / 8 lanes, eight units each.
  const int row_lanes = width / 8, warp_rows = 32 / row_lanes, columns = args.linears * width;
  const __nv_bfloat16* hidden =
      args.hidden + static_cast<size_t>(begin) * columns + linear * width + lane % row_lanes * 8;
  const int first_row = warp * warp_rows + lane / row_lanes, row_step = kRouteWarps * warp_rows;
  uint4 packed[kRouteRows];
  const auto load_weights = [&](int row) {
#pragma unroll
    for (int k = 0; k < kRouteRows; ++k)
      packed[k] = row + k * row_step < count ? __ldg(reinterpret_cast<const uint4*>(
                                                   hidden + static_cast<size_t>(row + k * row_step) * columns))
                                             : make_uint4(0, 0, 0, 0);
  };
  load_weights(first_row);
#pragma unroll 1
  for (int row = first_row + kRouteRows * row_step; row < count; row += row_step)
    prefetch(hidden + static_cast<size_t>(row) * columns);
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += kRouteThreads) gain[i] = args.source == kNormed ? args.gain[begin + i] : 1.0f;
  if (rank == 0) {
    const auto keep_head = [&](const float* from, int size, int to) {
#pragma unroll 1
      for (int i = threadIdx.x; i < size; i += kRouteThreads) head[to + i] = from[i];
    };
    keep_head(args.magnitude + linear * width, width, 0);
    keep_head(args.hidden_bias + linear * width, width, width);
    keep_head(args.output + linear * width * kScores, width * kScores, 2 * width);
    keep_head(args.output_bias + linear * kScores, kScores, (2 + kScores) * width);
    keep_head(args.threshold + linear * args.tokens + first_token, tokens, (2 + kScores) * width + kScores);
  }
  __syncthreads();
  wait_for_previous();

  const int share_eights = shape.share / 8;
#pragma unroll 1
  for (int item = threadIdx.x; item < tokens * share_eights; item += kRouteThreads) {
    const int token = item / share_eights, at = item % share_eights * 8;
    float values[8] = {};
    float2 square = make_float2(0.0f, 0.0f);  // before the gain and after
    if (at < count) {
      read_source8(values, args, first_token + token, begin + at);
      const size_t place = static_cast<size_t>(first_token + token) * inputs + begin + at;
      if (writes && args.source == kNormed) *reinterpret_cast<uint4*>(args.residual + place) = pack8(values);
      if (writes && args.source == kGated) *reinterpret_cast<uint4*>(args.input + place) = pack8(values);
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        square.x = fmaf(values[k], values[k], square.x);
        values[k] *= gain[at + k];
        square.y = fmaf(values[k], values[k], square.y);
      }
    }
    float4* const to = reinterpret_cast<float4*>(x + token * shape.share + at);
    to[0] = make_float4(values[0], values[1], values[2], values[3]);
    to[1] = make_float4(values[4], values[5], values[6], values[7]);
    eights[item] = square;
  }
  __syncthreads();
  cluster_wait();
#pragma unroll 1
  for (int token = warp; token < tokens; token += kRouteWarps) {
    float2 square = make_float2(0.0f, 0.0f);
#pragma unroll 1
    for (int i = lane; i < share_eights; i += 32) {
      const float2 more = eights[token * share_eights + i];
      square.x += more.x, square.y += more.y;
    }
    square = warp_sum(square);
    if (lane < kRouteRanks) store_cluster8(shared_address(squares + rank * tokens + token), lane, square, sent);
  }

#pragma unroll 1
  for (int row = first_row; row - first_row < count; row += kRouteRows * row_step) {
    if (row != first_row) load_weights(row);
#pragma unroll 1
    for (int token = 0; token < tokens; ++token) {
      float unit[8] = {};
#pragma unroll
      for (int k = 0; k < kRouteRows; ++k) {
        const float value = x[token * shape.share + min(row + k * row_step, shape.share - 1)];  // beyond: zero weights
        float weight[8];
        unpack8(weight, packed[k]);
#pragma unroll
        for (int j = 0; j < 8; ++j) unit[j] = fmaf(value, weight[j], unit[j]);
      }
#pragma unroll 1
      for (int step = row_lanes; step < 32; step *= 2)
#pragma unroll
        for (int j = 0; j < 8; ++j) unit[j] += __shfl_xor_sync(~0u, unit[j], step);
      if (lane < row_lanes) {
        float* const to = sums + (warp * tokens + token) * width + lane * 8;
#pragma unroll
        for (int j = 0; j < 8; ++j) to[j] = row == first_row ? unit[j] : to[j] + unit[j];
      }
    }
  }
  __syncthreads();
#pragma unroll 1
  for (int item = threadIdx.x * 4; item < tokens * width; item += kRouteThreads * 4) {
    float sum[4] = {};
    if (count > 0) {
#pragma unroll
      for (int w = 0; w < kRouteWarps; ++w) {
        const float4 more = *reinterpret_cast<const float4*>(sums + w * tokens * width + item);
        sum[0] += more.x, sum[1] += more.y, sum[2] += more.z, sum[3] += more.w;
      }
    }
    store_cluster16(shared_address(gathered + rank * tokens * width + item), 0, sum, sent);
  }
  barrier_wait(sent, 0);  // all threads: a block must not end before what is sent to it is there

#pragma unroll 1
  for (int token = warp; token < tokens; token += kRouteWarps) {
    const float2 square = warp_sum(lane < kRouteRanks ? squares[lane * tokens + token] : make_float2(0.0f, 0.0f));
    const float norm = args.source == kNormed ? rsqrtf(square.x / inputs + args.eps) : 1.0f;
    if (rank == 0) {
      const float magnitude = sqrtf(square.y / inputs * norm * norm + 1e-12f);  // of the input
      const float factor = norm / magnitude, log_magnitude = logf(magnitude);
      float score[kScores] = {};
#pragma unroll 1
      for (int j = lane; j < width; j += 32) {
        float sum = 0.0f;
#pragma unroll
        for (int r = 0; r < kRouteRanks; ++r) sum += gathered[(r * tokens + token) * width + j];
        float value = fmaf(sum, factor, fmaf(log_magnitude, head[j], head[width + j]));
        value = __fdividef(value, 1.0f + __expf(-value));
#pragma unroll
        for (int e = 0; e < kScores; ++e) score[e] = fmaf(value, head[2 * width + j * kScores + e], score[e]);
      }
#pragma unroll
      for (int e = 0; e < kScores; ++e)
#pragma unroll
        for (int step = 16; step > 0; step /= 2) score[e] += __shfl_xor_sync(~0u, score[e], step);
      if (lane == 0) {
        const float* const bias = head + (2 + kScores) * width;
        const float threshold = bias[kScores + token];
        int depth = 1;
        bool deeper = true;
#pragma unroll
        for (int e = 0; e < kScores; ++e) {
          deeper = deeper && score[e] + bias[e] > threshold;
          depth += deeper;
        }
        args.depth[linear * args.tokens + first_token + token] = depth;
      }
    }
    if (writes && args.source == kNormed) {
#pragma unroll 1
      for (int i = lane * 8; i < count; i += 32 * 8) {
        float values[8];
#pragma unroll
        for (int k = 0; k < 8; ++k) values[k] = x[token * shape.share + i + k] * norm;
        // A plain store of these is compiled to four of 4 bytes.
        __stcg(reinterpret_cast<uint4*>(args.input + static_cast<size_t>(first_token + token) * inputs + begin + i),
               pack8(values));
      }
    }
  }
}

inline cudaError_t launch_route(cudaStream_t stream, const RouteArgs& args, bool early) {
  const RouteShape shape(kRouteTokens, args.inputs, args.width);
  const dim3 grid((args.tokens + kRouteTokens - 1) / kRouteTokens * args.linears * kRouteRanks);
  return launch(route_kernel, grid, kRouteThreads, shape.total, stream, kRouteRanks, early, args);
}

}  // namespace mobiquant
