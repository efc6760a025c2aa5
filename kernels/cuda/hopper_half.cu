// Outputs of 16 bits, and fp32 outputs of "high" precision products.

#include "hopper_instances.cuh"

namespace fxfuse {

HopperKernels HopperHalfChain() {
  return InstantiateHopperChain<DeviceHalfMath, FXFUSE_F16>(
      {{"hopper_128x256_half_chain", "hopper_128x128_half_chain", "hopper_128x64_half_chain",
        "hopper_128x128_half_chain_in_turns", "hopper_64x64_half_chain"}});
}

// Without steps for operands [M, N] nothing is spilled to local memory, where it waits behind
// stores.
HopperKernels HopperHalfRows() {
  static const HopperKernel kernels[] = {
      DescribeHopper<HopperConfig<DeviceHalfMath, FXFUSE_F16, 1, 256, 4, false>>(
          "hopper_128x256_half_rows"),
      DescribeHopper<HopperConfig<DeviceHalfMath, FXFUSE_F16, 1, 128, 7, false, true>>(
          "hopper_128x128_half_rows_in_turns"),
  };
  return {kernels, static_cast<int>(sizeof(kernels) / sizeof(kernels[0]))};
}

HopperKernels HopperHalf() {
  return InstantiateHopper<DeviceHalfMath>(
      {{"hopper_128x256_half", "hopper_128x128_half", "hopper_128x64_half"}});
}

}  // namespace fxfuse
