#include "skinny_launch.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <limits>

#include "device.h"
#include "launch.h"

namespace fxfuse {
namespace {

// Estimates for an H200, in cycles or bytes a cycle: what one SM takes in, what the memory and the
// L2 give all of them together, what a tile takes beyond its stages, and what a cluster adds.
constexpr double kSmRate = 24;
constexpr double kMemoryRate = 2500;
constexpr double kL2Rate = 3000;
constexpr double kStageLatency = 250;
constexpr double kOnce = 4000;
constexpr double kCluster = 2000;

// A stage is bound by its arithmetic (two warps to a scheduler, a tenth of which is overhead), by
// what the SM takes in, or by its share of the memory or the L2, which serves A.
double StageCost(const SkinnyKernel& kernel, int groups, const fxfuse_problem& problem,
                 int64_t blocks) {
  const double bytes_b = kSkinnyThreads * 16.0 * kernel.columns;
  const double bytes = bytes_b + 4.0 * kSkinnyStep * groups * static_cast<double>(problem.m);
  const double arithmetic = 2 * 1.1 * 4 * kernel.rows * kernel.columns;
  return std::max({kStageLatency + arithmetic, bytes / kSmRate, blocks * bytes_b / kMemoryRate,
                   blocks * bytes / kL2Rate});
}

// How many clusters of `split` blocks run at a time: one block has an SM for itself.
int Resident(int split, const DeviceLimits& device) {
  return split == 1 ? device.sm_count : device.hopper_clusters[split];
}

double Cost(const SkinnyKernel& kernel, int groups, int split, const fxfuse_problem& problem,
            const DeviceLimits& device) {
  const int64_t tiles = CeilDivide(problem.n, kernel.TileColumns(groups));
  const int64_t resident = Resident(split, device);
  const int64_t stages = kernel.Range(problem.k, groups, split) / (groups * kSkinnyStep);
  const double stage =
      StageCost(kernel, groups, problem, std::min<int64_t>(tiles, resident) * split);
  return static_cast<double>(CeilDivide(tiles, resident)) *
         (stages * stage + kOnce + (split > 1 ? kCluster : 0));
}

int SharedBytes(const SkinnyKernel& kernel, int groups, int split, int depth) {
  return depth * kernel.StageBytes(groups) + kernel.InboxBytes(groups, split);
}

// The deepest ring that fits, or 0.
int Depth(const SkinnyKernel& kernel, int groups, int split, const DeviceLimits& device) {
  for (const int depth : kSkinnyDepths) {
    if (SharedBytes(kernel, groups, split, depth) <= device.shared_bytes_per_block) return depth;
  }
  return 0;
}

struct Division {
  int groups = 0;  // 0: there is none
  int split = 0;
  double cost = std::numeric_limits<double>::infinity();
};

// The cheapest way to divide K for a kernel, or the one the problem asks for.
Division BestDivision(const SkinnyKernel& kernel, const fxfuse_problem& problem,
                      const DeviceLimits& device) {
  Division best;
  for (int split = 1; split <= (device.hopper ? kSkinnyMaxSplit : 1); split *= 2) {
    if (Resident(split, device) == 0) break;
    for (int groups = 1; groups <= kSkinnyWarps; groups *= 2) {
      if (Depth(kernel, groups, split, device) == 0) continue;
      const int tile = 16 * kernel.TileColumns(groups) + split;
      if (problem.tile != 0 && problem.tile != tile) continue;
      const double cost = Cost(kernel, groups, split, problem, device);
      if (cost < best.cost) best = {groups, split, cost};
    }
  }
  return best;
}

}  // namespace

SkinnyChoice ChooseSkinny(const fxfuse_problem& problem, bool aligned, const DeviceLimits& device) {
  if (problem.input_dtype != FXFUSE_F32 || problem.b_transposed || problem.planes > 0 || !aligned ||
      problem.m > kSkinnyMaxM || problem.k == 0 || problem.k % 4 != 0 || problem.k > kSkinnyMaxK ||
      (problem.n > 1 && problem.ldb > kSkinnyMaxStride)) {
    return {};
  }
  const SkinnyKernel* const kernel = BestKernel(
      SkinnyF32(), RequiredMath(problem),
      [&](const SkinnyKernel& k) {
        return k.rows >= problem.m && Depth(k, 1, 1, device) > 0 &&
               (problem.tile == 0 || BestDivision(k, problem, device).groups > 0);
      },
      [](const SkinnyKernel& k) { return int{k.rows}; });
  if (kernel == nullptr) return {};
  const Division division = BestDivision(*kernel, problem, device);
  const int depth = Depth(*kernel, division.groups, division.split, device);
  return {kernel, division.groups, division.split, depth};
}

fxfuse_status PrepareSkinny(const char* call, const DeviceLimits& device) {
  const SkinnyKernels all = SkinnyF32();
  for (int i = 0; i < all.count; ++i) {
    const SkinnyKernel& kernel = all.kernel[i];
    cudaFuncAttributes attributes;
    cudaError_t error = cudaFuncGetAttributes(&attributes, kernel.function);  // loads the kernel
    if (error == cudaSuccess) {
      error = cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   device.shared_bytes_per_block);
    }
    if (error != cudaSuccess) return CudaFailure(call, kernel.name, error);
  }
  return FXFUSE_OK;
}

fxfuse_status LaunchSkinny(const char* call, const fxfuse_problem& problem, void* const* pointers,
                           const DeviceLimits& device, const SkinnyChoice& choice, void* stream) {
  const SkinnyKernel& kernel = *choice.kernel;
  SkinnyArguments arguments;
  arguments.a = static_cast<const float*>(pointers[FXFUSE_PTR_A]);
  arguments.b = static_cast<const float*>(pointers[FXFUSE_PTR_B]);
  arguments.lda = problem.lda;
  arguments.ldb = problem.ldb;
  arguments.m = static_cast<int32_t>(problem.m);
  arguments.n = static_cast<int32_t>(problem.n);
  arguments.k = static_cast<int32_t>(problem.k);
  arguments.split = choice.split;
  arguments.range = kernel.Range(problem.k, choice.groups, choice.split);
  arguments.log2_groups = 0;
  while (1 << arguments.log2_groups < choice.groups) ++arguments.log2_groups;
  arguments.depth = choice.depth;
  TranslateProgram(problem, pointers, &arguments.program);
  const int64_t tiles = CeilDivide(problem.n, kernel.TileColumns(choice.groups));
  const LaunchConfig config(device, tiles * choice.split, kSkinnyThreads,
                            SharedBytes(kernel, choice.groups, choice.split, choice.depth), stream,
                            choice.split);
  return Launch(call, kernel.name, kernel.function, config, &arguments);
}

}  // namespace fxfuse
