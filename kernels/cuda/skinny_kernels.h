// The fp32 GEMM for few rows as the host sees it: what its kernels take and which there are.

#ifndef FXFUSE_CUDA_SKINNY_KERNELS_H_
#define FXFUSE_CUDA_SKINNY_KERNELS_H_

#include "kernel_list.h"

namespace fxfuse {

constexpr int kSkinnyMaxM = 32;     // rows of A
constexpr int kSkinnyMaxSplit = 8;  // blocks that divide K: the largest portable cluster
constexpr int64_t kSkinnyMaxK = 1 << 28;
constexpr int64_t kSkinnyMaxStride = 1 << 26;  // of B, in elements: 32 bits count offsets in a tile

constexpr int kSkinnyWarps = 8;
constexpr int kSkinnyThreads = kSkinnyWarps * 32;

// Of the 32 lanes of a warp 8 divide K, each four elements of every 32, and 4 divide the columns.
constexpr int kSkinnyLanesK = 8;
constexpr int kSkinnyLanesN = 32 / kSkinnyLanesK;
constexpr int kSkinnyStep = 4 * kSkinnyLanesK;  // elements of K a warp takes in a stage

constexpr int kSkinnyDepths[] = {6, 4, 2};  // of the ring, in stages

struct SkinnyArguments {
  const float* a;
  const float* b;
  int64_t lda, ldb;  // in elements
  int32_t m, n, k;
  int32_t split;        // blocks of a cluster that divide K
  int32_t range;        // elements of K of each, whole stages
  int32_t log2_groups;  // groups of warps that divide those
  int32_t depth;        // one of kSkinnyDepths
  DeviceProgram program;
};
static_assert(sizeof(SkinnyArguments) <= 4096, "the limit of kernel parameters");

// A compiled kernel: `rows` of A, and for each lane `columns` of the tile.
struct SkinnyKernel {
  const char* name;
  const void* function;
  MathLevel math;
  int8_t rows, columns;

  // A tile has all rows of A and so many columns where `groups` groups of warps divide K.
  int TileColumns(int groups) const { return kSkinnyWarps / groups * kSkinnyLanesN * int{columns}; }
  // Elements of K for each of `split` blocks: whole stages.
  int32_t Range(int64_t k, int groups, int split) const {
    const int64_t stage = int64_t{groups} * kSkinnyStep;
    return static_cast<int32_t>(CeilDivide(CeilDivide(k, split), stage) * stage);
  }
  // Of one stage of the ring.
  int StageBytes(int groups) const {
    return (kSkinnyThreads * 4 * int{columns} + groups * kSkinnyStep * int{rows}) * 4;
  }
  // Behind the ring: what the blocks of a cluster send.
  int InboxBytes(int groups, int split) const {
    return split > 1 ? TileColumns(groups) * int{rows} * 4 : 0;
  }
};

// The instantiations, in skinny_f32.cu.
using SkinnyKernels = KernelList<SkinnyKernel>;
SkinnyKernels SkinnyF32();

}  // namespace fxfuse

#endif  // FXFUSE_CUDA_SKINNY_KERNELS_H_
