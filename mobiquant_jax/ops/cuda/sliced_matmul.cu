// XLA's entry points to the kernels, built for one group size: MOBIQUANT_GROUPS groups in a block of 128 inputs.
// The launches allocate nothing and never wait for the device, so that XLA may record them into a CUDA graph.
#include <algorithm>
#include <string>

#include "decode.cuh"
#include "prefill.cuh"
#include "route.cuh"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace mobiquant {
namespace {

constexpr int kGroups = MOBIQUANT_GROUPS;
constexpr int kLayoutVersion = 1;  // TILED_LAYOUT_VERSION of layout.py
constexpr int kPrefetchBytes = 96 * 1024;  // a thread block's, about what memory gives it while the router runs

using Words = ffi::Buffer<ffi::U32>;

ffi::Error check(cudaError_t error) {
  if (error == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(std::string("sliced_matmul: ") + cudaGetErrorString(error));
}

ffi::Error describe(Weights& weights, Segments& segments, const ffi::Buffer<ffi::S32>& layer, const Words& affine,
                    const Words* const (&planes)[kMaxSlices], ffi::Span<const int64_t> ends, int64_t version) {
  if (version != kLayoutVersion)
    return ffi::Error::InvalidArgument("sliced_matmul: layout version " + std::to_string(version) + ", not " +
                                       std::to_string(kLayoutVersion));
  if (ends.size() < 1 || ends.size() > kMaxSegments)
    return ffi::Error::InvalidArgument("sliced_matmul: " + std::to_string(ends.size()) + " segments");
  for (int e = 0; e < kMaxSlices; ++e) weights.planes[e] = reinterpret_cast<unsigned char*>(planes[e]->typed_data());
  weights.affine = reinterpret_cast<const uint2*>(affine.typed_data());
  weights.layer = layer.typed_data();
  weights.tiles = static_cast<int>(planes[0]->dimensions()[1]);
  weights.blocks = static_cast<int>(planes[0]->dimensions()[2]);
  segments.count = static_cast<int>(ends.size());
  for (size_t s = 0; s < ends.size(); ++s) segments.ends[s] = static_cast<int>(ends[s]);
  if (affine.dimensions()[2] != weights.blocks * kGroups)
    return ffi::Error::InvalidArgument("sliced_matmul: built for " + std::to_string(kGroups) + " groups a block");
  return ffi::Error::Success();
}

int processors() {
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

// Launches a kernel, in clusters of thread blocks or before the one that was launched last has ended.
template <typename Args>
cudaError_t launch(void (*kernel)(Args), dim3 grid, int threads, int shared, cudaStream_t stream, int cluster, bool early,
                   const Args& args) {
  if (cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared)) return error;
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

template <int NT>
ffi::Error launch_decode(cudaStream_t stream, DecodeArgs args, int splits) {
  constexpr int kWarps = 16, kSlots = kGroups == 4 ? 6 : 8;
  using Shape = DecodeShape<kGroups, kWarps, kSlots>;
  const auto kernel = decode_kernel<NT, kGroups, kWarps, kSlots>;
  args.split_blocks = (args.weights.blocks + splits - 1) / splits;
  args.reduced_tiles = reduced_tiles(kWarps, args.tokens);
  const int shared = Shape::total(args.tokens, args.split_blocks);
  const int walkers = std::max(1, std::min(args.weights.tiles, processors() / splits));
  return check(launch(kernel, dim3(walkers, splits), Shape::kThreads, shared, stream, 1, args.prefetch > 0, args));
}

ffi::Error launch_decode(cudaStream_t stream, const DecodeArgs& args, int splits) {
  if (args.tokens <= 4) return launch_decode<1>(stream, args, splits);
  return args.tokens <= 8 ? launch_decode<2>(stream, args, splits) : launch_decode<4>(stream, args, splits);
}

ffi::Error decode(cudaStream_t stream, ffi::Buffer<ffi::BF16> x, ffi::Buffer<ffi::S32> depth,
                  ffi::Buffer<ffi::S32> layer, Words affine, Words plane1, Words plane2, Words plane3, Words plane4,
                  ffi::ResultBuffer<ffi::F32> out, ffi::Span<const int64_t> ends, int64_t version) {
  DecodeArgs args{};
  const Words* const planes[kMaxSlices] = {&plane1, &plane2, &plane3, &plane4};
  if (auto error = describe(args.weights, args.segments, layer, affine, planes, ends, version); error.failure())
    return error;
  args.x = reinterpret_cast<const __nv_bfloat16*>(x.typed_data());
  args.depth = depth.typed_data();
  args.out = out->typed_data();
  const int splits = static_cast<int>(out->dimensions()[0]);
  args.tokens = static_cast<int>(x.dimensions()[0]);
  args.inputs = static_cast<int>(x.dimensions()[1]);
  return launch_decode(stream, args, splits);
}

using Floats = ffi::Buffer<ffi::F32>;
using Halves = ffi::Buffer<ffi::BF16>;
using Integers = ffi::Buffer<ffi::S32>;

ffi::Error routed(cudaStream_t stream, Halves x, Floats update, Floats gain, Halves hidden, Floats magnitude,
                  Floats hidden_bias, Floats output, Floats output_bias, Floats threshold, Integers layer, Words affine,
                  Words plane1, Words plane2, Words plane3, Words plane4, ffi::Result<Halves> residual,
                  ffi::Result<Halves> input, ffi::Result<Integers> depth, ffi::Result<Floats> out, int64_t source,
                  float eps, ffi::Span<const int64_t> ends, int64_t version) {
  DecodeArgs decode{};
  const Words* const planes[kMaxSlices] = {&plane1, &plane2, &plane3, &plane4};
  if (auto error = describe(decode.weights, decode.segments, layer, affine, planes, ends, version); error.failure())
    return error;
  RouteArgs route{};
  route.source = static_cast<int>(source);
  route.x = reinterpret_cast<const __nv_bfloat16*>(x.typed_data());
  route.update = update.typed_data();
  route.parts = static_cast<int>(update.dimensions()[0]);
  route.gain = gain.typed_data();
  route.eps = eps;
  route.hidden = reinterpret_cast<const __nv_bfloat16*>(hidden.typed_data());
  route.magnitude = magnitude.typed_data();
  route.hidden_bias = hidden_bias.typed_data();
  route.output = output.typed_data();
  route.output_bias = output_bias.typed_data();
  route.threshold = threshold.typed_data();
  route.layer = layer.typed_data();
  route.residual = reinterpret_cast<__nv_bfloat16*>(residual->typed_data());
  route.input = reinterpret_cast<__nv_bfloat16*>(input->typed_data());
  route.depth = depth->typed_data();
  route.tokens = static_cast<int>(depth->dimensions()[1]);
  route.inputs = static_cast<int>(hidden.dimensions()[1]);
  route.linears = static_cast<int>(magnitude.dimensions()[1]);
  route.width = static_cast<int>(magnitude.dimensions()[2]);
  const RouteShape shape(route.tokens, route.inputs, route.width);
  if (cudaError_t error = cudaFuncSetAttribute(route_kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1))
    return check(error);
  const dim3 grid(route.linears * kRouteRanks);
  if (cudaError_t error = launch(route_kernel, grid, kRouteThreads, shape.total, stream, kRouteRanks, false, route))
    return check(error);
  decode.x = source == kPlain ? route.x : route.input;
  decode.depth = route.depth;
  decode.out = out->typed_data();
  decode.tokens = route.tokens;
  decode.inputs = route.inputs;
  decode.prefetch = kPrefetchBytes;
  return launch_decode(stream, decode, static_cast<int>(out->dimensions()[0]));
}

template <typename Out>
ffi::Error launch_prefill(cudaStream_t stream, const PrefillArgs& args) {
  const auto kernel = prefill_kernel<kGroups, Out>;
  if (cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kPrefillShared))
    return check(error);
  plan_kernel<<<args.segments.count, kPlanThreads, 0, stream>>>(args);
  kernel<<<processors(), kPrefillThreads, kPrefillShared, stream>>>(args);
  return check(cudaGetLastError());
}

ffi::Error prefill(cudaStream_t stream, ffi::Buffer<ffi::BF16> x, ffi::Buffer<ffi::S32> depth,
                   ffi::Buffer<ffi::S32> layer, Words affine, Words plane1, Words plane2, Words plane3, Words plane4,
                   ffi::Result<ffi::AnyBuffer> out, ffi::ResultBuffer<ffi::S32> plan, ffi::Span<const int64_t> ends,
                   int64_t version) {
  PrefillArgs args{};
  const Words* const planes[kMaxSlices] = {&plane1, &plane2, &plane3, &plane4};
  if (auto error = describe(args.weights, args.segments, layer, affine, planes, ends, version); error.failure())
    return error;
  args.x = reinterpret_cast<const __nv_bfloat16*>(x.typed_data());
  args.depth = depth.typed_data();
  args.plan = plan->typed_data();
  args.out = out->untyped_data();
  args.tokens = static_cast<int>(x.dimensions()[0]);
  args.inputs = static_cast<int>(x.dimensions()[1]);
  if (static_cast<int64_t>(plan->element_count()) < Plan::ints(args.tokens))
    return ffi::Error::InvalidArgument("sliced_matmul: the plan of " + std::to_string(args.tokens) + " tokens needs " +
                                       std::to_string(Plan::ints(args.tokens)) + " integers");
  return out->element_type() == ffi::F32 ? launch_prefill<float>(stream, args)
                                         : launch_prefill<__nv_bfloat16>(stream, args);
}

auto inputs() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::PlatformStream<cudaStream_t>>()
      .Arg<ffi::Buffer<ffi::BF16>>()
      .Arg<ffi::Buffer<ffi::S32>>()
      .Arg<ffi::Buffer<ffi::S32>>()
      .Arg<Words>()
      .Arg<Words>()
      .Arg<Words>()
      .Arg<Words>()
      .Arg<Words>();
}

}  // namespace
}  // namespace mobiquant

