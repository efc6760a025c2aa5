// bf16 inputs.

#include "hopper_instances.cuh"

namespace fxfuse {

HopperKernels HopperBf16() {
  return InstantiateHopper<__nv_bfloat16, DeviceFastMath>(
      {"hopper_bf16_128x256x64", "hopper_bf16_128x128x64", "hopper_bf16_128x64x64",
       "hopper_bf16_128x128x64_f32"},
      FXFUSE_BF16, MathLevel::kFast);
}

}  // namespace fxfuse
