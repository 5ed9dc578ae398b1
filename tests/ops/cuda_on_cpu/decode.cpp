// The decode kernel behind a C function. WARPS is small to be quick; the loops and their ends are the same.
#include "decode.cuh"

using namespace mobiquant;

template <int NT>
bool run(DecodeArgs args, int splits, int walkers) {
  constexpr int kWarps = MOBIQUANT_WARPS, kSlots = 3;
  using Shape = DecodeShape<MOBIQUANT_GROUPS, kWarps, kSlots>;
  args.split_blocks = (args.weights.blocks + splits - 1) / splits;
  args.reduced_tiles = std::min(2, reduced_tiles(kWarps, args.tokens));
  const dim3 grid{static_cast<unsigned>(walkers), static_cast<unsigned>(splits)};
  return launch(decode_kernel<NT, MOBIQUANT_GROUPS, kWarps, kSlots>, grid, Shape::kThreads,
                Shape::total(args.tokens, args.split_blocks), args);
}

// False if an access was wrong. sizes: tiles, blocks, tokens, inputs, splits, walkers, segments, and the segments' ends.
extern "C" bool decode(const unsigned char* const* planes, const void* affine, const int32_t* layer, const void* x,
                       const int32_t* depth, float* out, const int32_t* sizes) {
  DecodeArgs args{};
  for (int e = 0; e < kMaxSlices; ++e) args.weights.planes[e] = planes[e];
  args.weights.affine = static_cast<const uint2*>(affine);
  args.weights.layer = layer;
  args.weights.tiles = sizes[0], args.weights.blocks = sizes[1];
  args.tokens = sizes[2], args.inputs = sizes[3];
  args.segments.count = sizes[6];
  for (int s = 0; s < sizes[6]; ++s) args.segments.ends[s] = sizes[7 + s];
  args.x = static_cast<const __nv_bfloat16*>(x);
  args.depth = depth;
  args.out = out;
  static const int32_t expected = 3;
  args.expected = &expected;
  args.prefetch = 5 * kPieceBytes;
  if (args.tokens <= 4) return run<1>(args, sizes[4], sizes[5]);
  return args.tokens <= 8 ? run<2>(args, sizes[4], sizes[5]) : run<4>(args, sizes[4], sizes[5]);
}
