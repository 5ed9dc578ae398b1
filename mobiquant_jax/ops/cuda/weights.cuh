// XLA's buffers as the kernels' weights, and the launch of the decode kernel on them, built for one group size:
// MOBIQUANT_GROUPS groups in a block of 128 inputs.
#pragma once

#include <algorithm>

#include "decode.cuh"
#include "launch.cuh"

namespace mobiquant {

constexpr int kGroups = MOBIQUANT_GROUPS;
constexpr int kLayoutVersion = 1;  // TILED_LAYOUT_VERSION of layout.py

inline ffi::Error describe(Weights& weights, Segments& segments, const Words& affine,
                           const Words* const (&planes)[kMaxSlices], ffi::Span<const int64_t> ends, int64_t version) {
  if (version != kLayoutVersion)
    return ffi::Error::InvalidArgument("layout version " + std::to_string(version) + ", not " +
                                       std::to_string(kLayoutVersion));
  if (ends.size() < 1 || ends.size() > kMaxSegments)
    return ffi::Error::InvalidArgument(std::to_string(ends.size()) + " segments");
  for (int e = 0; e < kMaxSlices; ++e) weights.planes[e] = reinterpret_cast<unsigned char*>(planes[e]->typed_data());
  weights.affine = reinterpret_cast<const uint2*>(affine.typed_data());
  weights.tiles = static_cast<int>(planes[0]->dimensions()[1]);
  weights.blocks = static_cast<int>(planes[0]->dimensions()[2]);
  segments.count = static_cast<int>(ends.size());
  for (size_t s = 0; s < ends.size(); ++s) segments.ends[s] = static_cast<int>(ends[s]);
  if (affine.dimensions()[2] != weights.blocks * kGroups)
    return ffi::Error::InvalidArgument("the kernels are built for " + std::to_string(kGroups) + " groups a block");
  return ffi::Error::Success();
}

constexpr int kMoreThanHalf = 117 * 1024;  // bytes of shared memory

template <int NT>
cudaError_t launch_decode(cudaStream_t stream, DecodeArgs args, int splits, bool early) {
  constexpr int kWarps = 16, kSlots = kGroups == 4 ? 6 : 8;
  using Shape = DecodeShape<kGroups, kWarps, kSlots>;
  const auto kernel = decode_kernel<NT, kGroups, kWarps, kSlots>;
  args.split_blocks = (args.weights.blocks + splits - 1) / splits;
  args.reduced_tiles = reduced_tiles(kWarps, args.tokens);
  // More than half a processor's, or two thread blocks could share one processor while another, that is still busy with
  // the kernel before, gets none.
  const int shared = std::max(Shape::total(args.tokens, args.split_blocks), kMoreThanHalf);
  const int walkers = std::max(1, std::min(args.weights.tiles, processors() / splits));
  return launch(kernel, dim3(walkers, splits), Shape::kThreads, shared, stream, 1, early, args);
}

inline cudaError_t launch_decode(cudaStream_t stream, const DecodeArgs& args, int splits, bool early) {
  if (args.tokens <= 4) return launch_decode<1>(stream, args, splits, early);
  return args.tokens <= 8 ? launch_decode<2>(stream, args, splits, early) : launch_decode<4>(stream, args, splits, early);
}

}  // namespace mobiquant
