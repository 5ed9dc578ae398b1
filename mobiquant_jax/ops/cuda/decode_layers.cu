// XLA's entry point to all layers of a decode step: nine kernels a layer, each launched before the one before it has
// ended, so that it starts with what does not depend on that one: its weights on their way, its barriers ready. XLA
// launches kernel after kernel; apart, the gaps alone would take as long as the reading.
//
// The launches allocate nothing and never wait for the device, so that XLA may record them into a CUDA graph.
#include <optional>

#include "attention.cuh"
#include "route.cuh"
#include "weights.cuh"

namespace mobiquant {
namespace {

constexpr int kSites = 4;                  // query-key-value, output, gate-up, down
constexpr int kSiteArrays = 6 + kMaxSlices;
constexpr int kPrefetchBytes = 48 * 1024;  // for one slice or two, see DecodeArgs; at 2 and 4 bits more is slower

// The linears of one input: what they hold of the first layer.
struct Site {
  RouteArgs route;
  DecodeArgs decode;
  int32_t* depth;  // [layers, all linears, tokens], as thresholds are; from this site's first linear on
  int all_linears, splits;
};

ffi::Error read_site(Site& site, const ffi::RemainingArgs& arrays, int first, ffi::Span<const int64_t> ends,
                     Floats out, int64_t version) {
  const auto hidden = arrays.get<Halves>(first);
  if (!hidden.has_value()) return ffi::Error::InvalidArgument("decode_layers: hidden layers must be bfloat16");
  const float* floats[4];
  for (int i = 0; i < 4; ++i) {
    const auto array = arrays.get<Floats>(first + 1 + i);
    if (!array.has_value()) return ffi::Error::InvalidArgument("decode_layers: routers must be float32");
    floats[i] = array->typed_data();
  }
  std::optional<Words> words[1 + kMaxSlices];
  for (int i = 0; i <= kMaxSlices; ++i) {
    const auto array = arrays.get<Words>(first + 5 + i);
    if (!array.has_value()) return ffi::Error::InvalidArgument("decode_layers: weights must be uint32");
    words[i] = *array;
  }
  const Words* const planes[kMaxSlices] = {&*words[1], &*words[2], &*words[3], &*words[4]};
  if (auto error = describe(site.decode.weights, site.decode.segments, *words[0], planes, ends, version);
      error.failure())
    return error;
  RouteArgs& route = site.route;
  route.hidden = bf16(*hidden);
  route.magnitude = floats[0];
  route.hidden_bias = floats[1];
  route.output = floats[2];
  route.output_bias = floats[3];
  route.inputs = static_cast<int>(hidden->dimensions()[1]);
  route.linears = static_cast<int>(ends.size());
  route.width = static_cast<int>(hidden->dimensions()[2]) / route.linears;
  route.tokens = static_cast<int>(out.dimensions()[1]);
  site.decode.out = out.typed_data();
  site.decode.tokens = route.tokens;
  site.decode.inputs = route.inputs;
  site.decode.prefetch = kPrefetchBytes;
  site.splits = static_cast<int>(out.dimensions()[0]);
  return ffi::Error::Success();
}

// Routes and multiplies in one layer; the source is set.
cudaError_t run(cudaStream_t stream, const Site& site, int layer, bool early) {
  RouteArgs route = site.route;
  const size_t units = static_cast<size_t>(layer) * route.linears * route.width;
  route.hidden += units * route.inputs;
  route.magnitude += units;
  route.hidden_bias += units;
  route.output += units * kScores;
  route.output_bias += static_cast<size_t>(layer) * route.linears * kScores;
  const size_t rows = static_cast<size_t>(layer) * site.all_linears;
  route.threshold += rows * route.tokens;
  route.depth = site.depth + rows * route.tokens;
  if (cudaError_t error = launch_route(stream, route, early)) return error;
  DecodeArgs decode = site.decode;
  decode.weights.layer_index = layer;
  decode.x = route.source == kPlain ? route.x : route.input;
  decode.depth = route.depth;
  return launch_decode(stream, decode, site.splits, true);
}

ffi::Error decode_layers(cudaStream_t stream, Halves x, Floats rotation, Integers position, Floats attention_norm,
                         Floats mlp_norm, Halves key, Halves value, Floats thresholds, Integers expected,
                         ffi::RemainingArgs arrays, ffi::Result<Halves> key_out, ffi::Result<Halves> value_out,
                         ffi::Result<Halves> residual, ffi::Result<Floats> update, ffi::Result<Integers> depth,
                         ffi::Result<Halves> middle, ffi::Result<Halves> input, ffi::Result<Halves> mixed,
                         ffi::Result<Floats> qkv, ffi::Result<Floats> o, ffi::Result<Floats> gate_up, float eps,
                         ffi::Span<const int64_t> qkv_ends, ffi::Span<const int64_t> o_ends,
                         ffi::Span<const int64_t> gate_up_ends, ffi::Span<const int64_t> down_ends, int64_t version) {
  if (key_out->typed_data() != key.typed_data() || value_out->typed_data() != value.typed_data())
    return ffi::Error::InvalidArgument("decode_layers: the cache is not updated in place");
  if (arrays.size() != kSites * kSiteArrays)
    return ffi::Error::InvalidArgument("decode_layers: " + std::to_string(arrays.size()) + " arrays of weights");
  Site sites[kSites]{};
  const ffi::Span<const int64_t> ends[kSites] = {qkv_ends, o_ends, gate_up_ends, down_ends};
  const Floats outs[kSites] = {*qkv, *o, *gate_up, *update};
  int linears = 0;
  for (int s = 0; s < kSites; ++s) {
    if (auto error = read_site(sites[s], arrays, s * kSiteArrays, ends[s], outs[s], version); error.failure())
      return error;
    sites[s].route.threshold = thresholds.typed_data() + linears * sites[s].route.tokens;
    sites[s].depth = depth->typed_data() + linears * sites[s].route.tokens;
    linears += sites[s].route.linears;
  }
  for (Site& site : sites) {
    site.all_linears = linears;
    site.route.input = bf16(*input);
    site.route.eps = eps;
    site.decode.expected = expected.typed_data();
  }
  Site &of_qkv = sites[0], &of_o = sites[1], &of_gate_up = sites[2], &of_down = sites[3];
  of_qkv.route.source = kNormed;
  of_qkv.route.residual = bf16(*middle);
  of_qkv.route.update = update->typed_data();
  of_o.route.source = kPlain;
  of_o.route.x = bf16(*mixed);
  of_gate_up.route.source = kNormed;
  of_gate_up.route.x = bf16(*middle);
  of_gate_up.route.residual = bf16(*residual);
  of_gate_up.route.update = o->typed_data();
  of_gate_up.route.parts = of_o.splits;
  of_down.route.source = kGated;
  of_down.route.update = gate_up->typed_data();
  of_down.route.parts = of_gate_up.splits;

  AttentionArgs attention{};
  attention.qkv = qkv->typed_data();
  attention.cosine = rotation.typed_data();
  attention.sine = attention.cosine + rotation.element_count() / 2;
  attention.position = position.typed_data();
  attention.key = bf16(*key_out);
  attention.value = bf16(*value_out);
  attention.out = bf16(*mixed);
  attention.parts = of_qkv.splits;
  attention.batch = static_cast<int>(key.dimensions()[1]);
  attention.slots = static_cast<int>(key.dimensions()[2]);
  attention.kv_heads = static_cast<int>(key.dimensions()[3]);
  attention.ranks = attention_ranks(attention.batch, attention.kv_heads);
  const int size = static_cast<int>(key.dimensions()[4]);
  const int group = static_cast<int>(mixed->dimensions()[1]) / (attention.kv_heads * size);

  const int layers = static_cast<int>(key.dimensions()[0]);
  for (int layer = 0; layer < layers; ++layer) {
    of_qkv.route.x = layer > 0 ? bf16(*residual) : bf16(x);
    of_qkv.route.parts = layer > 0 ? of_down.splits : 0;
    of_qkv.route.gain = attention_norm.typed_data() + static_cast<size_t>(layer) * of_qkv.route.inputs;
    of_gate_up.route.gain = mlp_norm.typed_data() + static_cast<size_t>(layer) * of_gate_up.route.inputs;
    attention.layer_index = layer;
    // The first kernel is not launched early: what was written before the step, attention reads before it waits.
    if (cudaError_t error = run(stream, of_qkv, layer, layer > 0)) return check(error, "decode_layers");
    if (cudaError_t error = launch_attention(stream, attention, true, group, size)) return check(error, "decode_layers");
    for (const Site* site : {&of_o, &of_gate_up, &of_down})
      if (cudaError_t error = run(stream, *site, layer, true)) return check(error, "decode_layers");
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace mobiquant

XLA_FFI_DEFINE_HANDLER_SYMBOL(DecodeLayers, mobiquant::decode_layers,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<mobiquant::Halves>()
                                  .Arg<mobiquant::Floats>()
                                  .Arg<mobiquant::Integers>()
                                  .Arg<mobiquant::Floats>()
                                  .Arg<mobiquant::Floats>()
                                  .Arg<mobiquant::Halves>()
                                  .Arg<mobiquant::Halves>()
                                  .Arg<mobiquant::Floats>()
                                  .Arg<mobiquant::Integers>()
                                  .RemainingArgs()
                                  .Ret<mobiquant::Halves>()
                                  .Ret<mobiquant::Halves>()
                                  .Ret<mobiquant::Halves>()
                                  .Ret<mobiquant::Floats>()
                                  .Ret<mobiquant::Integers>()
                                  .Ret<mobiquant::Halves>()
                                  .Ret<mobiquant::Halves>()
                                  .Ret<mobiquant::Halves>()
                                  .Ret<mobiquant::Floats>()
                                  .Ret<mobiquant::Floats>()
                                  .Ret<mobiquant::Floats>()
                                  .Attr<float>("eps")
                                  .Attr<ffi::Span<const int64_t>>("qkv_ends")
                                  .Attr<ffi::Span<const int64_t>>("o_ends")
                                  .Attr<ffi::Span<const int64_t>>("gate_up_ends")
                                  .Attr<ffi::Span<const int64_t>>("down_ends")
                                  .Attr<int64_t>("version"),
                              {ffi::Traits::kCmdBufferCompatible});
