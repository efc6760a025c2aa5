// The pointwise kernels of fp32 arithmetic.

#include "math_device.cuh"
#include "pointwise_kernel.cuh"

namespace fxfuse {

const PointwiseKernels* PointwiseF32() {
  static const PointwiseKernels kernels[] = {
      {Describe<PointwiseConfig<DeviceFastMath, 8, 2, true>>("pointwise_fast", MathLevel::kFast),
       DescribeSums<PointwiseConfig<DeviceFastMath, 8, 2, false>>("sums_fast", MathLevel::kFast),
       DescribeGradient<PointwiseConfig<DeviceFastMath, 8, 2, true, 2>>("gradient_fast",
                                                                        MathLevel::kFast)},
      {Describe<PointwiseConfig<DeviceHalfMath, 8, 2, true>>("pointwise_half", MathLevel::kHalf),
       DescribeSums<PointwiseConfig<DeviceHalfMath, 8, 2, false>>("sums_half", MathLevel::kHalf),
       DescribeGradient<PointwiseConfig<DeviceHalfMath, 8, 2, true, 2>>("gradient_half",
                                                                        MathLevel::kHalf)},
      {Describe<PointwiseConfig<DeviceMath, 4, 4, false>>("pointwise_exact", MathLevel::kExact),
       DescribeSums<PointwiseConfig<DeviceMath, 4, 4, true, 2>>("sums_exact", MathLevel::kExact),
       DescribeGradient<PointwiseConfig<DeviceMath, 4, 4, true, 2>>("gradient_exact",
                                                                    MathLevel::kExact)},
  };
  return kernels;
}

}  // namespace fxfuse
