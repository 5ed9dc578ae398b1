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
// One cluster of thread blocks computes one linear's router, each block a part of the inputs; sums meet in the first
// block's shared memory in a fixed order, so that the same input gives the same depths. The first cluster also writes
// the input. Nothing here is large: what counts is that it is one launch, and that the product's kernel, launched
// behind it, already fetches the first slice meanwhile.
#pragma once

#include "common.cuh"

namespace mobiquant {

enum RouteSource { kPlain = 0, kNormed = 1, kGated = 2 };

struct RouteArgs {
  int source;
  const __nv_bfloat16* x;  // [tokens, inputs]; none where gated
  const float* update;     // [parts, tokens, inputs] where normed, [parts, tokens, 2 inputs] where gated: to be summed
  int parts;
  const float* gain;  // [layers, inputs] where normed
  float eps;
  const __nv_bfloat16* hidden;  // [layers, inputs, linears * width]
  const float* magnitude;       // [layers, linears, width]
  const float* hidden_bias;     // [layers, linears, width]
  const float* output;          // [layers, linears, width, slices - 1]
  const float* output_bias;     // [layers, linears, slices - 1]
  const float* threshold;       // [layers, linears, tokens]
  const int32_t* layer;
  __nv_bfloat16* residual;  // [tokens, inputs] where normed: r
  __nv_bfloat16* input;     // [tokens, inputs] unless plain: u
  int32_t* depth;           // [linears, tokens]
  int tokens, inputs, linears, width;
};

constexpr int kRouteRanks = 16;  // thread blocks of a cluster
constexpr int kRouteThreads = 256;
constexpr int kRouteWarps = kRouteThreads / 32;
constexpr int kRouteRows = 8;  // rows of `hidden` a lane holds at once
constexpr int kScores = kMaxSlices - 1;

// Shared memory: this block's inputs, each warp's sums of hidden units, and in the first block those of all blocks.
struct RouteShape {
  int share;  // inputs of a block
  int x, sums, gathered, squares, total;
  __host__ __device__ RouteShape(int tokens, int inputs, int width) {
    share = (inputs + 8 * kRouteRanks - 1) / (8 * kRouteRanks) * 8;
    x = 0;
    sums = x + tokens * share * 4;
    gathered = sums + kRouteWarps * tokens * width * 4;
    squares = gathered + kRouteRanks * tokens * width * 4;
    total = squares + kRouteRanks * tokens * 8;
  }
};

__device__ __forceinline__ float round_bf16(float value) { return __bfloat162float(__float2bfloat16_rn(value)); }

__device__ __forceinline__ void unpack8(float (&values)[8], uint4 packed) {
  const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    values[2 * k] = __uint_as_float(words[k] << 16);
    values[2 * k + 1] = __uint_as_float(words[k] & 0xffff0000u);
  }
}

__device__ __forceinline__ uint4 pack8(const float (&values)[8]) {
  return make_uint4(pack_bf16(values[0], values[1]), pack_bf16(values[2], values[3]), pack_bf16(values[4], values[5]),
                    pack_bf16(values[6], values[7]));
}

// Eight neighbouring numbers of a sum of parts, rounded as the product's result would be.
__device__ __forceinline__ void sum_parts8(float (&values)[8], const float* from, int parts, size_t stride) {
#pragma unroll
  for (int k = 0; k < 8; ++k) values[k] = 0.0f;
  for (int p = 0; p < parts; ++p) {
    const float4 low = __ldg(reinterpret_cast<const float4*>(from + p * stride));
    const float4 high = __ldg(reinterpret_cast<const float4*>(from + p * stride) + 1);
    const float part[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int k = 0; k < 8; ++k) values[k] += part[k];
  }
#pragma unroll
  for (int k = 0; k < 8; ++k) values[k] = round_bf16(values[k]);
}

