// The pointwise kernel of fp64 arithmetic.

#include "math_double.cuh"
#include "pointwise_kernel.cuh"

namespace fxfuse {

const PointwiseKernel& PointwiseF64() {
  static const PointwiseKernel kernel =
      Describe<PointwiseConfig<DeviceDoubleMath, 4, 2, false>>("pointwise_f64", MathLevel::kDouble);
  return kernel;
}

}  // namespace fxfuse
