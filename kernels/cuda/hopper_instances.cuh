// The tiles of the Hopper route for one input type; see hopper_*.cu.

#ifndef FXFUSE_CUDA_HOPPER_INSTANCES_CUH_
#define FXFUSE_CUDA_HOPPER_INSTANCES_CUH_

#include "hopper_gemm.cuh"
#include "math_device.cuh"

namespace fxfuse {

struct HopperNames {
  const char *wide, *middle, *narrow, *middle_f32;
};

// `Math`, of level `level`, serves outputs of the input's type; the last kernel any output.
template <class Input, class Math>
HopperKernels InstantiateHopper(const HopperNames& names, int32_t dtype, MathLevel level) {
  static const HopperKernel kernels[] = {
      DescribeHopper<HopperConfig<Input, Math, 256, 4, 1>>(names.wide, dtype, level),
      DescribeHopper<HopperConfig<Input, Math, 128, 6, 1>>(names.middle, dtype, level),
      DescribeHopper<HopperConfig<Input, Math, 64, 8, 1>>(names.narrow, dtype, level),
      DescribeHopper<HopperConfig<Input, DeviceMath, 128, 6, 1>>(names.middle_f32, dtype,
                                                                 MathLevel::kExact),
  };
  return {kernels, static_cast<int>(sizeof(kernels) / sizeof(kernels[0]))};
}

}  // namespace fxfuse

#endif  // FXFUSE_CUDA_HOPPER_INSTANCES_CUH_
