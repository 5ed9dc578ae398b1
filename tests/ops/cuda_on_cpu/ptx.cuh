// CUDA for the host compiler, as far as the kernels that the tests run go: a thread for each lane, in place of the real
// ptx.cuh. Slow, and stricter than a GPU: every access to shared memory by these functions is checked against what the
// launch asked for.
#pragma once

#include <algorithm>
#include <atomic>
#include <barrier>
#include <bit>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __shared__
#define __grid_constant__
#define __align__(bytes)
#define __launch_bounds__(...)
#define __forceinline__ inline

struct uint2 {
  uint32_t x, y;
};
struct float2 {
  float x, y;
};
struct int4 {
  int x, y, z, w;
};
struct uint4 {
  uint32_t x, y, z, w;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline uint32_t max(uint32_t a, uint32_t b) { return a > b ? a : b; }

template <typename To, typename From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
inline float __uint_as_float(uint32_t v) { return bits_as<float>(v); }
inline float __int_as_float(int v) { return bits_as<float>(v); }
inline uint32_t __float_as_uint(float v) { return bits_as<uint32_t>(v); }
inline int __clz(uint32_t v) { return std::countl_zero(v); }
template <typename T>
T __ldg(const T* from) {
  return *from;
}
template <typename T>
void __stcg(T* to, T value) {
  *to = value;
}
inline float __fdividef(float a, float b) { return std::fabs(b) > 0x1p126f ? 0.0f : a / b; }
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) out |= static_cast<uint32_t>(bytes >> (8 * (selector >> 4 * i & 7)) & 0xff) << 8 * i;
  return out;
}

inline thread_local dim3 threadIdx, blockIdx, gridDim;

namespace mobiquant {

inline constexpr int kMostShared = 227 * 1024;
alignas(1024) inline unsigned char shared[kMostShared];
inline int shared_bytes;  // asked for by the launch

inline std::atomic<bool> failed;

inline bool fail(const char* what, long value) {
  if (!failed.exchange(true)) std::fprintf(stderr, "%s: %ld\n", what, value);
  return false;
}
inline bool check_shared(uint32_t address, int bytes) {
  if (address > static_cast<uint32_t>(shared_bytes - bytes)) return fail("outside of shared memory", address);
  return address % bytes == 0 || fail("misaligned", address);
}

struct Warp {
  std::barrier<> barrier{32};
  uint64_t value[32];
  uint32_t a[32][4], b[32][2];
};
struct PhaseBarrier {
  std::mutex mutex;
  std::condition_variable changed;
  int count = 0, pending = 0, bytes = 0;
  uint32_t phase = 0;
  void complete() {
    if (pending > 0 || bytes != 0) return;
    pending = count;
    ++phase;
    changed.notify_all();
  }
};
struct Block {
  std::vector<std::unique_ptr<Warp>> warps;
  std::map<int, std::unique_ptr<std::barrier<>>> barriers;
  std::map<uint32_t, std::unique_ptr<PhaseBarrier>> phases;
  std::mutex mutex;
};
inline Block* block;
inline int lane_id() { return threadIdx.x % 32; }
inline Warp& this_warp() { return *block->warps[threadIdx.x / 32]; }
inline PhaseBarrier& phase_barrier(uint32_t address) {
  check_shared(address, 8);
  std::lock_guard lock(block->mutex);
  auto& made = block->phases[address];
  if (!made) made = std::make_unique<PhaseBarrier>();
  return *made;
}
inline std::barrier<>& named_barrier(int id, int threads) {
  std::lock_guard lock(block->mutex);
  auto& made = block->barriers[id];
  if (!made) made = std::make_unique<std::barrier<>>(threads);
  return *made;
}

}  // namespace mobiquant

inline void __syncwarp() { mobiquant::this_warp().barrier.arrive_and_wait(); }
inline void __syncthreads() { mobiquant::named_barrier(0, mobiquant::block->warps.size() * 32).arrive_and_wait(); }
template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  auto& warp = mobiquant::this_warp();
  std::memcpy(&warp.value[mobiquant::lane_id()], &value, sizeof value);
  __syncwarp();
  T other;
  std::memcpy(&other, &warp.value[lane], sizeof other);
  __syncwarp();
  return other;
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int step) {
  return __shfl_sync(~0u, value, mobiquant::lane_id() ^ step);
}
template <typename T>
T __shfl_up_sync(unsigned, T value, int step) {
  return __shfl_sync(~0u, value, std::max(mobiquant::lane_id() - step, 0));
}
inline int __reduce_max_sync(unsigned, int value) {
  for (int step = 1; step < 32; step *= 2) value = std::max(value, __shfl_xor_sync(~0u, value, step));
  return value;
}
inline uint32_t __reduce_min_sync(unsigned, uint32_t value) {
  for (int step = 1; step < 32; step *= 2) value = std::min(value, __shfl_xor_sync(~0u, value, step));
  return value;
}
inline uint32_t __ballot_sync(unsigned, bool value) {
  auto& warp = mobiquant::this_warp();
  warp.value[mobiquant::lane_id()] = value;
  __syncwarp();
  uint32_t votes = 0;
  for (int lane = 0; lane < 32; ++lane) votes |= static_cast<uint32_t>(warp.value[lane]) << lane;
  __syncwarp();
  return votes;
}

