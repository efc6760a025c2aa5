// The tiles of the Hopper route for one math policy; see hopper_*.cu.

#ifndef FXFUSE_CUDA_HOPPER_INSTANCES_CUH_
#define FXFUSE_CUDA_HOPPER_INSTANCES_CUH_

#include "hopper_gemm.cuh"
#include "math_device.cuh"

namespace fxfuse {

// Names of the kernels with tiles of 256, 128 and 64 columns and, for chains, of 128 in turns and
// of 64 rows and 64 columns.
struct HopperNames {
  const char* tile[5];
};

// For any program.
template <class Math>
HopperKernels InstantiateHopper(const HopperNames& names) {
  static const HopperKernel kernels[] = {
      DescribeHopper<HopperConfig<Math, kNoChain, 1, 256, 4>>(names.tile[0]),
      DescribeHopper<HopperConfig<Math, kNoChain, 1, 128, 7>>(names.tile[1]),
      DescribeHopper<HopperConfig<Math, kNoChain, 1, 64, 9>>(names.tile[2]),
  };
  return {kernels, static_cast<int>(sizeof(kernels) / sizeof(kernels[0]))};
}

// For chains of one dtype.
template <class Math, int kChainDtype>
HopperKernels InstantiateHopperChain(const HopperNames& names) {
  static const HopperKernel kernels[] = {
      DescribeHopper<HopperConfig<Math, kChainDtype, 1, 256, 4>>(names.tile[0]),
      DescribeHopper<HopperConfig<Math, kChainDtype, 1, 128, 7>>(names.tile[1]),
      DescribeHopper<HopperConfig<Math, kChainDtype, 1, 64, 9>>(names.tile[2]),
      DescribeHopper<HopperConfig<Math, kChainDtype, 1, 128, 7, true, true>>(names.tile[3]),
      DescribeHopper<HopperConfig<Math, kChainDtype, 1, 64, 12, true, false, 64>>(names.tile[4]),
  };
  return {kernels, static_cast<int>(sizeof(kernels) / sizeof(kernels[0]))};
}

}  // namespace fxfuse

#endif  // FXFUSE_CUDA_HOPPER_INSTANCES_CUH_
