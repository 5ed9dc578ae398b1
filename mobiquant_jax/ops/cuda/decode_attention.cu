// XLA's entry point to the attention kernel alone; it may be recorded into a CUDA graph.
#include "attention.cuh"

namespace mobiquant {
namespace {

ffi::Error attention(cudaStream_t stream, Floats qkv, Floats rotation, Integers position, Integers layer, Halves key,
                     Halves value, ffi::Result<Halves> key_out, ffi::Result<Halves> value_out,
                     ffi::Result<Halves> out) {
  if (key_out->typed_data() != key.typed_data() || value_out->typed_data() != value.typed_data())
    return ffi::Error::InvalidArgument("decode_attention: the cache is not updated in place");
  AttentionArgs args{};
  args.qkv = qkv.typed_data();
  args.cosine = rotation.typed_data();
  args.sine = args.cosine + rotation.element_count() / 2;
  args.position = position.typed_data();
  args.layer = layer.typed_data();
  args.key = bf16(*key_out);
  args.value = bf16(*value_out);
  args.out = bf16(*out);
  args.parts = static_cast<int>(qkv.dimensions()[0]);
  args.batch = static_cast<int>(key.dimensions()[1]);
  args.slots = static_cast<int>(key.dimensions()[2]);
  args.kv_heads = static_cast<int>(key.dimensions()[3]);
  args.ranks = attention_ranks(args.batch, args.kv_heads);
  const int size = static_cast<int>(key.dimensions()[4]);
  const int group = static_cast<int>(qkv.dimensions()[2]) / (args.kv_heads * size) - 2;
  return check(launch_attention(stream, args, false, group, size), "decode_attention");
}

}  // namespace
}  // namespace mobiquant

XLA_FFI_DEFINE_HANDLER_SYMBOL(DecodeAttention, mobiquant::attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
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
