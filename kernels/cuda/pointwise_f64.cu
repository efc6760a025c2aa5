// The pointwise kernel of fp64 arithmetic.

#include "math_double.cuh"
#include "pointwise_kernel.cuh"

namespace fxfuse {

const PointwisePair& PointwiseF64() {
  static const PointwisePair kernels = {
      Describe<PointwiseConfig<DeviceDoubleMath, 4, 2, false>>("pointwise_f64", MathLevel::kDouble),
      DescribeSums<PointwiseConfig<DeviceDoubleMath, 4, 2, false>>("sums_f64", MathLevel::kDouble)};
  return kernels;
}

}  // namespace fxfuse
