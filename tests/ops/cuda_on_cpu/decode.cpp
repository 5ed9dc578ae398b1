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

// False if an access was wrong. sizes: tiles, blocks, tokens, inputs, splits, walkers, layers, bytes to fetch ahead,
// segments, and the segments' ends. `expected`: slices to fetch, or null; becomes the bytes that were fetched.
extern "C" bool decode(const unsigned char* const* planes, const void* affine, const int32_t* layer, const void* x,
                       const int32_t* depth, float* out, const int32_t* sizes, int32_t* expected) {
  DecodeArgs args{};
  for (int e = 0; e < kMaxSlices; ++e) args.weights.planes[e] = planes[e];
  args.weights.affine = static_cast<const uint2*>(affine);
  args.weights.layer = layer;
  args.weights.tiles = sizes[0], args.weights.blocks = sizes[1];
  args.tokens = sizes[2], args.inputs = sizes[3];
  args.prefetch = sizes[7];
  args.segments.count = sizes[8];
  for (int s = 0; s < sizes[8]; ++s) args.segments.ends[s] = sizes[9 + s];
  args.x = static_cast<const __nv_bfloat16*>(x);
  args.depth = depth;
  args.out = out;
  args.expected = expected;
  const size_t pieces = static_cast<size_t>(sizes[6]) * args.weights.tiles * args.weights.blocks;
  readable.clear();
  for (const unsigned char* plane : args.weights.planes)
    readable.emplace_back(reinterpret_cast<const char*>(plane), pieces * kPieceBytes);
  readable.emplace_back(static_cast<const char*>(affine), pieces * MOBIQUANT_GROUPS * 64);
  fetched = 0;
  const auto runs = args.tokens <= 4 ? run<1> : args.tokens <= 8 ? run<2> : run<4>;
  const bool right = runs(args, sizes[4], sizes[5]);
  if (expected) *expected = static_cast<int32_t>(fetched);
  return right;
}
