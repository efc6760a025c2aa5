// The pointwise kernels of fp32 arithmetic.

#include "math_device.cuh"
#include "pointwise_kernel.cuh"

namespace fxfuse {

const PointwisePair* PointwiseF32() {
  static const PointwisePair kernels[] = {
      {Describe<PointwiseConfig<DeviceFastMath, 8, 2, true>>("pointwise_fast"),
       DescribeSums<SumsConfig<DeviceFastMath, 8, 4>>("sums_fast")},
      {Describe<PointwiseConfig<DeviceHalfMath, 8, 2, true>>("pointwise_half"),
       DescribeSums<SumsConfig<DeviceHalfMath, 8, 4>>("sums_half")},
      {Describe<PointwiseConfig<DeviceMath, 4, 4, false>>("pointwise_exact"),
       DescribeSums<SumsConfig<DeviceMath, 4, 4>>("sums_exact")},
  };
  return kernels;
}

}  // namespace fxfuse
