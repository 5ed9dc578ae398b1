// One new token of each sequence: rotary embedding, its key and value into the cache, attention over what it holds.
//
// The cache of all layers is read and written in place, [layers, batch, slots, kv heads, head size], by the layer's
// index on the device. A cluster of thread blocks takes one key-value head of one sequence, each block a share of the
// keys, and of it each few neighbouring lanes one key at a time: they keep a running maximum, sum and weighted values
// per query head (arXiv 1805.02867), of which each block finishes a share at the end. Work follows the sequence's length,
// not the cache's. Loops are rolled as in route.cuh.
#pragma once

#include "bf16.cuh"
#include "launch.cuh"

namespace mobiquant {

constexpr int kAttentionThreads = 256;
constexpr int kAttentionWarps = kAttentionThreads / 32;
constexpr int kAhead = 4;  // keys a lane has on their way before it multiplies any
constexpr int kMostRanks = 16;

struct AttentionArgs {
  const float* qkv;         // [parts, batch, (query heads + 2 kv heads) * size], to be summed
  const float* cosine;      // [batch, size / 2]
  const float* sine;        // [batch, size / 2]
  const int32_t* position;  // [batch]
  const int32_t* layer;     // on the device, or null and
  int layer_index;
  __nv_bfloat16* key;    // the cache
  __nv_bfloat16* value;  // the cache
  __nv_bfloat16* out;    // [batch, query heads * size]
  int parts, batch, slots, kv_heads, ranks;
};

// Of one kv head: G query heads of SIZE numbers each.
template <int G, int SIZE>
struct AttentionShared {
  static constexpr int kLanes = SIZE / 8;                         // of one key
  static constexpr int kReaders = kAttentionWarps * 32 / kLanes;  // keys at a time
  float query[G][SIZE];
  float key[SIZE], value[SIZE];  // of the new token
  float2 warp[kAttentionWarps][G];  // maximum and sum
  float warp_mixed[kAttentionWarps][G][SIZE];
  float2 rank[kMostRanks][G];         // of every block of the cluster
  float rank_mixed[G * SIZE];         // [ranks, this block's share of the results]
  uint64_t sent;                      // barrier that counts the bytes of the two
  static_assert(SIZE % (4 * kMostRanks) == 0);  // in fours, each of which one thread sends
  __device__ static int bytes_sent(int ranks) { return G * (SIZE * 4 + ranks * 8); }
};

// The running softmax of G heads over the keys one reader has seen, eight numbers of each value a lane.
template <int G>
struct Softmax {
  float most[G], sum[G], mixed[G][8];

  __device__ __forceinline__ void add(const float (&score)[G], const float (&value)[8]) {
#pragma unroll
    for (int g = 0; g < G; ++g) {
      const float top = fmaxf(most[g], score[g]);
      const float kept = exp2f(most[g] - top), weight = exp2f(score[g] - top);
      most[g] = top;
      sum[g] = fmaf(sum[g], kept, weight);
#pragma unroll
      for (int j = 0; j < 8; ++j) mixed[g][j] = fmaf(mixed[g][j], kept, weight * value[j]);
    }
  }

