// Products of fp32 matrices in two planes each, for outputs of any dtype.

#include "hopper_instances.cuh"

namespace fxfuse {
namespace {

// Tiles of 128 and 64 columns.
template <int kChainDtype>
HopperKernels Instantiate(const char* wide, const char* narrow) {
  static const HopperKernel kernels[] = {
      DescribeHopper<HopperConfig<DeviceMath, kChainDtype, 2, 128, 3>>(wide),
      DescribeHopper<HopperConfig<DeviceMath, kChainDtype, 2, 64, 4>>(narrow),
  };
  return {kernels, static_cast<int>(sizeof(kernels) / sizeof(kernels[0]))};
}

}  // namespace

HopperKernels HopperPlanesChain() {
  return Instantiate<FXFUSE_F32>("hopper_128x128_planes_chain", "hopper_128x64_planes_chain");
}

HopperKernels HopperPlanes() {
  return Instantiate<kNoChain>("hopper_128x128_planes", "hopper_128x64_planes");
}

}  // namespace fxfuse
