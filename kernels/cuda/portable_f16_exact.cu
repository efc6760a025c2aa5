// fp16 inputs with fp32 outputs: rare, so a medium and a small tile have to do.

#include "portable_instances.cuh"

namespace fxfuse {

PortableKernels PortableF16Exact() {
  using Input = __half;
  constexpr int32_t kDtype = FXFUSE_F16;
  constexpr MathLevel kMath = MathLevel::kExact;
  static const PortableKernel kernels[] = {
      DescribePortable<PortableExact<Input, MediumTile>>("portable_f16_exact_128x128x64", kDtype,
                                                         TileKind::kMedium, kMath),
      DescribePortable<PortableExact<Input, SmallTile>>("portable_f16_exact_64x64x64", kDtype,
                                                        TileKind::kSmall, kMath),
      DescribePortable<PortableExact<Input, RaggedTile>>("portable_f16_exact_64x64x64_ragged",
                                                         kDtype, TileKind::kRagged, kMath),
  };
  return {kernels, static_cast<int>(sizeof(kernels) / sizeof(kernels[0]))};
}

}  // namespace fxfuse
