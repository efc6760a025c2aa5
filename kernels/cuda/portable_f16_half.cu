// fp16 inputs, all outputs of 16 bits.

#include "portable_instances.cuh"

namespace fxfuse {

PortableKernels PortableF16Half() {
  using Input = __half;
  constexpr int32_t kDtype = FXFUSE_F16;
  constexpr MathLevel kMath = MathLevel::kHalf;
  static const PortableKernel kernels[] = {
      DescribePortable<PortableHalf<Input, LargeTile>>("portable_f16_128x256x64", kDtype,
                                                       TileKind::kLarge, kMath),
      DescribePortable<PortableHalf<Input, MediumTile>>("portable_f16_128x128x64", kDtype,
                                                        TileKind::kMedium, kMath),
      DescribePortable<PortableHalf<Input, SmallTile>>("portable_f16_64x64x64", kDtype,
                                                       TileKind::kSmall, kMath),
      DescribePortable<PortableHalf<Input, SkinnyTile>>("portable_f16_16x32x64", kDtype,
                                                        TileKind::kSkinny, kMath),
      DescribePortable<PortableHalf<Input, RaggedTile>>("portable_f16_64x64x64_ragged", kDtype,
                                                        TileKind::kRagged, kMath),
  };
  return {kernels, static_cast<int>(sizeof(kernels) / sizeof(kernels[0]))};
}

}  // namespace fxfuse
