// Warpgroup products D[64, n] += A[64, 16] B[16, n] of bfloat16: A in registers, B in shared memory, asynchronous.
#pragma once

#include <cstdint>

namespace mobiquant {

__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps reads of the accumulators behind the wait before it.
template <int kCount>
__device__ __forceinline__ void wgmma_keep(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
// B as rows of n tokens by 64 inputs, 128 bytes each, 128-byte swizzle, first row on a multiple of 1024 bytes.
__device__ inline uint64_t wgmma_descriptor(uint32_t address) {
  constexpr uint64_t kLayout = 1ull << 62 | (1024ull >> 4) << 32 | 1ull << 16;
  return kLayout | ((address & 0x3ffff) >> 4);
}

// The instruction's text names every accumulator and so is written for each n that a tile is computed with: n / 2 of
// them, then A's four registers and B's descriptor. Dm and Rm are the first 4 m accumulators, named and bound.
#define MOBIQUANT_D1 "%0, %1, %2, %3"
#define MOBIQUANT_D2 MOBIQUANT_D1 ", %4, %5, %6, %7"
#define MOBIQUANT_D3 MOBIQUANT_D2 ", %8, %9, %10, %11"
#define MOBIQUANT_D4 MOBIQUANT_D3 ", %12, %13, %14, %15"
#define MOBIQUANT_D5 MOBIQUANT_D4 ", %16, %17, %18, %19"
#define MOBIQUANT_D6 MOBIQUANT_D5 ", %20, %21, %22, %23"
#define MOBIQUANT_D7 MOBIQUANT_D6 ", %24, %25, %26, %27"
#define MOBIQUANT_D8 MOBIQUANT_D7 ", %28, %29, %30, %31"
#define MOBIQUANT_D9 MOBIQUANT_D8 ", %32, %33, %34, %35"
#define MOBIQUANT_D10 MOBIQUANT_D9 ", %36, %37, %38, %39"
#define MOBIQUANT_D11 MOBIQUANT_D10 ", %40, %41, %42, %43"
#define MOBIQUANT_D12 MOBIQUANT_D11 ", %44, %45, %46, %47"
#define MOBIQUANT_D13 MOBIQUANT_D12 ", %48, %49, %50, %51"
#define MOBIQUANT_D14 MOBIQUANT_D13 ", %52, %53, %54, %55"
#define MOBIQUANT_D15 MOBIQUANT_D14 ", %56, %57, %58, %59"
#define MOBIQUANT_D16 MOBIQUANT_D15 ", %60, %61, %62, %63"
#define MOBIQUANT_R(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define MOBIQUANT_R1 MOBIQUANT_R(0)
#define MOBIQUANT_R2 MOBIQUANT_R1, MOBIQUANT_R(4)
#define MOBIQUANT_R3 MOBIQUANT_R2, MOBIQUANT_R(8)
#define MOBIQUANT_R4 MOBIQUANT_R3, MOBIQUANT_R(12)
#define MOBIQUANT_R5 MOBIQUANT_R4, MOBIQUANT_R(16)
#define MOBIQUANT_R6 MOBIQUANT_R5, MOBIQUANT_R(20)
#define MOBIQUANT_R7 MOBIQUANT_R6, MOBIQUANT_R(24)
#define MOBIQUANT_R8 MOBIQUANT_R7, MOBIQUANT_R(28)
#define MOBIQUANT_R9 MOBIQUANT_R8, MOBIQUANT_R(32)
#define MOBIQUANT_R10 MOBIQUANT_R9, MOBIQUANT_R(36)
#define MOBIQUANT_R11 MOBIQUANT_R10, MOBIQUANT_R(40)
#define MOBIQUANT_R12 MOBIQUANT_R11, MOBIQUANT_R(44)
#define MOBIQUANT_R13 MOBIQUANT_R12, MOBIQUANT_R(48)
#define MOBIQUANT_R14 MOBIQUANT_R13, MOBIQUANT_R(52)
#define MOBIQUANT_R15 MOBIQUANT_R14, MOBIQUANT_R(56)
#define MOBIQUANT_R16 MOBIQUANT_R15, MOBIQUANT_R(60)
#define MOBIQUANT_WGMMA(m, n, a0, a1, a2, a3, b0)                                                              \
  __device__ __forceinline__ void wgmma(float (&d)[n / 2], const uint32_t (&a)[4], uint64_t b) {               \
    asm volatile("{\n.reg .pred p;\nsetp.eq.b32 p, 0, 0;\n"                                                    \
                 "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" MOBIQUANT_D##m "}, {%" #a0       \
                 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b0 ", p, 1, 1, 0;\n}\n"                                 \
                 : MOBIQUANT_R##m                                                                              \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                        \
  }
MOBIQUANT_WGMMA(2, 16, 8, 9, 10, 11, 12)
MOBIQUANT_WGMMA(4, 32, 16, 17, 18, 19, 20)
MOBIQUANT_WGMMA(6, 48, 24, 25, 26, 27, 28)
MOBIQUANT_WGMMA(8, 64, 32, 33, 34, 35, 36)
MOBIQUANT_WGMMA(9, 72, 36, 37, 38, 39, 40)
MOBIQUANT_WGMMA(10, 80, 40, 41, 42, 43, 44)
MOBIQUANT_WGMMA(11, 88, 44, 45, 46, 47, 48)
MOBIQUANT_WGMMA(12, 96, 48, 49, 50, 51, 52)
MOBIQUANT_WGMMA(13, 104, 52, 53, 54, 55, 56)
MOBIQUANT_WGMMA(14, 112, 56, 57, 58, 59, 60)
MOBIQUANT_WGMMA(15, 120, 60, 61, 62, 63, 64)
MOBIQUANT_WGMMA(16, 128, 64, 65, 66, 67, 68)

}  // namespace mobiquant