namespace mobiquant {

template <typename T>
T keep(T value) {
  return value;
}
inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(p) - shared);
}
template <typename T>
T load_shared(uint32_t from) {
  T value{};
  if (check_shared(from, sizeof(T))) std::memcpy(&value, shared + from, sizeof value);
  return value;
}
inline uint2 load_shared8(uint32_t from) { return load_shared<uint2>(from); }
inline uint4 load_shared16(uint32_t from) { return load_shared<uint4>(from); }

inline void mma_bytes(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Warp& warp = this_warp();
  const int lane = lane_id();
  std::copy(a, a + 4, warp.a[lane]);
  warp.b[lane][0] = b0, warp.b[lane][1] = b1;
  __syncwarp();
  for (int c = 0; c < 4; ++c) {
    const int row = lane / 4 + 8 * (c / 2), column = 2 * (lane % 4) + c % 2;
    int sum = 0;
    for (int k = 0; k < 32; ++k) {
      const uint32_t left = warp.a[row % 8 * 4 + k % 16 / 4][row / 8 + 2 * (k / 16)] >> 8 * (k % 4) & 0xff;
      sum += static_cast<int>(left) * static_cast<int8_t>(warp.b[column * 4 + k % 16 / 4][k / 16] >> 8 * (k % 4));
    }
    d[c] = sum;
  }
  __syncwarp();
}

template <int kThreads>
void sync_threads(int id) {
  named_barrier(id, kThreads).arrive_and_wait();
}
template <int kThreads>
void arrive_threads(int id) {
  [[maybe_unused]] auto token = named_barrier(id, kThreads).arrive();
}

inline void barrier_init(uint32_t address, int arrivals) {
  auto& barrier = phase_barrier(address);
  barrier.count = barrier.pending = arrivals;
}
inline void barrier_init_fence() {}
inline void barrier_expect(uint32_t address, int bytes) {
  auto& barrier = phase_barrier(address);
  std::lock_guard lock(barrier.mutex);
  barrier.bytes += bytes;
  --barrier.pending;
  barrier.complete();
}
inline void barrier_arrive(uint32_t address) { barrier_expect(address, 0); }
inline void barrier_wait(uint32_t address, uint32_t parity) {
  auto& barrier = phase_barrier(address);
  std::unique_lock lock(barrier.mutex);
  barrier.changed.wait(lock, [&] { return (barrier.phase & 1) != parity; });
}
inline uint64_t evict_first() { return 0; }
inline std::vector<std::pair<const char*, size_t>> readable;  // arrays that may be read or fetched ahead
inline std::atomic<size_t> fetched = 0;                       // bytes
inline bool check_bulk(const void* from, int bytes) {
  const char* const start = static_cast<const char*>(from);
  if (reinterpret_cast<uintptr_t>(from) % 16 || bytes % 16) return fail("misaligned bulk read", bytes);
  const bool inside = std::any_of(readable.begin(), readable.end(), [&](const auto& array) {
    return start >= array.first && start + bytes <= array.first + array.second;
  });
  return (bytes > 0 && inside) || fail("bulk read of nothing or beyond an array", bytes);
}
inline void prefetch_bulk(const void* from, int bytes) {
  check_bulk(from, bytes);
  fetched += bytes;
}
inline void wait_for_previous() {}
inline void launch_dependents() {}
inline void copy_bulk(uint32_t to, const void* from, int bytes, uint32_t address, uint64_t) {
  if (check_bulk(from, bytes) && check_shared(to, 16) && check_shared(to + bytes - 16, 16))
    std::memcpy(shared + to, from, bytes);
  auto& barrier = phase_barrier(address);
  std::lock_guard lock(barrier.mutex);
  barrier.bytes -= bytes;
  barrier.complete();
}

// Runs a grid, one thread block after the other; shared memory starts as garbage. False if an access was wrong.
template <typename Kernel, typename Args>
bool launch(Kernel kernel, dim3 grid, int threads, int bytes, const Args& args) {
  if (bytes > kMostShared) return fail("too much shared memory", bytes);
  shared_bytes = bytes;
  failed = false;
  for (unsigned index = 0; index < grid.x * grid.y * grid.z; ++index) {
    const dim3 place{index % grid.x, index / grid.x % grid.y, index / grid.x / grid.y};
    Block made;
    for (int w = 0; w < threads / 32; ++w) made.warps.push_back(std::make_unique<Warp>());
    block = &made;
    std::memset(shared, 0xa5, kMostShared);
    std::vector<std::thread> lanes;
    for (int t = 0; t < threads; ++t)
      lanes.emplace_back([=] {
        threadIdx = {static_cast<unsigned>(t)}, blockIdx = place, gridDim = grid;
        kernel(args);
      });
    for (auto& lane : lanes) lane.join();
  }
  return !failed;
}

}  // namespace mobiquant
