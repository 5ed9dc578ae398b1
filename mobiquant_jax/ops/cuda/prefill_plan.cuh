// What comes before the prefill kernel: tokens sorted by depth, cut into tiles and copied into the tiles' order.
#pragma once

#include "common.cuh"

namespace mobiquant {

constexpr int kTileTokens = 256;  // at most
constexpr int kUnit = 16;         // of a tile's width
constexpr int kWidths = kTileTokens / kUnit;
constexpr int kLeastUnits = 4;  // narrower tiles are not tried, which bounds their number
constexpr int kItemTiles = 8;  // of 16 outputs: two warpgroups of four warps
constexpr int kStageInputs = 64;
constexpr int kCluster = 2;  // thread blocks that share a token tile
constexpr int kPlanThreads = 1024;
constexpr int kPackThreads = 256;
constexpr int kPackStages = 4;  // a warp copies 512 bytes of a token at a time
constexpr int kPackRows = 8;    // rows that a warp has on their way

// The width of a tile of so many tokens, in units.
__host__ __device__ inline int width_of(int tokens) { return (tokens + kUnit - 1) / kUnit; }
// Rows of the packed tokens of a segment: each of the runs ends with a tile that is filled up to its width.
__host__ __device__ inline int packed_rows(int tokens) { return (width_of(tokens) + kMaxSlices - 1) * kUnit; }

struct PrefillArgs {
  Weights weights;
  Segments segments;
  const __nv_bfloat16* x;  // [tokens, inputs]
  const int32_t* depth;    // [segments, tokens]
  int32_t* plan;           // see Plan
  __nv_bfloat16* packed;   // [segments, packed_rows(tokens), 128 * blocks]: see `pack_kernel`
  void* out;               // [tokens, 16 * tiles]
  int tokens, inputs;
  int clusters;  // of the prefill kernel's grid
};

// What `plan_kernel` writes: token tiles of each segment, the wide ones first, and each segment's tokens by depth.
struct Plan {
  int4* tile;  // [segments, most]: depth, first, tokens, first packed row
  int* tiles_from;  // [segments, widths + 1]: how many are 1 unit wide or more, 2 or more, ...
  int* token;  // [segments, tokens]
  int most;
  __host__ __device__ Plan(int32_t* base, int tokens) : most(most_tiles(tokens)) {
    tile = reinterpret_cast<int4*>(base);
    tiles_from = base + kMaxSegments * most * 4;
    token = tiles_from + kMaxSegments * (kWidths + 1);
  }
  __host__ __device__ static int most_tiles(int tokens) { return tokens / (kLeastUnits * kUnit) + kMaxSlices; }
  __host__ __device__ static int ints(int tokens) {
    return kMaxSegments * (most_tiles(tokens) * 4 + kWidths + 1 + tokens);
  }
  __device__ int at_least(int segment, int width) const { return tiles_from[segment * (kWidths + 1) + width - 1]; }
};

// Groups of outputs that the items of a segment take, a cluster each.
__device__ inline int output_groups(const Segments& segments, int segment) {
  constexpr int kShared = kCluster * kItemTiles;
  const int begin = segment > 0 ? segments.ends[segment - 1] : 0;
  return (segments.ends[segment] - begin + kShared - 1) / kShared;
}

__device__ inline int run_length(uint64_t counts, int k) { return static_cast<int>(counts >> (16 * k) & 0xffff); }

// A run cut evenly into tiles of up to `most` units: all but the last are `even` units wide.
struct Cut {
  int tiles, even, last;
  __device__ Cut(int run, int most) {
    tiles = (run + most * kUnit - 1) / (most * kUnit);
    even = tiles > 0 ? width_of((run + tiles - 1) / tiles) : 0;
    last = width_of(run - (tiles - 1) * even * kUnit);
  }
};

// The most units of a tile with which all turns take least; the same in all lanes of a warp, each of which tries one.
__device__ inline int best_cut(const PrefillArgs& args, const uint64_t (&runs)[kMaxSegments],
                               int (&items)[kWidths + 1][32], int lane) {
  constexpr int kFixed = 10;  // an item takes some 0.12 us for each of a tile's tokens, at 4096 inputs, and 19 us besides
  const int most = max(min(lane + 1, kWidths), kLeastUnits);
  for (int width = 0; width <= kWidths; ++width) items[width][lane] = 0;
#pragma unroll
  for (int segment = 0; segment < kMaxSegments; ++segment) {
    if (segment >= args.segments.count) break;
    const int groups = output_groups(args.segments, segment);
#pragma unroll
    for (int k = 0; k < kMaxSlices; ++k) {
      const Cut cut(run_length(runs[segment], k), most);
      if (cut.tiles == 0) continue;
      items[cut.even][lane] += (cut.tiles - 1) * groups;
      items[cut.last][lane] += groups;
    }
  }
  int done = 0, turns = 0, cost = 0;
  for (int width = kWidths; width > 0; --width) {
    done += items[width][lane];
    const int begun = (done + args.clusters - 1) / args.clusters;
    cost += (begun - turns) * (width + kFixed);
    turns = begun;
  }
  return kWidths - __reduce_min_sync(~0u, cost * kWidths + kWidths - most) % kWidths;  // of equal ones the widest
}

struct PlanShared {
  uint64_t warp_counts[kMaxSegments][32];
  int items[kWidths + 1][32];
  int chosen;
};

// Sorts the tokens of one segment (a thread block each) by depth, in order, and cuts the runs into even tiles.
__global__ void __launch_bounds__(kPlanThreads) plan_kernel(const __grid_constant__ PrefillArgs args) {
  static_assert(kPlanThreads == 32 * 32);
  extern __shared__ __align__(1024) unsigned char shared[];
  auto& [warp_counts, items, chosen] = *reinterpret_cast<PlanShared*>(shared);
  launch_dependents();
  const Plan plan(args.plan, args.tokens);
  const int own = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int share = (args.tokens + kPlanThreads - 1) / kPlanThreads;
  const int begin = min(static_cast<int>(threadIdx.x) * share, args.tokens), end = min(begin + share, args.tokens);
  const auto up_to_lane = [lane](uint64_t counts) {
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const uint64_t other = __shfl_up_sync(~0u, counts, step);
      if (lane >= step) counts += other;
    }
    return counts;
  };
  uint64_t mine[kMaxSegments]{};  // this thread's tokens of each depth: four counts of 16 bits
#pragma unroll 2
  for (int i = begin; i < end; ++i) {  // the segments' loop inside, so that their loads are on their way at once
#pragma unroll
    for (int segment = 0; segment < kMaxSegments; ++segment) {
      const int from = min(segment, args.segments.count - 1);  // beyond the last again, unused
      mine[segment] += 1ull << (16 * (args.depth[from * args.tokens + i] - 1));
    }
  }
  uint64_t before = 0;  // tokens of each depth before this thread's
#pragma unroll
  for (int segment = 0; segment < kMaxSegments; ++segment) {
    if (segment >= args.segments.count) break;
    const uint64_t counts = up_to_lane(mine[segment]);
    if (segment == own) before = counts - mine[segment];
    if (lane == 31) warp_counts[segment][warp] = counts;
  }
  __syncthreads();
  uint64_t runs[kMaxSegments]{}, total = 0;
#pragma unroll
  for (int segment = 0; segment < kMaxSegments; ++segment) {
    if (segment >= args.segments.count) break;
    const uint64_t counts = up_to_lane(warp_counts[segment][lane]);
    runs[segment] = __shfl_sync(~0u, counts, 31);
    const uint64_t earlier = __shfl_sync(~0u, counts, max(warp - 1, 0));
    if (segment == own) total = runs[segment], before += warp > 0 ? earlier : 0;
  }
  if (warp == 0) {
    const int most = best_cut(args, runs, items, lane);
    if (lane == 0) chosen = most;
  }
  __syncthreads();
  // Of each run two sets of equal tiles, all but the last and the last, at even and odd places.
  int next[kMaxSlices], first[kMaxSlices], count[2 * kMaxSlices], width[2 * kMaxSlices];
#pragma unroll
  for (int k = 0, start = 0; k < kMaxSlices; ++k) {
    const int run = run_length(total, k);
    const Cut cut(run, chosen);
    next[k] = start + run_length(before, k);
    first[k] = start;
    start += run;
    count[2 * k] = max(cut.tiles - 1, 0), count[2 * k + 1] = cut.tiles > 0;
    width[2 * k] = cut.even, width[2 * k + 1] = cut.last;
  }
#pragma unroll
  for (int set = 0; set < 2 * kMaxSlices; ++set) {
    const int k = set / 2, skipped = set % 2 * count[2 * k] * width[2 * k] * kUnit, run = run_length(total, k);
    int tile = 0, row = 0;  // of the sets before, in order of falling width
#pragma unroll
    for (int other = 0; other < 2 * kMaxSlices; ++other) {
      const bool earlier = width[other] > width[set] || (width[other] == width[set] && other < set);
      tile += earlier ? count[other] : 0;
      row += earlier ? count[other] * width[other] * kUnit : 0;
    }
    const int tokens = width[set] * kUnit;
    for (int t = threadIdx.x; t < count[set]; t += kPlanThreads)
      plan.tile[own * plan.most + tile + t] =
          make_int4(k + 1, first[k] + skipped + t * tokens, min(tokens, run - skipped - t * tokens), row + t * tokens);
  }
  if (threadIdx.x <= kWidths) {
    int tiles = 0;
#pragma unroll
    for (int set = 0; set < 2 * kMaxSlices; ++set) tiles += width[set] > threadIdx.x ? count[set] : 0;
    plan.tiles_from[own * (kWidths + 1) + threadIdx.x] = tiles;
  }
  for (int i = begin; i < end; ++i) {
    int position = 0;
#pragma unroll
    for (int k = 0; k < kMaxSlices; ++k)
      if (args.depth[own * args.tokens + i] == k + 1) position = next[k]++;
    plan.token[own * args.tokens + position] = i;
  }
}

