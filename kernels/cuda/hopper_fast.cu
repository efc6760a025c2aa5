// All outputs bf16.

#include "hopper_instances.cuh"

namespace fxfuse {

HopperKernels HopperFastChain() {
  return InstantiateHopper<DeviceFastMath, FXFUSE_BF16>(
      {{"hopper_128x256_fast_chain", "hopper_128x128_fast_chain", "hopper_128x64_fast_chain"}});
}

HopperKernels HopperFast() {
  return InstantiateHopper<DeviceFastMath, kNoChain>(
      {{"hopper_128x256_fast", "hopper_128x128_fast", "hopper_128x64_fast"}});
}

}  // namespace fxfuse
