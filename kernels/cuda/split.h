// Splitting fp32 matrices into scaled fp16 planes (fxfuse_cuda_split): the kernels as the host sees
// them, and the host's side.

#ifndef FXFUSE_CUDA_SPLIT_H_
#define FXFUSE_CUDA_SPLIT_H_

#include <stdint.h>

#include "choose.h"
#include "include/fxfuse.h"

namespace fxfuse {

// One matrix as kernels take it.
struct SplitMatrix {
  const float* source;
  uint16_t* plane;
  float* root;
  int32_t* special;     // or null
  const float* factor;  // or null
  int64_t stride;       // of source, in elements: between rows, or between columns (SplitColumns)
  int32_t rows;
  int32_t k;
  int32_t plane_stride;
  int32_t planes;
  int64_t plane_size;  // of one plane, in elements
  int32_t log2_lanes;  // SplitRows: threads that share a row
  int32_t blocks;      // SplitRows and SplitStrips: blocks that take this matrix
};

struct SplitArguments {
  SplitMatrix matrix[FXFUSE_MAX_SPLITS];
};

struct SplitKernel {
  const char* name;
  const void* function;
  int threads;
};

// Elements of a row that a thread of SplitRows holds at a time.
constexpr int kSplitElements = 32;

// Splits matrices with adjacent columns; takes SplitArguments. Rows of up to `capacity` columns are
// held in registers and so read once; the last kernel takes any and reads them twice.
struct SplitRowsKernel {
  SplitKernel kernel;
  int32_t capacity;
};
constexpr int kSplitRowsKernels = 4;
const SplitRowsKernel& SplitRowsKernelAt(int i);  // by capacity

// Splits matrices with adjacent rows, of up to `capacity` columns; takes SplitArguments. A block
// has a strip of `rows` of them: the fewer, the more columns fit, and the shorter are its reads.
// `threads` is what the capacity takes. (32 rows of 1024 columns take all registers of an SM, and
// 37 us on an H200 where two blocks of 16 rows take 33.)
struct SplitStripsKernel {
  SplitKernel kernel;
  int32_t capacity;
  int rows;
};
constexpr int kSplitStripsKernels = 2;
const SplitStripsKernel& SplitStripsKernelAt(int i);  // by capacity

// The two steps for a matrix with adjacent rows and more columns; each takes one SplitMatrix. The
// first needs root (and special) zeroed, and leaves in root what only the second understands. Tiles
// of a step are numbered along the rows first.
struct SplitColumnsKernel {
  SplitKernel kernel;
  int tile_rows;
  int tile_columns;
};
const SplitColumnsKernel& SplitMaximaKernel();
const SplitColumnsKernel& SplitTilesKernel();

// Checks every field; FXFUSE_OK, or a failure with its message recorded.
fxfuse_status CheckSplit(const char* call, const fxfuse_split* matrices, int count);

// Loads the kernels, so that later calls may be captured in a CUDA graph.
fxfuse_status PrepareSplit(const char* call);

// Enqueues what splits checked matrices on `stream` (a cudaStream_t).
fxfuse_status LaunchSplit(const char* call, const DeviceLimits& device,
                          const fxfuse_split* matrices, int count, void* stream);

}  // namespace fxfuse

#endif  // FXFUSE_CUDA_SPLIT_H_
