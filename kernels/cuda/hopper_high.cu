// fp32 outputs of "high" precision products.

#include "hopper_instances.cuh"

namespace fxfuse {

HopperKernels HopperHighChain() {
  return InstantiateHopperChain<DeviceHalfMath, FXFUSE_F32>(
      {{"hopper_128x256_high_chain", "hopper_128x128_high_chain", "hopper_128x64_high_chain",
        "hopper_128x128_high_chain_in_turns", "hopper_64x64_high_chain"}});
}

}  // namespace fxfuse
