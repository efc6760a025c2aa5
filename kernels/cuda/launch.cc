#include "launch.h"

#include <cuda_runtime_api.h>

#include <algorithm>

#include "common.h"

namespace fxfuse {
namespace {

// From a plane to the next, of matrices as fxfuse_cuda_split leaves them.
int64_t PlaneBytes(int64_t rows, int64_t stride) {
  return CeilDivide(rows, FXFUSE_PLANE_ROWS) * FXFUSE_PLANE_ROWS * stride * 2;
}

}  // namespace

LaunchConfig::LaunchConfig(const DeviceLimits& device, int64_t blocks, int threads,
                           int shared_bytes, void* stream, int cluster)
    : blocks_(blocks) {
  config_.gridDim = dim3(static_cast<unsigned>(blocks));
  config_.blockDim = dim3(static_cast<unsigned>(threads));
  config_.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config_.stream = static_cast<cudaStream_t>(stream);
  config_.attrs = attribute_;
  if (cluster > 1) {
    cudaLaunchAttribute& attribute = attribute_[config_.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  }
  if (device.turns) {
    cudaLaunchAttribute& attribute = attribute_[config_.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
}

fxfuse_status Launch(const char* call, const char* kernel, const void* function,
                     const LaunchConfig& launch, void* arguments) {
  const fxfuse_status status = CheckLimit(call, "blocks", launch.blocks(), INT32_MAX);
  if (status != FXFUSE_OK) return status;
  void* parameters[] = {arguments};
  const cudaError_t error = cudaLaunchKernelExC(&launch.config(), function, parameters);
  return error == cudaSuccess ? FXFUSE_OK : CudaFailure(call, kernel, error);
}

fxfuse_status CheckLimit(const char* call, const char* field, int64_t value, int64_t limit) {
  if (value <= limit) return FXFUSE_OK;
  return Fail(FXFUSE_UNSUPPORTED, "%s: %s=%lld, the kernels take up to %lld", call, field,
              static_cast<long long>(value), static_cast<long long>(limit));
}

namespace {

// LaunchPointwise for a kernel that takes such arguments.
template <class Arguments>
fxfuse_status LaunchPointwiseWith(const char* call, const fxfuse_problem& problem,
                                  void* const* pointers, const Device& device,
                                  const PointwiseKernel& kernel, void* stream) {
  Arguments arguments = DescribePointwise<Arguments>(problem, pointers, kernel.kind);
  const DeviceProgram& program = arguments.program;
  const Device::PointwiseUse use = device.Use(kernel, program.output_count, program.slot_count);
  const PointwiseGrid grid = DividePointwise(kernel, use.threads, problem.m, problem.n);
  Divide(grid, &arguments);
  int64_t blocks;
  if (kernel.sums()) {
    const PointwiseStrips strips = DivideSums(grid, use.resident);
    arguments.strips = strips.p;
    blocks = int64_t{grid.column_blocks} * strips.p;
  } else {
    const int64_t all = int64_t{grid.column_blocks} * grid.row_blocks;
    blocks = std::min<int64_t>(all, use.resident);
  }
  const LaunchConfig config(device.limits, blocks, use.threads, use.shared_bytes, stream);
  return Launch(call, kernel.name, kernel.function, config, &arguments);
}

}  // namespace

fxfuse_status LaunchPointwise(const char* call, const fxfuse_problem& problem,
                              void* const* pointers, const Device& device,
                              const PointwiseKernel& kernel, void* stream) {
  const auto launch = kernel.math == MathLevel::kDouble ? LaunchPointwiseWith<DoubleArguments>
                                                        : LaunchPointwiseWith<PointwiseArguments>;
  return launch(call, problem, pointers, device, kernel, stream);
}

void PartialSums(const fxfuse_problem& problem, const Device& device, const PointwiseKernel& kernel,
                 int64_t* p, int64_t* q) {
  const Device::PointwiseUse use =
      device.Use(kernel, problem.program.output_count, SlotCount(problem, kernel.kind));
  const PointwiseGrid grid = DividePointwise(kernel, use.threads, problem.m, problem.n);
  const PointwiseStrips strips = DivideSums(grid, use.resident);
  *p = strips.p;
  *q = strips.q;
}

fxfuse_status LaunchAddParts(const char* call, const DeviceLimits& device, int64_t count,
                             AddPartsArguments* arguments, void* stream) {
  const AddPartsKernel& kernel = TheAddPartsKernel();
  arguments->columns = static_cast<int32_t>(CeilDivide(arguments->n, kernel.columns));
  const LaunchConfig config(device, count * arguments->columns, kernel.threads, 0, stream);
  return Launch(call, kernel.name, kernel.function, config, arguments);
}

fxfuse_status LaunchPortable(const char* call, const fxfuse_problem& problem, void* const* pointers,
                             const DeviceLimits& device, const PortableKernel& kernel,
                             void* stream) {
  PortableArguments arguments;
  arguments.a = pointers[FXFUSE_PTR_A];
  arguments.b = pointers[FXFUSE_PTR_B];
  arguments.lda = problem.lda;
  arguments.ldb = problem.ldb;
  arguments.m = static_cast<int32_t>(problem.m);
  arguments.n = static_cast<int32_t>(problem.n);
  arguments.k = static_cast<int32_t>(problem.k);
  arguments.tiles_m = static_cast<int32_t>((problem.m + kernel.tile_m - 1) / kernel.tile_m);
  arguments.tiles_n = static_cast<int32_t>((problem.n + kernel.tile_n - 1) / kernel.tile_n);
  arguments.whole_words =
      RowsAligned(arguments.a, problem.lda, problem.m, problem.input_dtype, 4) &&
      RowsAligned(arguments.b, problem.ldb, problem.n, problem.input_dtype, 4);
  if (kernel.planes > 0) {
    arguments.plane_bytes_a = PlaneBytes(problem.m, problem.lda);
    arguments.plane_bytes_b = PlaneBytes(problem.n, problem.ldb);
    arguments.root_a = static_cast<float*>(pointers[FXFUSE_PTR_ROOT_A]);
    arguments.root_b = static_cast<float*>(pointers[FXFUSE_PTR_ROOT_B]);
    arguments.special_a = static_cast<int32_t*>(pointers[FXFUSE_PTR_SPECIAL_A]);
    arguments.special_b = static_cast<int32_t*>(pointers[FXFUSE_PTR_SPECIAL_B]);
  }
  TranslateProgram(problem, pointers, &arguments.program);
  const LaunchConfig config(device, int64_t{arguments.tiles_m} * arguments.tiles_n, kernel.threads,
                            kernel.shared_bytes, stream);
  return Launch(call, kernel.name, kernel.function, config, &arguments);
}

}  // namespace fxfuse
