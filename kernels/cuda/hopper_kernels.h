// The Hopper GEMM's kernels as the host sees them: what they take and which there are.

#ifndef FXFUSE_CUDA_HOPPER_KERNELS_H_
#define FXFUSE_CUDA_HOPPER_KERNELS_H_

#include <cuda.h>

#include "kernel_list.h"

namespace fxfuse {

struct HopperArguments {
  CUtensorMap a;             // A [M, K] in boxes of a tile's rows by 64
  CUtensorMap b;             // B [N, K] in boxes of a tile's columns, divided by the cluster, by 64
  int32_t stages;            // of 64 along K
  int32_t tiles_m, tiles_n;  // tiles_m counts clusters of tiles
  int32_t first;             // instruction the epilogue begins with: 1 where the mainloop adds bias
  const void* bias;          // what the accumulators start with, in pairs; null for zeros
  DeviceProgram program;
};
static_assert(sizeof(HopperArguments) <= 4096, "the limit of kernel parameters");

struct HopperKernel {
  const char* name;
  const void* function;
  int32_t input_dtype;  // fxfuse_dtype
  MathLevel math;
  int16_t tile_m, tile_n;
  int16_t cluster;  // blocks along M that share B
  int32_t shared_bytes;
};

constexpr int kHopperThreads = 384;
constexpr int kMaxHopperKernels = 24;

// The instantiations, in hopper_*.cu.
using HopperKernels = KernelList<HopperKernel>;
HopperKernels HopperBf16();
HopperKernels HopperF16();

}  // namespace fxfuse

#endif  // FXFUSE_CUDA_HOPPER_KERNELS_H_
