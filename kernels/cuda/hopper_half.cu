// Outputs of 16 bits, and fp32 outputs of "high" precision products.

#include "hopper_instances.cuh"

namespace fxfuse {

HopperKernels HopperHalfChain() {
  return InstantiateHopper<DeviceHalfMath, FXFUSE_F16>(
      {{"hopper_128x256_half_chain", "hopper_128x128_half_chain", "hopper_128x64_half_chain"}});
}

HopperKernels HopperHalf() {
  return InstantiateHopper<DeviceHalfMath, kNoChain>(
      {{"hopper_128x256_half", "hopper_128x128_half", "hopper_128x64_half"}});
}

}  // namespace fxfuse
