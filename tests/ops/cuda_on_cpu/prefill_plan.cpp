// The plan of a prefill, its packed tokens and the items that each cluster takes, behind a C function.
#include "prefill_plan.cuh"

using namespace mobiquant;

namespace {

struct Walk {
  PrefillArgs args;
  int clusters, most;
  int32_t* items;  // [clusters, 2 blocks, most, fields of PrefillItem]
};

__global__ void walk_kernel(const Walk walk) {
  constexpr int kFields = sizeof(PrefillItem) / 4;
  const Plan plan(walk.args.plan, walk.args.tokens);
  const int rank = blockIdx.x % kCluster;
  PrefillItems items(walk.args, plan, rank);
  if (threadIdx.x > 0) return;
  int32_t* to = walk.items + static_cast<size_t>(blockIdx.x) * walk.most * kFields;
  for (int index = blockIdx.x / kCluster;; index += walk.clusters, to += kFields) {
    const PrefillItem item = items.at(index);
    if (item.tokens == 0) break;
    if (index / walk.clusters >= walk.most && !fail("more items of a cluster", index)) return;
    std::memcpy(to, &item, sizeof item);
  }
}

}  // namespace

// False if an access was wrong. sizes: tokens, inputs, blocks, clusters, most items of a cluster, integers of the plan,
// elements of `packed`, segments, and the segments' ends in tiles.
extern "C" bool prefill_plan(const void* x, const int32_t* depth, const int32_t* sizes, int32_t* plan, void* packed,
                             int32_t* items) {
  PrefillArgs args{};
  args.x = static_cast<const __nv_bfloat16*>(x);
  args.depth = depth;
  args.plan = plan;
  args.packed = static_cast<__nv_bfloat16*>(packed);
  args.tokens = sizes[0], args.inputs = sizes[1], args.weights.blocks = sizes[2], args.clusters = sizes[3];
  args.segments.count = sizes[7];
  for (int s = 0; s < sizes[7]; ++s) args.segments.ends[s] = sizes[8 + s];
  const unsigned segments = sizes[7], stages = args.weights.blocks * kBlockInputs / kStageInputs;
  if (Plan::ints(args.tokens) > sizes[5]) return fail("a plan of more integers", Plan::ints(args.tokens));
  const long elements = static_cast<long>(segments) * packed_rows(args.tokens) * args.weights.blocks * kBlockInputs;
  if (elements > sizes[6]) return fail("more packed elements", elements);
  const dim3 copies{static_cast<unsigned>(Plan::most_tiles(args.tokens)), segments, (stages + kPackStages - 1) / kPackStages};
  const Walk walk{args, args.clusters, sizes[4], items};
  return launch(plan_kernel, dim3{segments}, kPlanThreads, sizeof(PlanShared), args) &&
         launch(pack_kernel, copies, kPackThreads, 0, args) &&
         launch(walk_kernel, dim3{static_cast<unsigned>(args.clusters * kCluster)}, 32, 0, walk);
}
