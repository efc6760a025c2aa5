// Products of fp32 matrices in two planes each, for outputs of any dtype.

#include "portable_instances.cuh"

namespace fxfuse {

PortableKernels PortablePlanes() {
  constexpr int32_t kDtype = FXFUSE_F16;
  constexpr MathLevel kMath = MathLevel::kExact;
  static const PortableKernel kernels[] = {
      DescribePortable<PortableHighest<PlanesLargeTile>>("portable_128x128x32_planes", kDtype,
                                                         TileKind::kPlanesLarge, kMath),
      DescribePortable<PortableHighest<PlanesSmallTile>>("portable_64x64x32_planes", kDtype,
                                                         TileKind::kPlanesSmall, kMath),
      DescribePortable<PortableHighest<PlanesSkinnyTile>>("portable_32x64x32_planes", kDtype,
                                                          TileKind::kPlanesSkinny, kMath),
  };
  return {kernels, static_cast<int>(sizeof(kernels) / sizeof(kernels[0]))};
}

}  // namespace fxfuse
