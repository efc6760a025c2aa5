// The tiles of the Hopper route for one math policy; see hopper_*.cu.

#ifndef FXFUSE_CUDA_HOPPER_INSTANCES_CUH_
#define FXFUSE_CUDA_HOPPER_INSTANCES_CUH_

#include "hopper_gemm.cuh"
#include "math_device.cuh"

namespace fxfuse {

// Of the kernels for chains and for any program, tiles of 256, 128 and 64 columns.
struct HopperNames {
  const char* chain[3];
  const char* any[3];
};

template <class Math>
HopperKernels InstantiateHopper(const HopperNames& names, MathLevel level) {
  static const HopperKernel kernels[] = {
      DescribeHopper<HopperConfig<Math, true, 256, 4>>(names.chain[0], level),
      DescribeHopper<HopperConfig<Math, true, 128, 7>>(names.chain[1], level),
      DescribeHopper<HopperConfig<Math, true, 64, 9>>(names.chain[2], level),
      DescribeHopper<HopperConfig<Math, false, 256, 4>>(names.any[0], level),
      DescribeHopper<HopperConfig<Math, false, 128, 7>>(names.any[1], level),
      DescribeHopper<HopperConfig<Math, false, 64, 9>>(names.any[2], level),
  };
  return {kernels, static_cast<int>(sizeof(kernels) / sizeof(kernels[0]))};
}

}  // namespace fxfuse

#endif  // FXFUSE_CUDA_HOPPER_INSTANCES_CUH_
