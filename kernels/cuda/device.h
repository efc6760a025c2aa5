// What the library knows of each device, queried once.

#ifndef FXFUSE_CUDA_DEVICE_H_
#define FXFUSE_CUDA_DEVICE_H_

#include <cuda_runtime_api.h>

#include "choose.h"
#include "common.h"
#include "pointwise_kernel.h"

namespace fxfuse {

struct Device {
  DeviceLimits limits;
  // Blocks of each pointwise kernel that an SM has registers for.
  int pointwise_blocks[kMathLevels][kPointwiseKinds];
  int shared_bytes_per_sm;

  // The blocks of a program: their threads and shared memory, and how many the whole device holds.
  struct PointwiseUse {
    int threads;
    int shared_bytes;
    int resident;
  };
  PointwiseUse Use(const PointwiseKernel& kernel, int outputs, int slots) const;
};

// FXFUSE_RUNTIME_ERROR that says what `call` was at. Takes the error off the runtime's record: it
// has been told once.
fxfuse_status CudaFailure(const char* call, const char* what, cudaError_t error);

// The calling thread's current device, prepared: kernels loaded, shared-memory limits raised.
// FXFUSE_UNSUPPORTED below sm_80, FXFUSE_RUNTIME_ERROR where the runtime fails (no driver, say);
// `call` is the entry point to name in the message. Thread-safe; a failure is tried anew next time.
fxfuse_status CurrentDevice(const char* call, const Device** device);

}  // namespace fxfuse

#endif  // FXFUSE_CUDA_DEVICE_H_
