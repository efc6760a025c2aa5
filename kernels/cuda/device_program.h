// The epilogue program as kernels take it: an fxfuse_program with its addresses filled in and
// everything that is the same for all elements (alignment, broadcast kind) settled on the host.

#ifndef FXFUSE_CUDA_DEVICE_PROGRAM_H_
#define FXFUSE_CUDA_DEVICE_PROGRAM_H_

#include <stdint.h>

#include "include/fxfuse.h"

namespace fxfuse {

// How an operand is fetched for eight (or four) adjacent columns of one row.
enum class Access : uint8_t {
  kBroadcast,  // one value per row (scalar and column operands)
  kVector,     // adjacent and aligned: vector loads wherever the columns are inside the matrix
  kElement     // one load per element
};

struct DeviceOperand {
  const void* data;
  int64_t row_stride;     // in elements; 0 for scalar and row operands
  int64_t column_stride;  // in elements
  uint32_t repeat;
  uint32_t period;   // at least 1
  uint8_t dtype;     // fxfuse_dtype
  uint8_t periodic;  // repeat or period has an effect: rows need the two divisions
  Access access;
  uint8_t reserved[5];
};

struct DeviceOutput {
  void* data;
  int64_t row_stride;
  uint8_t dtype;   // fxfuse_dtype
  uint8_t vector;  // aligned for vector stores
  uint8_t sum;     // fxfuse_sum; `data` are then partial sums
  uint8_t reserved[5];
};

// Rows and columns are counted by 32-bit integers, and tiles may overhang the matrix.
constexpr int64_t kMaxRows = INT32_MAX - 1024;

// A program is a chain when each instruction works on what the one before left, with at most one
// operand in vectors of eight columns (see row_operands) or with a constant; when none is kept in a
// slot; when the last stores and at most one before it, in such vectors; and when outputs and
// operands are of one dtype. Chain runs chains of these ops, and Interpreter any program.
#define FXFUSE_CHAIN_OPS(X) X(relu) X(gelu) X(silu) X(tanh) X(clamp) X(sigmoid) X(gelu_tanh)

enum class ChainCode : uint8_t {
  store,  // to the next of chain_output; the last ends the chain
#define FXFUSE_CHAIN(name) name,
  FXFUSE_CHAIN_OPS(FXFUSE_CHAIN)
#undef FXFUSE_CHAIN
      gelu_unit,  // of arguments that the steps before confine to [-1, 1]
  tanh_unit,
  add_constant,
  mul_constant,
  add_row,
  mul_row,
  add_full,
  mul_full
};
static_assert(static_cast<int>(ChainCode::mul_full) < 16, "four bits hold a code");

struct ChainStep {
  float p0, p1;
  const void* data;
  int64_t row_stride;  // of data, in elements
};

constexpr int kMaxChain = 12;       // instructions
constexpr int kMaxChainStores = 2;  // one of which is no step of an instruction
static_assert(kMaxChain + kMaxChainStores <= 16, "four bits of chain_codes each");

// The bias is one more operand, added by one more instruction.
constexpr int kBiasOperand = FXFUSE_MAX_OPERANDS;
constexpr int kMaxDeviceInstructions = FXFUSE_MAX_INSTRUCTIONS + 1;

struct DeviceProgram {
  int32_t instruction_count;
  uint32_t rows;     // M
  uint32_t columns;  // N
  // Bit i: operand i is read in whole vectors of adjacent columns, all rows alike or each its own.
  uint16_t row_operands;
  uint16_t full_operands;
  fxfuse_instruction instruction[kMaxDeviceInstructions];
  DeviceOperand operand[FXFUSE_MAX_OPERANDS + 1];
  DeviceOutput output[FXFUSE_MAX_OUTPUTS];
  int32_t output_count;
  int32_t chain_count;  // instructions of the program if it is a chain (with no more steps), else 0
  int16_t chain_output[kMaxChainStores];
  int32_t chain_stores;
  uint64_t chain_codes;  // a ChainCode for each step in four bits, the first in the lowest
  ChainStep chain[kMaxChain + kMaxChainStores];
};

// Kernel parameters are limited to 4 KB on every architecture we build for.
static_assert(sizeof(DeviceProgram) <= 3072, "leave room for the GEMM's own parameters");

// How exact the epilogue's arithmetic must be, by the outputs' rounding; a higher level serves
// wherever a lower one does.
enum class MathLevel : uint8_t {
  kFast,   // every output is bf16
  kHalf,   // outputs are bf16 or fp16
  kExact,  // some output is fp32
  kDouble  // some tensor is fp64; of the pointwise kernel alone
};

// A program as the kernel in double precision takes it.
struct DoubleProgram : DeviceProgram {
  double immediate[kMaxDeviceInstructions][2];  // of each instruction, in place of its own
};

// Fills `device` from a validated problem.
void TranslateProgram(const fxfuse_problem& problem, void* const* pointers, DeviceProgram* device);
void TranslateProgram(const fxfuse_problem& problem, void* const* pointers, DoubleProgram* device);

// The dtype of the chain that the program is, at these addresses or, without any, at aligned ones;
// kNoChain where it is none.
constexpr int kNoChain = -1;
int ChainDtype(const fxfuse_problem& problem, void* const* pointers);

MathLevel RequiredMath(const fxfuse_problem& problem);

// Whether any output is summed.
bool HasSums(const fxfuse_problem& problem);

// Whether rows of a matrix all start at multiples of `bytes`; the stride of a single row is moot.
bool RowsAligned(const void* data, int64_t row_stride, int64_t rows, int dtype, int bytes);

// The same for 16 bytes, as vector accesses want it.
bool VectorAligned(const void* data, int64_t row_stride, int64_t rows, int dtype);

}  // namespace fxfuse

#endif  // FXFUSE_CUDA_DEVICE_PROGRAM_H_
