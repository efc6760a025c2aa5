// The pointwise kernel as the host sees it.

#ifndef FXFUSE_CUDA_POINTWISE_KERNEL_H_
#define FXFUSE_CUDA_POINTWISE_KERNEL_H_

#include <stddef.h>

#include "device_program.h"

namespace fxfuse {

// Threads of a block: fewer where slots and sums take so much shared memory that smaller blocks
// fill an SM better.
constexpr int kMostPointwiseThreads = 256, kFewestPointwiseThreads = 64;

template <class Program>
struct PointwiseArgumentsOf {
  const void* accumulator;
  int64_t row_stride;      // in elements
  uint8_t dtype;           // fxfuse_dtype
  uint8_t vector;          // aligned for 16-byte loads
  uint8_t log2_lanes;      // threads of a block side by side in a row; the others lie below
  uint8_t groups;          // the program has ops over groups of columns
  uint16_t threads;        // of a block
  uint32_t column_blocks;  // blocks side by side in a row
  uint32_t row_blocks;     // blocks below each other
  uint32_t strips;         // into which those below each other are divided; with sums only
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
  int threads;
  int log2_lanes;
  uint32_t column_blocks;
  uint32_t row_blocks;
};
PointwiseGrid DividePointwise(const PointwiseKernel& kernel, int threads, int64_t m, int64_t n);

// The arguments of a problem, but for its division among blocks.
template <class Arguments>
Arguments DescribePointwise(const fxfuse_problem& problem, void* const* pointers) {
  Arguments arguments;
  arguments.accumulator = pointers[FXFUSE_PTR_A];
  arguments.row_stride = problem.lda;
  arguments.dtype = static_cast<uint8_t>(problem.input_dtype);
  arguments.vector =
      VectorAligned(pointers[FXFUSE_PTR_A], problem.lda, problem.m, problem.input_dtype);
  arguments.groups = GroupWidth(problem) > 0;
  TranslateProgram(problem, pointers, &arguments.program);
  return arguments;
}

// The same with it, but for strips.
template <class Arguments>
void Divide(const PointwiseGrid& grid, Arguments* arguments) {
  arguments->threads = static_cast<uint16_t>(grid.threads);
  arguments->log2_lanes = static_cast<uint8_t>(grid.log2_lanes);
  arguments->column_blocks = grid.column_blocks;
  arguments->row_blocks = grid.row_blocks;
}
template <class Arguments>
Arguments DescribePointwise(const fxfuse_problem& problem, void* const* pointers,
                            const PointwiseGrid& grid) {
  Arguments arguments = DescribePointwise<Arguments>(problem, pointers);
  Divide(grid, &arguments);
  return arguments;
}

// The parts into which a problem with sums is divided, P and Q of fxfuse_output: strips of blocks
// below each other, one block of threads to each, and parts of a row. resident: blocks that fill
// the device.
struct PointwiseStrips {
  uint32_t p, q;
};
PointwiseStrips DivideSums(const PointwiseGrid& grid, int resident);

// Shared memory of a thread, for the sums of so many outputs and for slots.
inline int SharedBytesOfThread(const PointwiseKernel& kernel, int outputs, int slots) {
  const int value_bytes = kernel.math == MathLevel::kDouble ? sizeof(double) : sizeof(float);
  return value_bytes * kernel.width * ((kernel.sums ? outputs : 0) + kernel.groups * slots);
}

}  // namespace fxfuse

#endif  // FXFUSE_CUDA_POINTWISE_KERNEL_H_
