// How one CPU call is cut up: a problem's shapes brought to their simplest form, the tiles, and
// where each instruction finds its arguments.

#ifndef FXFUSE_CPU_PLAN_H_
#define FXFUSE_CPU_PLAN_H_

#include <stdint.h>

#include "include/fxfuse.h"
#include "isa.h"

namespace fxfuse {

// Floats of a fragment. The fragments a chain works on at a time (the running value, slots,
// operands) must share a 32 KiB first-level cache.
constexpr int kFragment = 1024;

// What an operand amounts to once extents of one are taken into account.
enum class Broadcast { kUnused, kScalar, kRow, kColumn, kMatrix };

struct OperandPlan {
  Broadcast kind;
  int dtype;
  const char* data;
  int64_t row_stride, column_stride;  // in elements
  int64_t repeat, period;
  int buffer;  // of the workspace
};

struct MatrixPlan {  // the accumulator or an output
  char* data;
  int dtype;
  int64_t row_stride;
  int sum;     // fxfuse_sum; `data` are then partial sums
  int buffer;  // two of the workspace, where a strip is added up in doubles; 0: it is not
};

// An argument: the running value, or a buffer of the workspace (perhaps standing for an operand).
constexpr int kPreviousValue = -1;
struct StepPlan {
  OpLoop run;
  float p0, p1;
  int arity;
  int argument[3];  // kPreviousValue or a buffer
  int operand[3];   // the operand behind the argument, or -1
  int result;       // buffer
  int output;       // or -1
  bool is_copy;     // the result is the argument
  bool is_saved;    // the result must be in its buffer
};

// A value that fills a whole buffer once per thread: an immediate or a scalar operand.
struct ConstantPlan {
  float value;
  int buffer;
};
constexpr int kMaxConstants = 2 * FXFUSE_MAX_INSTRUCTIONS + FXFUSE_MAX_OPERANDS;

struct Plan {
  const IsaKernels* kernels;
  int64_t rows, columns;            // flattened to one row where everything is dense
  int64_t tile_rows, tile_columns;  // one of them is 1, or tile_columns == columns
  int64_t column_tiles, row_tiles;
  // What a thread takes at a time: so many tiles below each other. A problem without sums has
  // strips of one tile.
  int64_t strip_tiles, strip_count;
  MatrixPlan accumulator;
  bool reads_accumulator;
  OperandPlan operand[FXFUSE_MAX_OPERANDS];
  int output_count;
  MatrixPlan output[FXFUSE_MAX_OUTPUTS];
  int step_count;
  StepPlan step[FXFUSE_MAX_INSTRUCTIONS];
  int constant_count;
  ConstantPlan constant[kMaxConstants];
  int buffer_count;
  int fragment;          // floats per buffer: the tile, rounded up to whole vectors
  int64_t element_cost;  // of the program, in units of one addition
};

// The bytes of one element of an fxfuse_dtype.
int64_t ElementSize(int dtype);

// The parts of a checked problem with m, n > 0 that are summed each by itself: P and Q of
// fxfuse_output.
void PartialSums(const fxfuse_problem& problem, int64_t* p, int64_t* q);

// Plans a checked problem with m, n > 0.
void MakePlan(const fxfuse_problem& problem, void* const* pointers, const IsaKernels& kernels,
              Plan* plan);

}  // namespace fxfuse

#endif  // FXFUSE_CPU_PLAN_H_
