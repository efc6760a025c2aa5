// Choosing, preparing and launching the kernels of the fp32 route for few rows.

#ifndef FXFUSE_CUDA_SKINNY_LAUNCH_H_
#define FXFUSE_CUDA_SKINNY_LAUNCH_H_

#include "choose.h"
#include "skinny_kernels.h"

namespace fxfuse {

// A kernel, how many groups of its warps and how many blocks divide K, and the stages of its ring;
// without a kernel: the route cannot serve the problem.
struct SkinnyChoice {
  const SkinnyKernel* kernel = nullptr;
  int groups = 1;
  int split = 1;
  int depth = 2;
};

// The kernel of the fewest rows, divided as estimated costs or the problem's `tile` ask. `aligned`:
// rows of A and B start at multiples of 16 bytes.
SkinnyChoice ChooseSkinny(const fxfuse_problem& problem, bool aligned, const DeviceLimits& device);

// Loads all kernels on the current device and raises their shared-memory limits.
fxfuse_status PrepareSkinny(const char* call, const DeviceLimits& device);

// Enqueues one kernel; as in launch.h.
fxfuse_status LaunchSkinny(const char* call, const fxfuse_problem& problem, void* const* pointers,
                           const DeviceLimits& device, const SkinnyChoice& choice, void* stream);

}  // namespace fxfuse

#endif  // FXFUSE_CUDA_SKINNY_LAUNCH_H_