// Eight inputs of a token before any norm.
__device__ __forceinline__ void read_source8(float (&values)[8], const RouteArgs& args, int token, int input) {
  const size_t place = static_cast<size_t>(token) * args.inputs + input;
  if (args.source == kGated) {
    const float* from = args.update + static_cast<size_t>(token) * 2 * args.inputs + input;
    const size_t stride = static_cast<size_t>(args.tokens) * 2 * args.inputs;
    float up[8];
    sum_parts8(values, from, args.parts, stride);
    sum_parts8(up, from + args.inputs, args.parts, stride);
#pragma unroll
    for (int k = 0; k < 8; ++k) values[k] = round_bf16(values[k] / (1.0f + __expf(-values[k])) * up[k]);
    return;
  }
  unpack8(values, __ldg(reinterpret_cast<const uint4*>(args.x + place)));
  if (args.source == kNormed) {
    float update[8];
    sum_parts8(update, args.update + place, args.parts, static_cast<size_t>(args.tokens) * args.inputs);
#pragma unroll
    for (int k = 0; k < 8; ++k) values[k] = round_bf16(values[k] + update[k]);
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

__global__ void __launch_bounds__(kRouteThreads) route_kernel(const __grid_constant__ RouteArgs args) {
  extern __shared__ __align__(16) unsigned char shared[];
  launch_dependents();
  const int tokens = args.tokens, inputs = args.inputs, width = args.width;
  const RouteShape shape(tokens, inputs, width);
  float* const x = reinterpret_cast<float*>(shared + shape.x);                // [tokens, share]
  float* const sums = reinterpret_cast<float*>(shared + shape.sums);          // [warps, tokens, width]
  float* const gathered = reinterpret_cast<float*>(shared + shape.gathered);  // [ranks, tokens, width]
  float2* const squares = reinterpret_cast<float2*>(shared + shape.squares);  // [ranks, tokens]
  const int linear = blockIdx.x / kRouteRanks, rank = blockIdx.x % kRouteRanks;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int begin = rank * shape.share, count = max(0, min(shape.share, inputs - begin));
  const size_t layer = *args.layer;
  const bool writes = linear == 0;
  cluster_arrive();  // waited for before the first write to another block

  // A row of `hidden` is read by width / 8 lanes, eight units each.
  const int row_lanes = width / 8, warp_rows = 32 / row_lanes, columns = args.linears * width;
  const __nv_bfloat16* hidden =
      args.hidden + (layer * inputs + begin) * columns + linear * width + lane % row_lanes * 8;
  const int first_row = warp * warp_rows + lane / row_lanes, row_step = kRouteWarps * warp_rows;
  uint4 weights[kRouteRows];
  const auto load_weights = [&](int row) {
#pragma unroll
    for (int k = 0; k < kRouteRows; ++k)
      weights[k] = row + k * row_step < count ? __ldg(reinterpret_cast<const uint4*>(
                                                    hidden + static_cast<size_t>(row + k * row_step) * columns))
                                              : make_uint4(0, 0, 0, 0);
  };
  load_weights(first_row);

  const int eights = shape.share / 8;
  for (int item = threadIdx.x; item < tokens * eights; item += kRouteThreads) {
    const int token = item / eights, at = item % eights * 8;
    float values[8] = {};
    if (at < count) {
      read_source8(values, args, token, begin + at);
      const size_t place = static_cast<size_t>(token) * inputs + begin + at;
      if (writes && args.source == kNormed) *reinterpret_cast<uint4*>(args.residual + place) = pack8(values);
      if (writes && args.source == kGated) *reinterpret_cast<uint4*>(args.input + place) = pack8(values);
    }
    float4* const to = reinterpret_cast<float4*>(x + token * shape.share + at);
    to[0] = make_float4(values[0], values[1], values[2], values[3]);
    to[1] = make_float4(values[4], values[5], values[6], values[7]);
  }
  for (int item = threadIdx.x; item < kRouteWarps * tokens * width; item += kRouteThreads) sums[item] = 0.0f;
  __syncthreads();
  cluster_wait();
  for (int token = warp; token < tokens; token += kRouteWarps) {
    float2 square = make_float2(0.0f, 0.0f);  // before the gain and after
    for (int i = lane; i < count; i += 32) {
      const float value = x[token * shape.share + i];
      const float gained = args.source == kNormed ? value * args.gain[layer * inputs + begin + i] : value;
      x[token * shape.share + i] = gained;
      square.x = fmaf(value, value, square.x);
      square.y = fmaf(gained, gained, square.y);
    }
    square = warp_sum(square);
    if (lane < kRouteRanks) store_cluster8(shared_address(squares + rank * tokens + token), lane, square);
  }
  __syncthreads();

  for (int row = first_row; row - first_row < count; row += kRouteRows * row_step) {
    if (row != first_row) load_weights(row);
    for (int token = 0; token < tokens; ++token) {
      float unit[8] = {};
#pragma unroll
      for (int k = 0; k < kRouteRows; ++k) {
        const int at = min(row + k * row_step, shape.share - 1);  // beyond the inputs the weights are zero
        const float value = x[token * shape.share + at];
        float weight[8];
        unpack8(weight, weights[k]);
#pragma unroll
        for (int j = 0; j < 8; ++j) unit[j] = fmaf(value, weight[j], unit[j]);
      }
      for (int step = row_lanes; step < 32; step *= 2)
#pragma unroll
        for (int j = 0; j < 8; ++j) unit[j] += __shfl_xor_sync(~0u, unit[j], step);
      if (lane < row_lanes) {
        float* const to = sums + (warp * tokens + token) * width + lane * 8;
#pragma unroll
        for (int j = 0; j < 8; ++j) to[j] += unit[j];
      }
    }
  }
  __syncthreads();
  for (int item = threadIdx.x; item < tokens * width; item += kRouteThreads) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kRouteWarps; ++w) sum += sums[w * tokens * width + item];
    store_cluster4(shared_address(gathered + rank * tokens * width + item), 0, sum);
  }
  cluster_arrive();
  cluster_wait();

  for (int token = warp; token < tokens; token += kRouteWarps) {
    float2 square = lane < kRouteRanks ? squares[lane * tokens + token] : make_float2(0.0f, 0.0f);
    square = warp_sum(square);
    const float norm = args.source == kNormed ? rsqrtf(square.x / inputs + args.eps) : 1.0f;
    if (rank == 0) {
      const float magnitude = sqrtf(square.y / inputs * norm * norm + 1e-12f);  // of the input
      const float factor = norm / magnitude, log_magnitude = logf(magnitude);
      const size_t unit = (layer * args.linears + linear) * width;
      float score[kScores] = {};
      for (int j = lane; j < width; j += 32) {
        float sum = 0.0f;
#pragma unroll
        for (int r = 0; r < kRouteRanks; ++r) sum += gathered[(r * tokens + token) * width + j];
        float value = fmaf(sum, factor, fmaf(log_magnitude, args.magnitude[unit + j], args.hidden_bias[unit + j]));
        value = value / (1.0f + __expf(-value));
#pragma unroll
        for (int e = 0; e < kScores; ++e) score[e] = fmaf(value, args.output[(unit + j) * kScores + e], score[e]);
      }
#pragma unroll
      for (int e = 0; e < kScores; ++e)
#pragma unroll
        for (int step = 16; step > 0; step /= 2) score[e] += __shfl_xor_sync(~0u, score[e], step);
      if (lane == 0) {
        const float threshold = args.threshold[(layer * args.linears + linear) * tokens + token];
        const float* bias = args.output_bias + (layer * args.linears + linear) * kScores;
        int depth = 1;
        while (depth < kMaxSlices && score[0] + bias[depth - 1] > threshold) {
          score[0] = score[1], score[1] = score[2];
          ++depth;
        }
        args.depth[linear * tokens + token] = depth;
      }
    }
    if (writes && args.source == kNormed) {
      for (int i = lane * 8; i < count; i += 32 * 8) {
        float values[8];
#pragma unroll
        for (int k = 0; k < 8; ++k) values[k] = x[token * shape.share + i + k] * norm;
        *reinterpret_cast<uint4*>(args.input + static_cast<size_t>(token) * inputs + begin + i) = pack8(values);
      }
    }
  }
}

}  // namespace mobiquant
