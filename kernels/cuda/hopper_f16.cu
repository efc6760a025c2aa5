// fp16 inputs.

#include "hopper_gemm.cuh"
#include "math_device.cuh"

namespace fxfuse {
namespace {

using Input = __half;
template <int kN, int kStages>
using Fast = HopperConfig<Input, DeviceHalfMath, kN, kStages, 1>;
template <int kN, int kStages>
using Exact = HopperConfig<Input, DeviceMath, kN, kStages, 1>;

}  // namespace

HopperKernels HopperF16() {
  constexpr int32_t kDtype = FXFUSE_F16;
  static const HopperKernel kernels[] = {
      DescribeHopper<Fast<256, 4>>("hopper_f16_128x256x64", kDtype, MathLevel::kHalf),
      DescribeHopper<Fast<128, 6>>("hopper_f16_128x128x64", kDtype, MathLevel::kHalf),
      DescribeHopper<Fast<64, 8>>("hopper_f16_128x64x64", kDtype, MathLevel::kHalf),
      DescribeHopper<Exact<128, 6>>("hopper_f16_128x128x64_f32", kDtype, MathLevel::kExact),
  };
  return {kernels, static_cast<int>(sizeof(kernels) / sizeof(kernels[0]))};
}

}  // namespace fxfuse
