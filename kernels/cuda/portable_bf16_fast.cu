// bf16 inputs, all outputs bf16.

#include "portable_instances.cuh"

namespace fxfuse {

PortableKernels PortableBf16Fast() {
  using Input = __nv_bfloat16;
  constexpr int32_t kDtype = FXFUSE_BF16;
  constexpr MathLevel kMath = MathLevel::kFast;
  static const PortableKernel kernels[] = {
      DescribePortable<PortableFast<Input, LargeTile>>("portable_bf16_128x256x64", kDtype,
                                                       TileKind::kLarge, kMath),
      DescribePortable<PortableFast<Input, MediumTile>>("portable_bf16_128x128x64", kDtype,
                                                        TileKind::kMedium, kMath),
      DescribePortable<PortableFast<Input, SmallTile>>("portable_bf16_64x64x64", kDtype,
                                                       TileKind::kSmall, kMath),
      DescribePortable<PortableFast<Input, SkinnyTile>>("portable_bf16_16x32x64", kDtype,
                                                        TileKind::kSkinny, kMath),
      DescribePortable<PortableFast<Input, RaggedTile>>("portable_bf16_64x64x64_ragged", kDtype,
                                                        TileKind::kRagged, kMath),
  };
  return {kernels, static_cast<int>(sizeof(kernels) / sizeof(kernels[0]))};
}

}  // namespace fxfuse
