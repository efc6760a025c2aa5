// Choosing, preparing and launching the kernels of the Hopper route.

#ifndef FXFUSE_CUDA_HOPPER_LAUNCH_H_
#define FXFUSE_CUDA_HOPPER_LAUNCH_H_

#include "choose.h"
#include "common.h"
#include "hopper_kernels.h"

namespace fxfuse {

// How blocks work together: how many divide K among them, and what pairs of them share.
struct Division {
  int split = 1;
  Pairs pairs = Pairs::kNone;

  int ClusterSize() const { return pairs == Pairs::kNone ? split : 2 * split; }
};

struct HopperChoice {
  const HopperKernel* kernel = nullptr;
  Division division;
};

// All kernels of the route.
HopperKernels AllHopperKernels();

// The fastest way for the route to serve a problem; no kernel where it cannot: inputs of 32 bits,
// rows that do not start at multiples of 16 bytes (`aligned` false), K = 0, a device that is no
// sm_90. `pointers` as in fxfuse_cuda_run, or null.
HopperChoice ChooseHopper(const fxfuse_problem& problem, void* const* pointers, bool aligned,
                          const DeviceLimits& device);

// Loads the kernels, raises their shared-memory limits and counts the clusters that fit the current
// device.
fxfuse_status PrepareHopper(const char* call, DeviceLimits* device);

// Enqueues one kernel; as in launch.h.
fxfuse_status LaunchHopper(const char* call, const fxfuse_problem& problem, void* const* pointers,
                           const DeviceLimits& device, const HopperChoice& choice, void* stream);

}  // namespace fxfuse

#endif  // FXFUSE_CUDA_HOPPER_LAUNCH_H_