// Copies tokens into the order of the plan: of a tile of r rows stage after stage of r rows of 128 bytes, whose 16-byte
// chunks are swizzled. Rows and inputs that there are none of become zero.
__global__ void __launch_bounds__(kPackThreads) pack_kernel(const __grid_constant__ PrefillArgs args) {
  launch_dependents();
  const Plan plan(args.plan, args.tokens);
  const int segment = blockIdx.y, lane = threadIdx.x % 32;
  const int stage = blockIdx.z * kPackStages + lane / 8, chunk = lane % 8;
  const int padded = args.weights.blocks * kBlockInputs, input = stage * kStageInputs + chunk * 8;
  wait_for_previous();
  if (static_cast<int>(blockIdx.x) >= plan.at_least(segment, 1) || input >= padded) return;
  const int4 tile = plan.tile[segment * plan.most + blockIdx.x];
  const int rows = width_of(tile.z) * kUnit;
  __nv_bfloat16* to = args.packed + static_cast<size_t>(segment * packed_rows(args.tokens) + tile.w) * padded +
                      static_cast<size_t>(stage) * rows * kStageInputs;
  const int* token = plan.token + segment * args.tokens + tile.y;
  constexpr int kWarps = kPackThreads / 32;
  for (int first = threadIdx.x / 32; first < rows; first += kWarps * kPackRows) {
    int source[kPackRows];
    uint4 values[kPackRows];  // all loads before the first store
#pragma unroll
    for (int k = 0; k < kPackRows; ++k) source[k] = token[min(first + k * kWarps, tile.z - 1)];
#pragma unroll
    for (int k = 0; k < kPackRows; ++k) {
      values[k] = make_uint4(0, 0, 0, 0);
      if (first + k * kWarps < tile.z && input < args.inputs)
        values[k] = __ldg(reinterpret_cast<const uint4*>(args.x + static_cast<size_t>(source[k]) * args.inputs + input));
    }
#pragma unroll
    for (int k = 0; k < kPackRows; ++k) {
      const int row = first + k * kWarps;
      if (row >= rows) break;
      // A plain store of these is compiled to four of 4 bytes.
      __stcg(reinterpret_cast<uint4*>(to + row * kStageInputs + (chunk ^ (row & 7)) * 8), values[k]);
    }
  }
}

