// From a problem, its addresses and the chosen kernel to a launch.

#ifndef FXFUSE_CUDA_LAUNCH_H_
#define FXFUSE_CUDA_LAUNCH_H_

#include "add_parts.h"
#include "device.h"

namespace fxfuse {

// FXFUSE_UNSUPPORTED where `value` of `field` is above what the kernels count to.
fxfuse_status CheckLimit(const char* call, const char* field, int64_t value, int64_t limit);

// A launch of `blocks` blocks in clusters of `cluster` of them, on `stream` (a cudaStream_t). Where
// kernels wait for their turn themselves, the launch need not wait for the kernel before.
class LaunchConfig {
 public:
  LaunchConfig(const DeviceLimits& device, int64_t blocks, int threads, int shared_bytes,
               void* stream, int cluster = 1);
  LaunchConfig(const LaunchConfig&) = delete;  // refers to itself

  const cudaLaunchConfig_t& config() const { return config_; }
  int64_t blocks() const { return blocks_; }

 private:
  int64_t blocks_;
  cudaLaunchConfig_t config_ = {};
  cudaLaunchAttribute attribute_[2];
};

// Enqueues that launch of a kernel that takes one struct, at `arguments`. Without effect on what
// cudaGetLastError says: a failure is told here.
fxfuse_status Launch(const char* call, const char* kernel, const void* function,
                     const LaunchConfig& launch, void* arguments);

// Each enqueues one kernel on `stream` (a cudaStream_t). The problem has passed CheckProblem, the
// kernel can serve it, and neither m nor n is 0. `call` is the entry point to name in messages.
fxfuse_status LaunchPointwise(const char* call, const fxfuse_problem& problem,
                              void* const* pointers, const Device& device,
                              const PointwiseKernel& kernel, void* stream);
// The parts into which LaunchPointwise divides a problem with sums.
void PartialSums(const fxfuse_problem& problem, const Device& device, const PointwiseKernel& kernel,
                 int64_t* p, int64_t* q);
// Enqueues fxfuse_cuda_add_parts, of checked arguments.
fxfuse_status LaunchAddParts(const char* call, const DeviceLimits& device, int64_t count,
                             AddPartsArguments* arguments, void* stream);
fxfuse_status LaunchPortable(const char* call, const fxfuse_problem& problem, void* const* pointers,
                             const DeviceLimits& device, const PortableKernel& kernel,
                             void* stream);

}  // namespace fxfuse

#endif  // FXFUSE_CUDA_LAUNCH_H_
