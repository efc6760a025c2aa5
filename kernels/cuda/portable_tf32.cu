// fp32 inputs multiplied as TF32, outputs of any type.

#include "portable_instances.cuh"

namespace fxfuse {

PortableKernels PortableTf32() {
  using Input = float;
  constexpr int32_t kDtype = FXFUSE_F32;
  constexpr MathLevel kMath = MathLevel::kExact;
  static const PortableKernel kernels[] = {
      DescribePortable<PortableExact<Input, LargeTile>>("portable_tf32_128x256x32", kDtype,
                                                        TileKind::kLarge, kMath),
      DescribePortable<PortableExact<Input, MediumTile>>("portable_tf32_128x128x32", kDtype,
                                                         TileKind::kMedium, kMath),
      DescribePortable<PortableExact<Input, SmallTile>>("portable_tf32_64x64x32", kDtype,
                                                        TileKind::kSmall, kMath),
      DescribePortable<PortableExact<Input, SkinnyTile>>("portable_tf32_16x32x32", kDtype,
                                                         TileKind::kSkinny, kMath),
      DescribePortable<PortableExact<Input, RaggedTile>>("portable_tf32_64x64x32_ragged", kDtype,
                                                         TileKind::kRagged, kMath),
  };
  return {kernels, static_cast<int>(sizeof(kernels) / sizeof(kernels[0]))};
}

}  // namespace fxfuse