// One work item of this thread block; `tokens` is 0 past the last. Both blocks of a cluster have the same but for `tile`.
struct PrefillItem {
  int segment, depth, first, tokens, row, tile, end_tile;
};

// Walks the items in order of falling width; the token tiles of one width and one set of weights are neighbours, which
// run at the same time.
struct PrefillItems {
  const PrefillArgs& args;
  const Plan& plan;
  const int rank;
  uint32_t widths = 0;         // that tiles still to come have: a bit each
  int segment = 0, start = 0;  // start: items before those of this segment and of the widest of these

  __device__ PrefillItems(const PrefillArgs& args, const Plan& plan, int rank) : args(args), plan(plan), rank(rank) {
    const int width = threadIdx.x % 32 + 1;
    bool any = false;
    for (int s = 0; s < args.segments.count && width <= kWidths; ++s)
      any |= plan.at_least(s, width) > plan.at_least(s, width + 1);
    widths = __ballot_sync(~0u, any);
  }

  // Indices must not fall.
  __device__ __forceinline__ PrefillItem at(int index) {
    while (widths != 0) {
      const int width = 32 - __clz(widths), wider = plan.at_least(segment, width + 1);
      const int tiles = plan.at_least(segment, width) - wider, items = output_groups(args.segments, segment) * tiles;
      const int own = index - start;
      if (own < items) {
        const int4 tile = plan.tile[segment * plan.most + wider + own % tiles];
        const int begin = segment > 0 ? args.segments.ends[segment - 1] : 0;
        const int first_tile = begin + (own / tiles * kCluster + rank) * kItemTiles;
        return {segment, tile.x, tile.y, tile.z, tile.w, first_tile, args.segments.ends[segment]};
      }
      start += items;
      if (++segment == args.segments.count) segment = 0, widths &= ~(1u << (width - 1));
    }
    return {};
  }
};

}  // namespace mobiquant
