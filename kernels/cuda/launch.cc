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

fxfuse_status Launch(const char* call, const char* kernel, const void* function, int64_t blocks,
                     int threads, int shared_bytes, void* arguments, void* stream, int cluster) {
  const fxfuse_status status = CheckLimit(call, "blocks", blocks, INT32_MAX);
  if (status != FXFUSE_OK) return status;
  void* parameters[] = {arguments};
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  const cudaError_t error = cudaLaunchKernelExC(&config, function, parameters);
  if (error == cudaSuccess) return FXFUSE_OK;
  // Taken off the runtime's record: it is told here, and must not surface again in a later call.
  cudaGetLastError();
  return Fail(FXFUSE_RUNTIME_ERROR, "%s: launch of %s: %s", call, kernel,
              cudaGetErrorString(error));
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
  const PointwiseGrid grid = DividePointwise(kernel, problem.m, problem.n);
  Arguments arguments = DescribePointwise<Arguments>(problem, pointers, grid);
  int64_t blocks;
  if (kernel.sums) {
    const PointwiseStrips strips = DivideSums(grid, device.Resident(kernel));
    arguments.strip_blocks = strips.strip_blocks;
    blocks = int64_t{grid.column_blocks} * strips.p;
  } else {
    const int64_t all = int64_t{grid.column_blocks} * grid.row_blocks;
    blocks = std::min<int64_t>(all, device.Resident(kernel));
  }
  return Launch(call, kernel.name, kernel.function, blocks, kPointwiseThreads,
                SumBytes(kernel) * problem.program.output_count, &arguments, stream);
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
  const PointwiseGrid grid = DividePointwise(kernel, problem.m, problem.n);
  const PointwiseStrips strips = DivideSums(grid, device.Resident(kernel));
  *p = strips.p;
  *q = strips.q;
}

fxfuse_status LaunchPortable(const char* call, const fxfuse_problem& problem, void* const* pointers,
                             const PortableKernel& kernel, void* stream) {
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
  return Launch(call, kernel.name, kernel.function, int64_t{arguments.tiles_m} * arguments.tiles_n,
                kernel.threads, kernel.shared_bytes, &arguments, stream);
}

}  // namespace fxfuse
