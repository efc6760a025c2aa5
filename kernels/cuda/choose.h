// Which kernel serves a problem: a static choice, the same on every run.

#ifndef FXFUSE_CUDA_CHOOSE_H_
#define FXFUSE_CUDA_CHOOSE_H_

#include "portable_kernels.h"

namespace fxfuse {

// What the choice depends on.
struct DeviceLimits {
  int sm_count;
  bool hopper;  // sm_90: the kernels built for sm_90a run
  bool turns;   // kernels wait for their turn themselves (await_turn)
  // hopper_clusters[s]: clusters of s blocks (1, 2, 4, 8) of the Hopper route that run at a time.
  int hopper_clusters[9];
  int shared_bytes_per_block;
};

// All portable kernels of the library.
PortableKernels AllPortableKernels();

// The fastest portable kernel for the problem by the cost table, or null where none fits the
// device, or takes such planes. `aligned`: rows of A and B start at multiples of 16 bytes.
const PortableKernel* ChoosePortable(const fxfuse_problem& problem, bool aligned,
                                     const DeviceLimits& device);

}  // namespace fxfuse

#endif  // FXFUSE_CUDA_CHOOSE_H_
