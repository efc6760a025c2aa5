// The pointwise kernel as the host sees it.

#ifndef FXFUSE_CUDA_POINTWISE_KERNEL_H_
#define FXFUSE_CUDA_POINTWISE_KERNEL_H_

#include <stddef.h>

#include "device_program.h"

namespace fxfuse {

constexpr int kPointwiseThreads = 256;

template <class Program>
struct PointwiseArgumentsOf {
  const void* accumulator;
  int64_t row_stride;      // in elements
  uint8_t dtype;           // fxfuse_dtype
  uint8_t vector;          // aligned for 16-byte loads
  uint8_t log2_lanes;      // threads of a block side by side in a row; the others lie below
  uint8_t groups;          // the program has ops over groups of columns
  uint32_t column_blocks;  // blocks side by side in a row
  uint32_t row_blocks;     // blocks below each other
  uint32_t strip_blocks;   // of those below each other, how many one block takes; with sums only
  Program program;
};
using PointwiseArguments = PointwiseArgumentsOf<DeviceProgram>;
using DoubleArguments = PointwiseArgumentsOf<DoubleProgram>;  // of the kernel in double precision
static_assert(sizeof(DoubleArguments) <= 4096, "the limit of kernel parameters");

// A compiled kernel. A thread takes `groups` rows of `width` columns.
struct PointwiseKernel {
  const char* name;
  const void* function;
  MathLevel math;
  bool sums;  // serves problems with summed outputs, else those without
  int8_t width;
  int8_t groups;
};

// One for each math level, without sums and with them.
constexpr int kMathLevels = 4;
const PointwiseKernel& PointwiseKernelFor(MathLevel math, bool sums);
// Those of pointwise_f32.cu, in the order of math levels, and those of pointwise_f64.cu: the kernel
// without sums and the one with them.
using PointwisePair = PointwiseKernel[2];
const PointwisePair* PointwiseF32();
const PointwisePair& PointwiseF64();

// The division of an m x n matrix among blocks.
struct PointwiseGrid {
  int log2_lanes;
  uint32_t column_blocks;
  uint32_t row_blocks;
};
PointwiseGrid DividePointwise(const PointwiseKernel& kernel, int64_t m, int64_t n);

// The arguments of a problem, but for strips.
template <class Arguments>
Arguments DescribePointwise(const fxfuse_problem& problem, void* const* pointers,
                            const PointwiseGrid& grid) {
  Arguments arguments;
  arguments.accumulator = pointers[FXFUSE_PTR_A];
  arguments.row_stride = problem.lda;
  arguments.dtype = static_cast<uint8_t>(problem.input_dtype);
  arguments.vector =
      VectorAligned(pointers[FXFUSE_PTR_A], problem.lda, problem.m, problem.input_dtype);
  arguments.groups = GroupWidth(problem) > 0;
  arguments.log2_lanes = static_cast<uint8_t>(grid.log2_lanes);
  arguments.column_blocks = grid.column_blocks;
  arguments.row_blocks = grid.row_blocks;
  TranslateProgram(problem, pointers, &arguments.program);
  return arguments;
}

// How a problem with sums is divided: blocks below each other that one block takes, and the parts,
// P and Q of fxfuse_output. resident: blocks that fill the device.
struct PointwiseStrips {
  uint32_t strip_blocks;
  uint32_t p, q;
};
PointwiseStrips DivideSums(const PointwiseGrid& grid, int resident);

// Shared memory of a block, for each output.
constexpr int SumBytes(const PointwiseKernel& kernel) {
  if (!kernel.sums) return 0;
  const size_t size = kernel.math == MathLevel::kDouble ? sizeof(double) : sizeof(float);
  return kPointwiseThreads * kernel.width * static_cast<int>(size);
}

}  // namespace fxfuse

#endif  // FXFUSE_CUDA_POINTWISE_KERNEL_H_
