// The portable GEMM's kernels as the host sees them: what they take and which there are.

#ifndef FXFUSE_CUDA_PORTABLE_KERNELS_H_
#define FXFUSE_CUDA_PORTABLE_KERNELS_H_

#include "kernel_list.h"

namespace fxfuse {

struct PortableArguments {
  const void* a;
  const void* b;
  int64_t lda, ldb;  // in elements
  int32_t m, n, k;
  int32_t tiles_m, tiles_n;
  int32_t whole_words;  // rows of A and B start at multiples of 4 bytes (ragged tiles ask)
  DeviceProgram program;
  // Of two planes each: bytes from the high one to the low one, what undoes the scaling of A's and
  // B's rows, acc * (root_a[m] * root_b[n])^2, and 1 for a row that holds an infinity or a NaN.
  int64_t plane_bytes_a, plane_bytes_b;
  const float* root_a;
  const float* root_b;
  const int32_t* special_a;
  const int32_t* special_b;
};
static_assert(sizeof(PortableArguments) <= 4096, "the limit of kernel parameters");

constexpr int64_t kPortableMaxK = 1 << 28;  // K is counted in bytes by 32-bit integers

enum class TileKind : uint8_t {
  kLarge,
  kMedium,
  kSmall,
  kSkinny,
  kRagged,
  kPlanesLarge,
  kPlanesSmall,
  kPlanesSkinny
};

// A compiled kernel: what it is, and what a launch of it needs.
struct PortableKernel {
  const char* name;
  const void* function;
  int32_t input_dtype;  // fxfuse_dtype
  int16_t planes;       // of each matrix: 2, or 0 where they are no planes
  TileKind tile;
  MathLevel math;
  int16_t tile_m, tile_n;
  int16_t threads;
  int32_t shared_bytes;
};

constexpr int kMaxPortableKernels = 32;

// The instantiations, in portable_*.cu: the compiler works on several files at once.
using PortableKernels = KernelList<PortableKernel>;
PortableKernels PortableBf16Fast();
PortableKernels PortableBf16Exact();
PortableKernels PortableF16Half();
PortableKernels PortableF16Exact();
PortableKernels PortableTf32();
PortableKernels PortablePlanes();

}  // namespace fxfuse

#endif  // FXFUSE_CUDA_PORTABLE_KERNELS_H_
