#include "device.h"

#include <algorithm>
#include <atomic>
#include <mutex>

#include "add_parts.h"
#include "hopper_launch.h"
#include "skinny_launch.h"
#include "split.h"

namespace fxfuse {
namespace {

constexpr int kMaxDevices = 64;
constexpr int kDefaultSharedBytes = 48 * 1024;  // what a block may have without asking

struct Entry {
  std::atomic<bool> ready{false};
  Device device;
};

Entry entries[kMaxDevices];
std::mutex preparing;

fxfuse_status PreparePortable(const char* call, const DeviceLimits& limits) {
  const PortableKernels all = AllPortableKernels();
  for (int i = 0; i < all.count; ++i) {
    const PortableKernel& kernel = all.kernel[i];
    if (kernel.shared_bytes > limits.shared_bytes_per_block) continue;  // never chosen here
    cudaFuncAttributes attributes;
    cudaError_t error = cudaFuncGetAttributes(&attributes, kernel.function);  // loads the kernel
    if (error == cudaSuccess && kernel.shared_bytes > kDefaultSharedBytes) {
      error = cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   kernel.shared_bytes);
    }
    // All of the SM's memory as shared memory: tiles that want company get it.
    if (error == cudaSuccess) {
      error = cudaFuncSetAttribute(kernel.function, cudaFuncAttributePreferredSharedMemoryCarveout,
                                   cudaSharedmemCarveoutMaxShared);
    }
    if (error != cudaSuccess) return CudaFailure(call, kernel.name, error);
  }
  return FXFUSE_OK;
}

fxfuse_status PreparePointwise(const char* call, Device* device) {
  for (int i = 0; i < kMathLevels; ++i) {
    for (int kind = 0; kind < kPointwiseKinds; ++kind) {
      const PointwiseKernel& kernel =
          PointwiseKernelFor(static_cast<MathLevel>(i), static_cast<PointwiseKind>(kind));
      int& blocks = device->pointwise_blocks[i][kind];
      cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel.function,
                                                                        kMostPointwiseThreads, 0);
      if (error == cudaSuccess) {
        error = cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     device->limits.shared_bytes_per_block);
      }
      // The L1 has nothing to hold but slots, and those are in shared memory.
      if (error == cudaSuccess) {
        error =
            cudaFuncSetAttribute(kernel.function, cudaFuncAttributePreferredSharedMemoryCarveout,
                                 cudaSharedmemCarveoutMaxShared);
      }
      if (error != cudaSuccess) return CudaFailure(call, kernel.name, error);
    }
  }
  return FXFUSE_OK;
}

fxfuse_status Prepare(const char* call, int index, Device* device) {
  int major = 0, minor = 0;
  const struct {
    cudaDeviceAttr attribute;
    int* value;
  } queries[] = {
      {cudaDevAttrComputeCapabilityMajor, &major},
      {cudaDevAttrComputeCapabilityMinor, &minor},
      {cudaDevAttrMultiProcessorCount, &device->limits.sm_count},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, &device->limits.shared_bytes_per_block},
      {cudaDevAttrMaxSharedMemoryPerMultiprocessor, &device->shared_bytes_per_sm},
  };
  for (const auto& query : queries) {
    const cudaError_t error = cudaDeviceGetAttribute(query.value, query.attribute, index);
    if (error != cudaSuccess) return CudaFailure(call, "cudaDeviceGetAttribute", error);
  }
  if (major < 8) {
    return Fail(FXFUSE_UNSUPPORTED, "%s: device %d has sm_%d%d, expected sm_80 or newer", call,
                index, major, minor);
  }
  device->limits.hopper = major == 9 && minor == 0;
  // What runs may have been compiled for an older architecture, where a kernel cannot wait.
  const PointwiseKernel& any = PointwiseKernelFor(MathLevel::kFast, PointwiseKind::kPlain);
  cudaFuncAttributes attributes;
  cudaError_t error = cudaFuncGetAttributes(&attributes, any.function);
  if (error != cudaSuccess) return CudaFailure(call, any.name, error);
  device->limits.turns = attributes.ptxVersion >= 90;
  const AddPartsKernel& add_parts = TheAddPartsKernel();
  error = cudaFuncGetAttributes(&attributes, add_parts.function);
  if (error != cudaSuccess) return CudaFailure(call, add_parts.name, error);
  fxfuse_status status = PreparePortable(call, device->limits);
  if (status == FXFUSE_OK && device->limits.hopper) status = PrepareHopper(call, &device->limits);
  if (status == FXFUSE_OK) status = PrepareSkinny(call, device->limits);
  if (status == FXFUSE_OK) status = PrepareSplit(call);
  return status == FXFUSE_OK ? PreparePointwise(call, device) : status;
}

}  // namespace

Device::PointwiseUse Device::Use(const PointwiseKernel& kernel, int outputs, int slots) const {
  constexpr int kReserved = 1024;  // of each block, by the system
  const int most = pointwise_blocks[static_cast<int>(kernel.math)][static_cast<int>(kernel.kind)];
  const int bytes = SharedBytesOfThread(kernel, outputs, slots);
  PointwiseUse best = {};
  int best_threads = 0;  // of an SM
  for (int threads = kMostPointwiseThreads; threads >= kFewestPointwiseThreads; threads /= 2) {
    if (threads * bytes > limits.shared_bytes_per_block) continue;
    const int blocks = std::min(most * (kMostPointwiseThreads / threads),
                                shared_bytes_per_sm / (threads * bytes + kReserved));
    // A smaller block must be worth its own sums.
    if (blocks * threads * 4 <= best_threads * 5) continue;
    best = {threads, threads * bytes, blocks * limits.sm_count};
    best_threads = blocks * threads;
  }
  return best;
}

fxfuse_status CudaFailure(const char* call, const char* what, cudaError_t error) {
  cudaGetLastError();
  return Fail(FXFUSE_RUNTIME_ERROR, "%s: %s: %s", call, what, cudaGetErrorString(error));
}

fxfuse_status CurrentDevice(const char* call, const Device** device) {
  int index = 0;
  const cudaError_t error = cudaGetDevice(&index);
  if (error != cudaSuccess) return CudaFailure(call, "cudaGetDevice", error);
  if (index >= kMaxDevices) {
    return Fail(FXFUSE_UNSUPPORTED, "%s: device=%d, expected below %d", call, index, kMaxDevices);
  }
  Entry& entry = entries[index];
  if (!entry.ready.load(std::memory_order_acquire)) {
    const std::lock_guard<std::mutex> lock(preparing);
    if (!entry.ready.load(std::memory_order_relaxed)) {
      const fxfuse_status status = Prepare(call, index, &entry.device);
      if (status != FXFUSE_OK) return status;
      entry.ready.store(true, std::memory_order_release);
    }
  }
  *device = &entry.device;
  return FXFUSE_OK;
}

}  // namespace fxfuse
