// What the entry points share: XLA's types, errors and launches.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <string>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace mobiquant {

using Words = ffi::Buffer<ffi::U32>;
using Floats = ffi::Buffer<ffi::F32>;
using Halves = ffi::Buffer<ffi::BF16>;
using Integers = ffi::Buffer<ffi::S32>;

inline __nv_bfloat16* bf16(const Halves& buffer) { return reinterpret_cast<__nv_bfloat16*>(buffer.typed_data()); }

inline ffi::Error check(cudaError_t error, const char* name) {
  if (error == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(std::string(name) + ": " + cudaGetErrorString(error));
}

inline int processors() {
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

// Launches a kernel in clusters of thread blocks; where `early`, before the one that was launched last has ended. Each of
// its threads must then wait, see `wait_for_previous`, before it reads or writes anything that kernels have written since
// the last one that was not launched early: a kernel that does not wait breaks the order of all behind it.
template <typename Args>
cudaError_t launch(void (*kernel)(Args), dim3 grid, int threads, int shared, cudaStream_t stream, int cluster, bool early,
                   const Args& args) {
  if (cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared)) return error;
  if (cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, cluster > 8))
    return error;
  // A processor divides its memory between cache and shared memory, and must run dry before it divides it otherwise.
  if (cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                               cudaSharedmemCarveoutMaxShared))
    return error;
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = early;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  return cudaLaunchKernelEx(&config, kernel, args);
}

}  // namespace mobiquant
