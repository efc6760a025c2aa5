// The last step of sums over rows: adding up what the blocks of a pointwise kernel left, each of
// its part of the rows.

#ifndef FXFUSE_CUDA_ADD_PARTS_H_
#define FXFUSE_CUDA_ADD_PARTS_H_

#include <stdint.h>

namespace fxfuse {

// Matrices [parts, n] of fp32, one behind the other, to rows [n] of `dtype`. The first `columns`
// blocks take the first matrix, and so on.
struct AddPartsArguments {
  const float* source;
  void* sums;
  int64_t n;
  int32_t parts;
  int32_t dtype;
  int32_t columns;
};

struct AddPartsKernel {
  const char* name;
  const void* function;
  int threads;
  int columns;  // of a block
};

const AddPartsKernel& TheAddPartsKernel();

}  // namespace fxfuse

#endif  // FXFUSE_CUDA_ADD_PARTS_H_
