// All outputs bf16.

#include "hopper_instances.cuh"

namespace fxfuse {

HopperKernels HopperFastChain() {
  return InstantiateHopperChain<DeviceFastMath, FXFUSE_BF16>(
      {{"hopper_128x256_fast_chain", "hopper_128x128_fast_chain", "hopper_128x64_fast_chain",
        "hopper_128x128_fast_chain_in_turns", "hopper_64x64_fast_chain"}});
}

HopperKernels HopperFast() {
  return InstantiateHopper<DeviceFastMath>(
      {{"hopper_128x256_fast", "hopper_128x128_fast", "hopper_128x64_fast"}});
}

}  // namespace fxfuse