  // Takes in what the lane `step` away has seen.
  __device__ __forceinline__ void merge_lane(int step) {
#pragma unroll
    for (int g = 0; g < G; ++g) {
      const float other = __shfl_xor_sync(~0u, most[g], step), top = fmaxf(most[g], other);
      const float kept = exp2f(most[g] - top), weight = exp2f(other - top);
      most[g] = top;
      sum[g] = fmaf(sum[g], kept, weight * __shfl_xor_sync(~0u, sum[g], step));
#pragma unroll
      for (int j = 0; j < 8; ++j)
        mixed[g][j] = fmaf(mixed[g][j], kept, weight * __shfl_xor_sync(~0u, mixed[g][j], step));
    }
  }
};

template <int G, int SIZE>
__global__ void __launch_bounds__(kAttentionThreads, G > 4 ? 1 : 2) attention_kernel(const __grid_constant__ AttentionArgs args) {
  using Shared = AttentionShared<G, SIZE>;
  extern __shared__ __align__(16) unsigned char bytes[];
  Shared& shared = *reinterpret_cast<Shared*>(bytes);
  constexpr int kLanes = Shared::kLanes, kReaders = Shared::kReaders;
  const int rank = blockIdx.x % args.ranks, head = blockIdx.x / args.ranks % args.kv_heads;
  const int row = blockIdx.x / args.ranks / args.kv_heads;
  const int lane = threadIdx.x % kLanes, reader = threadIdx.x / kLanes;
  const size_t layer = args.layer ? *args.layer : args.layer_index;
  const int position = args.position[row];
  const uint32_t sent = shared_address(&shared.sent);
  launch_dependents();
  if (threadIdx.x == 0) {
    barrier_init(sent, 1);
    barrier_init_fence();
    barrier_expect(sent, Shared::bytes_sent(args.ranks));
  }
  __syncwarp();
  cluster_arrive();  // waited for before the first store to another block

  const size_t stride = static_cast<size_t>(args.kv_heads) * SIZE;  // between two slots
  const size_t first = (layer * args.batch + row) * args.slots * stride + static_cast<size_t>(head) * SIZE;
  const int held = min(position, args.slots);  // keys before the new token
  const int share = (held + args.ranks - 1) / args.ranks;
  const int begin = min(rank * share, held), end = min(begin + share, held);

  uint4 keys[kAhead], values[kAhead];
  const auto load = [&](int k, int slot) {
    const size_t from = first + min(slot + reader, end - 1) * stride + lane * 8;
    keys[k] = *reinterpret_cast<const uint4*>(args.key + from);
    values[k] = *reinterpret_cast<const uint4*>(args.value + from);
  };
  const auto load_all = [&](int slot) {
#pragma unroll
    for (int k = 0; k < kAhead; ++k) load(k, slot + k * kReaders);
  };
  // The cache, and the rotation further below, are of earlier kernels than this step's first, which is not launched early.
  if (begin < end) load_all(begin);
  for (int slot = begin + kAhead * kReaders + reader; slot < min(end, begin + 2 * kAhead * kReaders); slot += kReaders) {
    prefetch(args.key + first + slot * stride + lane * 8);
    prefetch(args.value + first + slot * stride + lane * 8);
  }

  // The new token's query heads, key and value; the first block also keeps the latter two.
  const int width = args.kv_heads * (G + 2) * SIZE, half = SIZE / 2;
  constexpr int kItems = (G + 2) * SIZE / 2, kRounds = (kItems + kAttentionThreads - 1) / kAttentionThreads;
  int from[kRounds];
  float low[kRounds]{}, high[kRounds]{}, cosine[kRounds], sine[kRounds];
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const int item = min(static_cast<int>(threadIdx.x) + round * kAttentionThreads, kItems - 1);
    const int of = item / half, i = item % half;  // a query head, the key or the value
    from[round] = (row * args.kv_heads * (G + 2) + (of < G ? head * G + of : args.kv_heads * of + head)) * SIZE + i;
    cosine[round] = of <= G ? args.cosine[row * half + i] : 1.0f;
    sine[round] = of <= G ? args.sine[row * half + i] : 0.0f;
  }
  wait_for_previous();
#pragma unroll 1
  for (int p = 0; p < args.parts; ++p) {  // the parts' loop outside, so that all loads of one are on their way at once
    const float* const part = args.qkv + static_cast<size_t>(p) * args.batch * width;
#pragma unroll
    for (int round = 0; round < kRounds; ++round)
      low[round] += part[from[round]], high[round] += part[from[round] + half];
  }
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const int item = threadIdx.x + round * kAttentionThreads, of = item / half, i = item % half;
    if (item >= kItems) break;
    float* const to = of < G ? shared.query[of] : of == G ? shared.key : shared.value;
    const float low_half = round_bf16(low[round]), high_half = round_bf16(high[round]);
    to[i] = round_bf16(low_half * cosine[round] - high_half * sine[round]);
    to[i + half] = round_bf16(high_half * cosine[round] + low_half * sine[round]);
  }
  __syncthreads();
  const bool keeps = rank == 0 && position < args.slots;
  if (keeps) {
#pragma unroll 1
    for (int i = threadIdx.x; i < SIZE; i += kAttentionThreads) {
      args.key[first + position * stride + i] = __float2bfloat16_rn(shared.key[i]);
      args.value[first + position * stride + i] = __float2bfloat16_rn(shared.value[i]);
    }
  }

  float query[G][8];
  const float scale = 1.4426950408889634f * rsqrtf(static_cast<float>(SIZE));  // scores in powers of two
#pragma unroll
  for (int g = 0; g < G; ++g)
#pragma unroll
    for (int j = 0; j < 8; ++j) query[g][j] = shared.query[g][lane * 8 + j] * scale;
  Softmax<G> softmax;
#pragma unroll
  for (int g = 0; g < G; ++g) {
    softmax.most[g] = -1e30f;
    softmax.sum[g] = 0.0f;
#pragma unroll
    for (int j = 0; j < 8; ++j) softmax.mixed[g][j] = 0.0f;
  }
  const auto attend = [&](const float (&key)[8], const float (&value)[8], bool visible) {
    float score[G];
#pragma unroll
    for (int g = 0; g < G; ++g) {
      score[g] = 0.0f;
#pragma unroll
      for (int j = 0; j < 8; ++j) score[g] = fmaf(query[g][j], key[j], score[g]);
#pragma unroll
      for (int step = kLanes / 2; step > 0; step /= 2) score[g] += __shfl_xor_sync(~0u, score[g], step);
    }
    if (visible) softmax.add(score, value);
  };
#pragma unroll 1
  for (int slot = begin; slot < end; slot += kReaders) {
    float key[8], value[8];
    unpack8(key, keys[0]);
    unpack8(value, values[0]);
#pragma unroll
    for (int next = 1; next < kAhead; ++next) keys[next - 1] = keys[next], values[next - 1] = values[next];
    attend(key, value, slot + reader < end);
    if (slot + kAhead * kReaders < end) load(kAhead - 1, slot + kAhead * kReaders);
  }
  if (keeps) {
    float key[8], value[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) key[j] = shared.key[lane * 8 + j], value[j] = shared.value[lane * 8 + j];
    attend(key, value, reader == 0);
  }

