// fp16 inputs.

#include "hopper_instances.cuh"

namespace fxfuse {

HopperKernels HopperF16() {
  return InstantiateHopper<__half, DeviceHalfMath>(
      {"hopper_f16_128x256x64", "hopper_f16_128x128x64", "hopper_f16_128x64x64",
       "hopper_f16_128x128x64_f32"},
      FXFUSE_F16, MathLevel::kHalf);
}

}  // namespace fxfuse
