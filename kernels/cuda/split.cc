#include "split.h"

#include <cuda_runtime_api.h>

#include <algorithm>

#include "common.h"
#include "kernel_list.h"
#include "launch.h"

namespace fxfuse {
namespace {

constexpr int64_t kMaxColumns = 1 << 30;

bool Empty(const fxfuse_split& matrix) { return matrix.rows == 0 || matrix.k == 0; }

// Whether the columns lie side by side; of a single one that is moot.
bool AdjacentColumns(const fxfuse_split& matrix) {
  return matrix.column_stride == 1 || matrix.k <= 1;
}

// "call: matrices[i].field=value, expected limit"
fxfuse_status Bad(const char* call, int i, const char* field, int64_t value, const char* limit) {
  return Fail(FXFUSE_BAD_ARGUMENT, "%s: matrices[%d].%s=%lld, expected %s", call, i, field,
              static_cast<long long>(value), limit);
}

fxfuse_status CheckAddress(const char* call, int i, const char* field, const void* address,
                           int alignment) {
  if (address != nullptr && reinterpret_cast<uintptr_t>(address) % alignment == 0) {
    return FXFUSE_OK;
  }
  return Fail(FXFUSE_BAD_ARGUMENT, "%s: matrices[%d].%s=%p, expected a multiple of %d", call, i,
              field, address, alignment);
}

fxfuse_status CheckMatrix(const char* call, const fxfuse_split& matrix, int i) {
  if (matrix.rows < 0) return Bad(call, i, "rows", matrix.rows, "0 or more");
  if (matrix.k < 0) return Bad(call, i, "k", matrix.k, "0 or more");
  if (matrix.row_stride < 0) return Bad(call, i, "row_stride", matrix.row_stride, "0 or more");
  if (matrix.column_stride < 0) {
    return Bad(call, i, "column_stride", matrix.column_stride, "0 or more");
  }
  if (!AdjacentColumns(matrix) && matrix.row_stride != 1 && matrix.rows > 1) {
    return Bad(call, i, "column_stride", matrix.column_stride, "1, or row_stride=1");
  }
  if (matrix.planes < 1 || matrix.planes > 2) {
    return Bad(call, i, "planes", matrix.planes, "1 or 2");
  }
  if (matrix.plane_stride < matrix.k || matrix.plane_stride % 8 != 0) {
    return Bad(call, i, "plane_stride", matrix.plane_stride, "a multiple of 8, k or more");
  }
  fxfuse_status status = CheckLimit(call, "rows", matrix.rows, kMaxRows);
  if (status == FXFUSE_OK) {
    status = CheckLimit(call, "plane_stride", matrix.plane_stride, kMaxColumns);
  }
  if (status == FXFUSE_OK && !Empty(matrix)) {
    status = CheckAddress(call, i, "source", matrix.source, alignof(float));
  }
  if (status == FXFUSE_OK && matrix.rows > 0 && matrix.plane_stride > 0) {
    status = CheckAddress(call, i, "plane", matrix.plane, 16);
  }
  if (status == FXFUSE_OK && matrix.rows > 0) {
    status = CheckAddress(call, i, "root", matrix.root, 16);
  }
  if (status == FXFUSE_OK && matrix.factor != nullptr) {
    if (!AdjacentColumns(matrix)) {
      return Bad(call, i, "column_stride", matrix.column_stride, "1 where there is a factor");
    }
    status = CheckAddress(call, i, "factor", matrix.factor, 16);
    if (status == FXFUSE_OK) {
      status = CheckLimit(call, "plane_stride beside a factor", matrix.plane_stride,
                          FXFUSE_MAX_FACTOR_COLUMNS);
    }
  }
  return status;
}

SplitMatrix Describe(const fxfuse_split& matrix) {
  SplitMatrix described = {};
  described.source = matrix.source;
  described.plane = static_cast<uint16_t*>(matrix.plane);
  described.root = matrix.root;
  described.special = matrix.special;
  described.factor = matrix.factor;
  described.stride = AdjacentColumns(matrix) ? matrix.row_stride : matrix.column_stride;
  described.rows = static_cast<int32_t>(matrix.rows);
  described.k = static_cast<int32_t>(matrix.k);
  described.plane_stride = static_cast<int32_t>(matrix.plane_stride);
  described.planes = matrix.planes;
  described.plane_size =
      CeilDivide(matrix.rows, FXFUSE_PLANE_ROWS) * FXFUSE_PLANE_ROWS * matrix.plane_stride;
  return described;
}

// The columns that threads must cover of the widest of the matrices.
int64_t Columns(const SplitArguments& arguments) {
  int64_t columns = 0;
  for (const SplitMatrix& matrix : arguments.matrix) {
    columns = std::max<int64_t>(columns, matrix.plane_stride);
  }
  return columns;
}

// All in one launch of the kernel the widest of them needs.
fxfuse_status LaunchRows(const char* call, const DeviceLimits& device, SplitArguments* arguments,
                         void* stream) {
  const int64_t columns = Columns(*arguments);
  int best = 0;
  while (SplitRowsKernelAt(best).capacity < columns) ++best;
  const SplitKernel& kernel = SplitRowsKernelAt(best).kernel;

  int64_t blocks = 0;
  for (SplitMatrix& matrix : arguments->matrix) {
    const int64_t threads = CeilDivide(matrix.plane_stride, kSplitElements);
    while (1 << matrix.log2_lanes < std::min<int64_t>(threads, kernel.threads)) {
      ++matrix.log2_lanes;
    }
    matrix.blocks =
        static_cast<int32_t>(CeilDivide(matrix.rows, kernel.threads >> matrix.log2_lanes));
    blocks += matrix.blocks;
  }
  const LaunchConfig config(device, blocks, kernel.threads, 0, stream);
  return Launch(call, kernel.name, kernel.function, config, arguments);
}

// All in one launch of the kernel the widest of them needs, which there must be.
fxfuse_status LaunchStrips(const char* call, const DeviceLimits& device, SplitArguments* arguments,
                           void* stream) {
  const int64_t columns = Columns(*arguments);
  int best = 0;
  while (SplitStripsKernelAt(best).capacity < columns) ++best;
  const SplitStripsKernel& strips = SplitStripsKernelAt(best);
  int64_t blocks = 0;
  for (SplitMatrix& matrix : arguments->matrix) {
    matrix.blocks = static_cast<int32_t>(CeilDivide(matrix.rows, strips.rows));
    blocks += matrix.blocks;
  }
  const int64_t threads = CeilDivide(columns * strips.kernel.threads, strips.capacity);
  const LaunchConfig config(device, blocks, static_cast<int>(CeilDivide(threads, 32) * 32), 0,
                            stream);
  return Launch(call, strips.kernel.name, strips.kernel.function, config, arguments);
}

fxfuse_status Zero(const char* call, const char* what, void* data, int64_t count, void* stream) {
  const cudaError_t error =
      cudaMemsetAsync(data, 0, count * sizeof(int32_t), static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? FXFUSE_OK : CudaFailure(call, what, error);
}

fxfuse_status LaunchColumns(const char* call, const DeviceLimits& device, SplitMatrix matrix,
                            void* stream) {
  fxfuse_status status = Zero(call, "cudaMemsetAsync of root", matrix.root, matrix.rows, stream);
  if (status == FXFUSE_OK && matrix.special != nullptr) {
    status = Zero(call, "cudaMemsetAsync of special", matrix.special, matrix.rows, stream);
  }
  const struct {
    const SplitColumnsKernel& step;
    int64_t columns;
  } steps[] = {{SplitMaximaKernel(), matrix.k}, {SplitTilesKernel(), matrix.plane_stride}};
  for (const auto& [step, columns] : steps) {
    if (status != FXFUSE_OK) break;
    const int64_t blocks =
        CeilDivide(matrix.rows, step.tile_rows) * CeilDivide(columns, step.tile_columns);
    const LaunchConfig config(device, blocks, step.kernel.threads, 0, stream);
    status = Launch(call, step.kernel.name, step.kernel.function, config, &matrix);
  }
  return status;
}

}  // namespace

fxfuse_status CheckSplit(const char* call, const fxfuse_split* matrices, int count) {
  if (count < 1 || count > FXFUSE_MAX_SPLITS) {
    return Fail(FXFUSE_BAD_ARGUMENT, "%s: count=%d, expected 1 to %d", call, count,
                FXFUSE_MAX_SPLITS);
  }
  if (matrices == nullptr) {
    return Fail(FXFUSE_BAD_ARGUMENT, "%s: matrices=null, expected an address", call);
  }
  fxfuse_status status = FXFUSE_OK;
  for (int i = 0; status == FXFUSE_OK && i < count; ++i) {
    status = CheckMatrix(call, matrices[i], i);
  }
  return status;
}

fxfuse_status PrepareSplit(const char* call) {
  constexpr int kOthers = 2 + kSplitStripsKernels;
  const SplitKernel* kernels[kSplitRowsKernels + kOthers] = {&SplitMaximaKernel().kernel,
                                                             &SplitTilesKernel().kernel};
  for (int i = 0; i < kSplitStripsKernels; ++i) kernels[2 + i] = &SplitStripsKernelAt(i).kernel;
  for (int i = 0; i < kSplitRowsKernels; ++i) kernels[kOthers + i] = &SplitRowsKernelAt(i).kernel;
  for (const SplitKernel* kernel : kernels) {
    cudaFuncAttributes attributes;
    const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel->function);
    if (error != cudaSuccess) return CudaFailure(call, kernel->name, error);
  }
  return FXFUSE_OK;
}

fxfuse_status LaunchSplit(const char* call, const DeviceLimits& device,
                          const fxfuse_split* matrices, int count, void* stream) {
  SplitArguments rows = {}, strips = {};
  int row_matrices = 0, strip_matrices = 0;
  fxfuse_status status = FXFUSE_OK;
  for (int i = 0; status == FXFUSE_OK && i < count; ++i) {
    if (matrices[i].rows == 0) continue;
    const SplitMatrix matrix = Describe(matrices[i]);
    if (AdjacentColumns(matrices[i])) {
      rows.matrix[row_matrices++] = matrix;
    } else if (matrix.plane_stride <= SplitStripsKernelAt(kSplitStripsKernels - 1).capacity) {
      strips.matrix[strip_matrices++] = matrix;
    } else {
      status = LaunchColumns(call, device, matrix, stream);
    }
  }
  if (status == FXFUSE_OK && strip_matrices > 0) {
    status = LaunchStrips(call, device, &strips, stream);
  }
  if (status == FXFUSE_OK && row_matrices > 0) status = LaunchRows(call, device, &rows, stream);
  return status;
}

}  // namespace fxfuse
