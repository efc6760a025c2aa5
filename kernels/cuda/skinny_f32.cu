// fp32 inputs of few rows, outputs of any type.

#include "math_device.cuh"
#include "skinny_gemm.cuh"

namespace fxfuse {
namespace {

template <int kRows, int kColumns>
SkinnyKernel Describe(const char* name) {
  using Config = SkinnyConfig<kRows, kColumns, DeviceMath>;
  return {name, reinterpret_cast<const void*>(&SkinnyGemm<Config>), MathLevel::kExact, kRows,
          kColumns};
}

}  // namespace

SkinnyKernels SkinnyF32() {
  static const SkinnyKernel kernels[] = {
      Describe<1, 8>("skinny_f32_1_row"),    Describe<4, 8>("skinny_f32_4_rows"),
      Describe<8, 8>("skinny_f32_8_rows"),   Describe<16, 8>("skinny_f32_16_rows"),
      Describe<32, 4>("skinny_f32_32_rows"),
  };
  static_assert(kSkinnyMaxM == 32, "the most rows a kernel has");
  return {kernels, static_cast<int>(sizeof(kernels) / sizeof(kernels[0]))};
}

}  // namespace fxfuse
