// The pointwise kernel of fp64 arithmetic.

#include "math_double.cuh"
#include "pointwise_kernel.cuh"

namespace fxfuse {

const PointwiseKernels& PointwiseF64() {
  using Config = PointwiseConfig<DeviceDoubleMath, 4, 2, false>;
  static const PointwiseKernels kernels = {Describe<Config>("pointwise_f64", MathLevel::kDouble),
                                           DescribeSums<Config>("sums_f64", MathLevel::kDouble),
                                           DescribeSums<Config>("sums_f64", MathLevel::kDouble)};
  return kernels;
}

}  // namespace fxfuse
