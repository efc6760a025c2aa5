// Which kernel serves a problem: a static choice, the same on every run.

#ifndef FXFUSE_CUDA_CHOOSE_H_
#define FXFUSE_CUDA_CHOOSE_H_

#include "pointwise_kernel.h"
#include "portable_kernels.h"

namespace fxfuse {

// What the choice depends on.
struct DeviceLimits {
  int sm_count;
  int shared_bytes_per_block;
};

// All portable kernels of the library.
PortableKernels AllPortableKernels();

// The fastest portable kernel for the problem by the cost table, or null where none fits the
// device. `aligned`: rows of A and B start at multiples of 16 bytes.
const PortableKernel* ChoosePortable(const fxfuse_problem& problem, bool aligned,
                                     const DeviceLimits& device);

// The pointwise kernel's division of an m x n matrix among blocks.
struct PointwiseGrid {
  int log2_lanes;
  uint32_t column_blocks;
  uint32_t row_blocks;
};
PointwiseGrid DividePointwise(const PointwiseKernel& kernel, int64_t m, int64_t n);

}  // namespace fxfuse

#endif  // FXFUSE_CUDA_CHOOSE_H_