#pragma unroll
  for (int step = kLanes; step < 32; step *= 2) softmax.merge_lane(step);
  const int warp = threadIdx.x / 32;
  if (threadIdx.x % 32 < kLanes) {
#pragma unroll
    for (int g = 0; g < G; ++g) {
      if (lane == 0) shared.warp[warp][g] = make_float2(softmax.most[g], softmax.sum[g]);
      float4* const to = reinterpret_cast<float4*>(&shared.warp_mixed[warp][g][lane * 8]);
      to[0] = make_float4(softmax.mixed[g][0], softmax.mixed[g][1], softmax.mixed[g][2], softmax.mixed[g][3]);
      to[1] = make_float4(softmax.mixed[g][4], softmax.mixed[g][5], softmax.mixed[g][6], softmax.mixed[g][7]);
    }
  }
  __syncthreads();
  cluster_wait();
  // Each block of the cluster finishes a share of the results.
  const int part = G * SIZE / args.ranks;
#pragma unroll 1
  for (int item = threadIdx.x * 4; item < G * SIZE; item += kAttentionThreads * 4) {
    const int g = item / SIZE, i = item % SIZE;
    float most = -1e30f, sum = 0.0f, mixed[4] = {};
#pragma unroll
    for (int w = 0; w < kAttentionWarps; ++w) most = fmaxf(most, shared.warp[w][g].x);
#pragma unroll
    for (int w = 0; w < kAttentionWarps; ++w) {
      const float kept = exp2f(shared.warp[w][g].x - most);
      sum = fmaf(kept, shared.warp[w][g].y, sum);
      const float4 of_warp = *reinterpret_cast<const float4*>(&shared.warp_mixed[w][g][i]);
      mixed[0] = fmaf(kept, of_warp.x, mixed[0]), mixed[1] = fmaf(kept, of_warp.y, mixed[1]);
      mixed[2] = fmaf(kept, of_warp.z, mixed[2]), mixed[3] = fmaf(kept, of_warp.w, mixed[3]);
    }
    store_cluster16(shared_address(&shared.rank_mixed[rank * part + item % part]), item / part, mixed, sent);
    if (i / 4 < args.ranks) store_cluster8(shared_address(&shared.rank[rank][g]), i / 4, make_float2(most, sum), sent);
  }
  barrier_wait(sent, 0);  // all threads: a block must not end before what is sent to it is there
#pragma unroll 1
  for (int item = threadIdx.x; item < part; item += kAttentionThreads) {
    const int g = (rank * part + item) / SIZE;
    float most = -1e30f, sum = 0.0f, mixed = 0.0f;
#pragma unroll 4
    for (int r = 0; r < args.ranks; ++r) most = fmaxf(most, shared.rank[r][g].x);
#pragma unroll 4
    for (int r = 0; r < args.ranks; ++r) {
      const float kept = exp2f(shared.rank[r][g].x - most);
      sum = fmaf(kept, shared.rank[r][g].y, sum);
      mixed = fmaf(kept, shared.rank_mixed[r * part + item], mixed);
    }
    const size_t to = (static_cast<size_t>(row) * args.kv_heads + head) * G * SIZE + rank * part + item;
    args.out[to] = __float2bfloat16_rn(mixed / sum);
  }
}

// How many thread blocks share the keys of one head and sequence: two blocks for each processor where there are keys.
inline int attention_ranks(int batch, int kv_heads) {
  int ranks = 1;
  while (ranks < kMostRanks && ranks * batch * kv_heads < 256) ranks *= 2;
  return ranks;
}

template <int G, int SIZE>
cudaError_t launch_attention(cudaStream_t stream, const AttentionArgs& args, bool early) {
  const dim3 grid(args.batch * args.kv_heads * args.ranks);
  return launch(attention_kernel<G, SIZE>, grid, kAttentionThreads, sizeof(AttentionShared<G, SIZE>), stream, args.ranks,
                early, args);
}

template <int SIZE>
cudaError_t launch_attention(cudaStream_t stream, const AttentionArgs& args, bool early, int group) {
  switch (group) {
    case 1: return launch_attention<1, SIZE>(stream, args, early);
    case 2: return launch_attention<2, SIZE>(stream, args, early);
    case 3: return launch_attention<3, SIZE>(stream, args, early);
    case 4: return launch_attention<4, SIZE>(stream, args, early);
    case 8: return launch_attention<8, SIZE>(stream, args, early);
  }
  return cudaErrorNotSupported;
}

// `group` query heads of `size` numbers for each key-value head.
inline cudaError_t launch_attention(cudaStream_t stream, const AttentionArgs& args, bool early, int group, int size) {
  if (size == 64) return launch_attention<64>(stream, args, early, group);
  if (size == 128) return launch_attention<128>(stream, args, early, group);
  return cudaErrorNotSupported;
}

}  // namespace mobiquant
