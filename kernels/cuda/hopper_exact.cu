// Outputs of fp32.

#include "hopper_instances.cuh"

namespace fxfuse {

HopperKernels HopperExact() {
  static const HopperKernel kernel =
      DescribeHopper<HopperConfig<DeviceMath, kNoChain, 128, 7>>("hopper_128x128_exact");
  return {&kernel, 1};
}

}  // namespace fxfuse
