// fp32 outputs of products of 16-bit matrices.

#include "hopper_instances.cuh"

namespace fxfuse {

HopperKernels HopperExact() {
  static const HopperKernel kernel =
      DescribeHopper<HopperConfig<DeviceMath, kNoChain, 1, 128, 7>>("hopper_128x128_exact");
  return {&kernel, 1};
}

}  // namespace fxfuse