XLA_FFI_DEFINE_HANDLER_SYMBOL(SlicedMatmulDecode, mobiquant::decode,
                              mobiquant::inputs()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<ffi::Span<const int64_t>>("ends")
                                  .Attr<int64_t>("version"),
                              {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(SlicedMatmulRouted, mobiquant::routed,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<mobiquant::Halves>()
                                  .Arg<mobiquant::Floats>()
                                  .Arg<mobiquant::Floats>()
                                  .Arg<mobiquant::Halves>()
                                  .Arg<mobiquant::Floats>()
                                  .Arg<mobiquant::Floats>()
                                  .Arg<mobiquant::Floats>()
                                  .Arg<mobiquant::Floats>()
                                  .Arg<mobiquant::Floats>()
                                  .Arg<mobiquant::Integers>()
                                  .Arg<mobiquant::Words>()
                                  .Arg<mobiquant::Words>()
                                  .Arg<mobiquant::Words>()
                                  .Arg<mobiquant::Words>()
                                  .Arg<mobiquant::Words>()
                                  .Ret<mobiquant::Halves>()
                                  .Ret<mobiquant::Halves>()
                                  .Ret<mobiquant::Integers>()
                                  .Ret<mobiquant::Floats>()
                                  .Attr<int64_t>("source")
                                  .Attr<float>("eps")
                                  .Attr<ffi::Span<const int64_t>>("ends")
                                  .Attr<int64_t>("version"),
                              {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(SlicedMatmulPrefill, mobiquant::prefill,
                              mobiquant::inputs()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Attr<ffi::Span<const int64_t>>("ends")
                                  .Attr<int64_t>("version"),
                              {ffi::Traits::kCmdBufferCompatible});
