// The pointwise kernel as the host sees it.

#ifndef FXFUSE_CUDA_POINTWISE_KERNEL_H_
#define FXFUSE_CUDA_POINTWISE_KERNEL_H_

#include <stddef.h>

#include "device_program.h"
#include "gradient.h"

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
  uint32_t strips;         // into which those below each other are divided; not of kPlain
  Program program;
};
using PointwiseArguments = PointwiseArgumentsOf<DeviceProgram>;
using DoubleArguments = PointwiseArgumentsOf<DoubleProgram>;  // of the kernel in double precision
static_assert(sizeof(DoubleArguments) <= 4096, "the limit of kernel parameters");

// What a kernel serves: problems without summed outputs, those with them, and gradients of chains
// (see gradient.h), with or without.
enum class PointwiseKind : uint8_t { kPlain, kSums, kGradient };
constexpr int kMathLevels = 4, kPointwiseKinds = 3;

// A compiled kernel. A thread takes `groups` rows of `width` columns.
struct PointwiseKernel {
  const char* name;
  const void* function;
  MathLevel math;
  PointwiseKind kind;
  int8_t width;
  int8_t groups;

  bool sums() const { return kind != PointwiseKind::kPlain; }
};

// One for each math level and kind. In double precision gradients are sums.
const PointwiseKernel& PointwiseKernelFor(MathLevel math, PointwiseKind kind);
const PointwiseKernel& PointwiseKernelFor(const fxfuse_problem& problem);
// Those of pointwise_f32.cu, in the order of math levels, and those of pointwise_f64.cu.
using PointwiseKernels = PointwiseKernel[kPointwiseKinds];
const PointwiseKernels* PointwiseF32();
const PointwiseKernels& PointwiseF64();

// The division of an m x n matrix among blocks.
struct PointwiseGrid {
  int threads;
  int log2_lanes;
  uint32_t column_blocks;
  uint32_t row_blocks;
};
PointwiseGrid DividePointwise(const PointwiseKernel& kernel, int threads, int64_t m, int64_t n);

// The arguments of a problem for a kernel of a kind, but for its division among blocks.
template <class Arguments>
Arguments DescribePointwise(const fxfuse_problem& problem, void* const* pointers,
                            PointwiseKind kind) {
  Arguments arguments;
  arguments.accumulator = pointers[FXFUSE_PTR_A];
  arguments.row_stride = problem.lda;
  arguments.dtype = static_cast<uint8_t>(problem.input_dtype);
  arguments.vector =
      VectorAligned(pointers[FXFUSE_PTR_A], problem.lda, problem.m, problem.input_dtype);
  arguments.groups = GroupWidth(problem) > 0;
  TranslateProgram(problem, pointers, &arguments.program);
  if (kind == PointwiseKind::kGradient) TranslateGradient(problem, &arguments.program);
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
                            PointwiseKind kind, const PointwiseGrid& grid) {
  Arguments arguments = DescribePointwise<Arguments>(problem, pointers, kind);
  Divide(grid, &arguments);
  return arguments;
}

// The slots that a problem's steps need in a kernel of a kind.
int SlotCount(const fxfuse_problem& problem, PointwiseKind kind);

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
  return value_bytes * kernel.width * ((kernel.sums() ? outputs : 0) + kernel.groups * slots);
}

}  // namespace fxfuse

#endif  // FXFUSE_CUDA_POINTWISE_KERNEL_H_
