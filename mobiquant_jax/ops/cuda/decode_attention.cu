// One new token of each sequence: rotary embedding, its key and value into the cache, attention over what it holds.
//
// The cache of all layers is read and written in place, [layers, batch, slots, kv heads, head size], by the layer's
// index on the device. A cluster of thread blocks takes one key-value head of one sequence, each block a share of the
// keys, and of it each few neighbouring lanes one key at a time: they keep a running maximum, sum and weighted values
// per query head (arXiv 1805.02867), which meet in the first block at the end. Work follows the sequence's length, not
// the cache's.
#include <algorithm>
#include <string>

#include "ptx.cuh"
#include "xla/ffi/api/ffi.h"

#include <cuda_bf16.h>

namespace ffi = xla::ffi;

namespace mobiquant {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kAhead = 4;  // keys a lane has on their way
constexpr int kMostRanks = 16;

struct AttentionArgs {
  const float* qkv;         // [parts, batch, (query heads + 2 kv heads) * size], to be summed
  const float* cosine;      // [batch, size / 2]
  const float* sine;        // [batch, size / 2]
  const int32_t* position;  // [batch]
  const int32_t* layer;
  __nv_bfloat16* key;    // the cache
  __nv_bfloat16* value;  // the cache
  __nv_bfloat16* out;    // [batch, query heads * size]
  int parts, batch, slots, kv_heads, ranks;
};

// Of one kv head: G query heads of SIZE numbers each.
template <int G, int SIZE>
struct AttentionShared {
  static constexpr int kLanes = SIZE / 8;                // of one key
  static constexpr int kReaders = kWarps * 32 / kLanes;  // keys at a time
  float query[G][SIZE];
  float key[SIZE], value[SIZE];  // of the new token
  float most[kReaders][G], sum[kReaders][G];
  float mixed[kReaders][G][SIZE];
  float rank_most[kMostRanks][G], rank_sum[kMostRanks][G];
  float rank_mixed[kMostRanks][G][SIZE];
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
};

template <int G, int SIZE>
__global__ void __launch_bounds__(kThreads) attention_kernel(const __grid_constant__ AttentionArgs args) {
  using Shared = AttentionShared<G, SIZE>;
  extern __shared__ __align__(16) unsigned char bytes[];
  Shared& shared = *reinterpret_cast<Shared*>(bytes);
  constexpr int kLanes = Shared::kLanes, kReaders = Shared::kReaders;
  const int rank = blockIdx.x % args.ranks, head = blockIdx.x / args.ranks % args.kv_heads;
  const int row = blockIdx.x / args.ranks / args.kv_heads;
  const int lane = threadIdx.x % kLanes, reader = threadIdx.x / kLanes;
  const size_t layer = *args.layer;
  const int position = args.position[row];
  cluster_arrive();  // waited for before the first write to another block

  const size_t stride = static_cast<size_t>(args.kv_heads) * SIZE;  // between two slots
  const size_t first = (layer * args.batch + row) * args.slots * stride + static_cast<size_t>(head) * SIZE;
  const int held = min(position, args.slots);  // keys before the new token
  const int share = (held + args.ranks - 1) / args.ranks;
  const int begin = min(rank * share, held), end = min(begin + share, held);

  // The new token's query heads, key and value; the first block also keeps the latter two.
  const int width = args.kv_heads * (G + 2) * SIZE, half = SIZE / 2;
  const float* const mine = args.qkv + static_cast<size_t>(row) * width;
  const auto read = [&](int from) {
    float value = 0.0f;
    for (int p = 0; p < args.parts; ++p) value += mine[static_cast<size_t>(p) * args.batch * width + from];
    return round_bf16(value);
  };
  for (int item = threadIdx.x; item < (G + 1) * half; item += kThreads) {
    const int of = item / half, i = item % half;  // a query head, or the key
    const int from = (of < G ? head * G + of : args.kv_heads * G + head) * SIZE + i;
    const float low = read(from), high = read(from + half);
    const float cosine = args.cosine[row * half + i], sine = args.sine[row * half + i];
    float* const to = of < G ? shared.query[of] : shared.key;
    to[i] = round_bf16(low * cosine - high * sine);
    to[i + half] = round_bf16(high * cosine + low * sine);
  }
  for (int i = threadIdx.x; i < SIZE; i += kThreads) shared.value[i] = read((args.kv_heads * (G + 1) + head) * SIZE + i);
  __syncthreads();
  const bool keeps = rank == 0 && position < args.slots;
  if (keeps) {
    for (int i = threadIdx.x; i < SIZE; i += kThreads) {
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
  for (int slot = begin; slot < end; slot += kReaders * kAhead) {
    uint4 keys[kAhead], values[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const size_t from = first + min(slot + k * kReaders + reader, end - 1) * stride + lane * 8;
      keys[k] = *reinterpret_cast<const uint4*>(args.key + from);
      values[k] = *reinterpret_cast<const uint4*>(args.value + from);
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      float key[8], value[8];
      unpack8(key, keys[k]);
      unpack8(value, values[k]);
      attend(key, value, slot + k * kReaders + reader < end);
    }
  }
  if (keeps) {
    float key[8], value[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) key[j] = shared.key[lane * 8 + j], value[j] = shared.value[lane * 8 + j];
    attend(key, value, reader == 0);
  }

#pragma unroll
  for (int g = 0; g < G; ++g) {
    if (lane == 0) shared.most[reader][g] = softmax.most[g], shared.sum[reader][g] = softmax.sum[g];
#pragma unroll
    for (int j = 0; j < 8; ++j) shared.mixed[reader][g][lane * 8 + j] = softmax.mixed[g][j];
  }
  __syncthreads();
  cluster_wait();
  for (int item = threadIdx.x; item < G * SIZE; item += kThreads) {
    const int g = item / SIZE, i = item % SIZE;
    float most = -1e30f, sum = 0.0f, mixed = 0.0f;
    for (int r = 0; r < kReaders; ++r) most = fmaxf(most, shared.most[r][g]);
    for (int r = 0; r < kReaders; ++r) {
      const float kept = exp2f(shared.most[r][g] - most);
      sum = fmaf(kept, shared.sum[r][g], sum);
      mixed = fmaf(kept, shared.mixed[r][g][i], mixed);
    }
    store_cluster4(shared_address(&shared.rank_mixed[rank][g][i]), 0, mixed);
    if (i == 0) {
      store_cluster4(shared_address(&shared.rank_most[rank][g]), 0, most);
      store_cluster4(shared_address(&shared.rank_sum[rank][g]), 0, sum);
    }
  }
  cluster_arrive();
  cluster_wait();
  if (rank > 0) return;
  for (int item = threadIdx.x; item < G * SIZE; item += kThreads) {
    const int g = item / SIZE, i = item % SIZE;
    float most = -1e30f, sum = 0.0f, mixed = 0.0f;
    for (int r = 0; r < args.ranks; ++r) most = fmaxf(most, shared.rank_most[r][g]);
    for (int r = 0; r < args.ranks; ++r) {
      const float kept = exp2f(shared.rank_most[r][g] - most);
      sum = fmaf(kept, shared.rank_sum[r][g], sum);
      mixed = fmaf(kept, shared.rank_mixed[r][g][i], mixed);
    }
    args.out[(static_cast<size_t>(row) * args.kv_heads * G + head * G + g) * SIZE + i] =
        __float2bfloat16_rn(mixed / sum);
  }
}

namespace {

ffi::Error check(cudaError_t error) {
  if (error == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(std::string("decode_attention: ") + cudaGetErrorString(error));
}

template <int G, int SIZE>
ffi::Error launch(cudaStream_t stream, const AttentionArgs& args) {
  const auto kernel = attention_kernel<G, SIZE>;
  constexpr int kShared = sizeof(AttentionShared<G, SIZE>);
  if (cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared))
    return check(error);
  if (cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1))
    return check(error);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(args.ranks), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(args.batch * args.kv_heads * args.ranks);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kShared;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return check(cudaLaunchKernelEx(&config, kernel, args));
}

template <int SIZE>
ffi::Error launch(cudaStream_t stream, const AttentionArgs& args, int group) {
  switch (group) {
    case 1: return launch<1, SIZE>(stream, args);
    case 2: return launch<2, SIZE>(stream, args);
    case 3: return launch<3, SIZE>(stream, args);
    case 4: return launch<4, SIZE>(stream, args);
    case 8: return launch<8, SIZE>(stream, args);
  }
  return ffi::Error::InvalidArgument("decode_attention: " + std::to_string(group) + " query heads a key-value head");
}

using Floats = ffi::Buffer<ffi::F32>;
using Halves = ffi::Buffer<ffi::BF16>;
using Integers = ffi::Buffer<ffi::S32>;

ffi::Error attention(cudaStream_t stream, Floats qkv, Floats cosine, Floats sine, Integers position, Integers layer,
                     Halves key, Halves value, ffi::Result<Halves> key_out, ffi::Result<Halves> value_out,
                     ffi::Result<Halves> out) {
  if (key_out->typed_data() != key.typed_data() || value_out->typed_data() != value.typed_data())
    return ffi::Error::InvalidArgument("decode_attention: the cache is not updated in place");
  AttentionArgs args{};
  args.qkv = qkv.typed_data();
  args.cosine = cosine.typed_data();
  args.sine = sine.typed_data();
  args.position = position.typed_data();
  args.layer = layer.typed_data();
  args.key = reinterpret_cast<__nv_bfloat16*>(key_out->typed_data());
  args.value = reinterpret_cast<__nv_bfloat16*>(value_out->typed_data());
  args.out = reinterpret_cast<__nv_bfloat16*>(out->typed_data());
  args.parts = static_cast<int>(qkv.dimensions()[0]);
  args.batch = static_cast<int>(key.dimensions()[1]);
  args.slots = static_cast<int>(key.dimensions()[2]);
  args.kv_heads = static_cast<int>(key.dimensions()[3]);
  const int size = static_cast<int>(key.dimensions()[4]);
  const int group = static_cast<int>(qkv.dimensions()[2]) / (args.kv_heads * size) - 2;
  int device = 0, processors = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  args.ranks = 1;
  while (args.ranks < kMostRanks && 2 * args.ranks * args.batch * args.kv_heads <= processors) args.ranks *= 2;
  if (size == 64) return launch<64>(stream, args, group);
  if (size == 128) return launch<128>(stream, args, group);
  return ffi::Error::InvalidArgument("decode_attention: heads of " + std::to_string(size));
}

}  // namespace
}  // namespace mobiquant

XLA_FFI_DEFINE_HANDLER_SYMBOL(DecodeAttention, mobiquant::attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<mobiquant::Floats>()
                                  .Arg<mobiquant::Floats>()
                                  .Arg<mobiquant::Floats>()
                                  .Arg<mobiquant::Integers>()
                                  .Arg<mobiquant::Integers>()
                                  .Arg<mobiquant::Halves>()
                                  .Arg<mobiquant::Halves>()
                                  .Ret<mobiquant::Halves>()
                                  .Ret<mobiquant::Halves>()
                                  .Ret<mobiquant::Halves>(),
                              {ffi::Traits::kCmdBufferCompatible});
