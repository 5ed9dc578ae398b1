// XLA's entry points to the product alone. The launches allocate nothing and never wait for the device, so that XLA may
// record them into a CUDA graph.
#include "prefill.cuh"
#include "weights.cuh"

namespace mobiquant {
namespace {

ffi::Error decode(cudaStream_t stream, Halves x, Integers depth, Integers layer, Words affine, Words plane1,
                  Words plane2, Words plane3, Words plane4, ffi::Result<Floats> out, ffi::Span<const int64_t> ends,
                  int64_t version) {
  DecodeArgs args{};
  const Words* const planes[kMaxSlices] = {&plane1, &plane2, &plane3, &plane4};
  if (auto error = describe(args.weights, args.segments, affine, planes, ends, version); error.failure()) return error;
  args.weights.layer = layer.typed_data();
  args.x = bf16(x);
  args.depth = depth.typed_data();
  args.out = out->typed_data();
  args.tokens = static_cast<int>(x.dimensions()[0]);
  args.inputs = static_cast<int>(x.dimensions()[1]);
  return check(launch_decode(stream, args, static_cast<int>(out->dimensions()[0]), false), "sliced_matmul");
}

template <typename Out>
ffi::Error launch_prefill(cudaStream_t stream, PrefillArgs args) {
  args.clusters = processors() / kCluster;
  const dim3 segments(args.segments.count);
  if (cudaError_t error = launch(plan_kernel, segments, kPlanThreads, sizeof(PlanShared), stream, 1, false, args))
    return check(error, "sliced_matmul");
  const int stages = args.weights.blocks * kBlockInputs / kStageInputs;
  const dim3 grid(Plan::most_tiles(args.tokens), args.segments.count, (stages + kPackStages - 1) / kPackStages);
  if (cudaError_t error = launch(pack_kernel, grid, kPackThreads, 0, stream, 1, true, args))
    return check(error, "sliced_matmul");
  return check(launch(prefill_kernel<kGroups, Out>, dim3(args.clusters * kCluster), kPrefillThreads, kPrefillShared,
                      stream, kCluster, true, args),
               "sliced_matmul");
}

ffi::Error prefill(cudaStream_t stream, Halves x, Integers depth, Integers layer, Words affine, Words plane1,
                   Words plane2, Words plane3, Words plane4, ffi::Result<ffi::AnyBuffer> out,
                   ffi::Result<Integers> plan, ffi::Result<Halves> packed, ffi::Span<const int64_t> ends,
                   int64_t version) {
  PrefillArgs args{};
  const Words* const planes[kMaxSlices] = {&plane1, &plane2, &plane3, &plane4};
  if (auto error = describe(args.weights, args.segments, affine, planes, ends, version); error.failure())
    return error;
  args.weights.layer = layer.typed_data();
  args.x = bf16(x);
  args.depth = depth.typed_data();
  args.plan = plan->typed_data();
  args.packed = reinterpret_cast<__nv_bfloat16*>(packed->typed_data());
  args.out = out->untyped_data();
  args.tokens = static_cast<int>(x.dimensions()[0]);
  args.inputs = static_cast<int>(x.dimensions()[1]);
  if (static_cast<int64_t>(plan->element_count()) < Plan::ints(args.tokens))
    return ffi::Error::InvalidArgument("sliced_matmul: the plan of " + std::to_string(args.tokens) + " tokens needs " +
                                       std::to_string(Plan::ints(args.tokens)) + " integers");
  const int64_t elements =
      static_cast<int64_t>(args.segments.count) * packed_rows(args.tokens) * args.weights.blocks * kBlockInputs;
  if (static_cast<int64_t>(packed->element_count()) < elements)
    return ffi::Error::InvalidArgument("sliced_matmul: the packed tokens need " + std::to_string(elements) +
                                       " elements");
  return out->element_type() == ffi::F32 ? launch_prefill<float>(stream, args)
                                         : launch_prefill<__nv_bfloat16>(stream, args);
}

auto inputs() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::PlatformStream<cudaStream_t>>()
      .Arg<Halves>()
      .Arg<Integers>()
      .Arg<Integers>()
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

XLA_FFI_DEFINE_HANDLER_SYMBOL(SlicedMatmulPrefill, mobiquant::prefill,
                              mobiquant::inputs()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::BF16>>()
                                  .Attr<ffi::Span<const int64_t>>("ends")
                                  .Attr<int64_t>("version"),
                              {ffi::Traits::kCmdBufferCompatible});
