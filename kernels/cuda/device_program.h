// The epilogue program as kernels take it: an fxfuse_program with its addresses filled in and
// everything that is the same for all elements (alignment, broadcast kind) settled on the host.

#ifndef FXFUSE_CUDA_DEVICE_PROGRAM_H_
#define FXFUSE_CUDA_DEVICE_PROGRAM_H_

#include <stdint.h>

#include "include/fxfuse.h"
#include "pointwise.h"

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
// operands are of one dtype. Chain runs chains of these ops, and Interpreter any program but those
// with ops over groups of columns: a chain normalizes where a group is 32 columns, or 32 times a
// power of two up to the columns of a tile.
#define FXFUSE_CHAIN_OPS(X) X(relu) X(gelu) X(silu) X(tanh) X(clamp) X(sigmoid) X(gelu_tanh)

enum class ChainCode : uint8_t {
  store,  // to the next of chain_output; the last ends the chain
#define FXFUSE_CHAIN(name) name,
  FXFUSE_CHAIN_OPS(FXFUSE_CHAIN)
#undef FXFUSE_CHAIN
      gelu_unit,  // of arguments that the steps before confine to [-1, 1]
  tanh_unit,
  normalize,
  add_constant,
  mul_constant,
  add_row,
  mul_row,
  add_full,  // from here on, the operand has rows of its own
  mul_full
};
constexpr int kChainCodeBits = 5, kChainCodesPerWord = 6;
static_assert(static_cast<int>(ChainCode::mul_full) < 1 << kChainCodeBits, "a code fits");

struct ChainStep {
  float p0, p1;
  const void* data;
  int64_t row_stride;  // of data, in elements
};

constexpr int kMaxChain = 10;       // instructions
constexpr int kMaxChainStores = 2;  // one of which is no step of an instruction
static_assert(kMaxChain + kMaxChainStores <= 2 * kChainCodesPerWord, "two words of codes");
constexpr int kMinChainGroup = 32;  // columns

// The bias is one more operand, added by one more instruction.
constexpr int kBiasOperand = FXFUSE_MAX_OPERANDS;

// Where a step's second comes from: what lies in no slot is put into kSecondSlot for the step. From
// kOperand on it is the operand of that number.
enum class Second : uint8_t { kNone, kSlot, kPrevious, kConstant, kOperand };

FXFUSE_HD constexpr int OperandOf(Second second) {
  return static_cast<int>(second) - static_cast<int>(Second::kOperand);
}

// An instruction, or part of one, as Interpreter takes it: on two values held in registers, the
// first what the step before left, the second fetched for the step.
struct DeviceStep {
  uint8_t code;  // an Opcode, or one of those below
  Second second;
  uint8_t index;   // of the slot that holds the second
  uint8_t result;  // where it goes: see KeptSlot, StoredOutput and StoredAgain
  float p0, p1;    // the op's parameters; or p0 is the second
};

// Codes beside those of ops.
constexpr int kTake = 253;       // the second becomes the first
constexpr int kSwap = 254;       // and the first is kept in kSecondSlot
constexpr int kKeepThird = 255;  // the second is kept in kThirdSlot, which ops of three read
static_assert(kOpcodeCount <= kTake, "opcodes fit a step");

// Slots beside the program's own, which have the numbers between.
constexpr int kSecondSlot = 0;  // the second of the present step, if it is in no other
constexpr int kFirstSlot = 1;
constexpr int kThirdSlot = kFirstSlot + FXFUSE_MAX_SLOTS;
constexpr int kDeviceSlots = kThirdSlot + 1;

// The slot that the result is written to, and one more than the number of the output; 0: none.
FXFUSE_HD constexpr int KeptSlot(int result) { return result & 7; }
FXFUSE_HD constexpr int StoredOutput(int result) { return result >> 3 & 7; }
// Whether it is written to the next output as well.
FXFUSE_HD constexpr int StoredAgain(int result) { return result >> 6 & 1; }
static_assert(kThirdSlot < 8 && FXFUSE_MAX_OUTPUTS < 8, "three bits each");

// An instruction of three arguments is at most three steps, and the bias one; the one past the last
// is read as well.
constexpr int kMaxDeviceSteps = 3 * FXFUSE_MAX_INSTRUCTIONS + 2;
constexpr int kNoOperand = -1;

struct DeviceProgram {
  int32_t step_count;
  int16_t slot_count;  // of all slots, up to the last that is used
  int16_t first_slot;  // that the accumulator is written to; 0: none
  uint32_t rows;       // M
  uint32_t columns;    // N
  // Bit i: operand i is read in whole vectors of adjacent columns, all rows alike or each its own.
  uint16_t row_operands;
  uint16_t full_operands;
  // The operand, the same for all rows, that the first step does nothing but add; or kNoOperand.
  int32_t leading_row;
  DeviceStep step[kMaxDeviceSteps];
  DeviceOperand operand[FXFUSE_MAX_OPERANDS + 1];
  DeviceOutput output[FXFUSE_MAX_OUTPUTS];
  int32_t output_count;
  int32_t chain_count;  // instructions of the program if it is a chain (with no more steps), else 0
  int16_t chain_output[kMaxChainStores];
  int32_t chain_stores;
  uint32_t chain_codes[2];  // a ChainCode for each step, the first in the lowest bits
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

// A program as the kernel in double precision takes it: a step's p0 is, as a bit pattern, the place
// of what it is and of p1 after it.
struct DoubleProgram : DeviceProgram {
  double constant[2 * FXFUSE_MAX_INSTRUCTIONS + 1];
};

// Fills `device` from a validated problem.
void TranslateProgram(const fxfuse_problem& problem, void* const* pointers, DeviceProgram* device);
void TranslateProgram(const fxfuse_problem& problem, void* const* pointers, DoubleProgram* device);

// Of the chain that the program is, at these addresses or, without any, at aligned ones: its dtype,
// kNoChain where it is none, and whether it has operands [M, N].
constexpr int kNoChain = -1;
struct ChainTraits {
  int dtype = kNoChain;
  bool full_operands = false;
};
ChainTraits FindChain(const fxfuse_problem& problem, void* const* pointers);

MathLevel RequiredMath(const fxfuse_problem& problem);

// The widest group of columns of an op over such groups; 0 where the program has none.
int GroupWidth(const fxfuse_problem& problem);

// Whether such ops can add up where threads side by side have `width` columns each: every group is
// that times a power of two, up to a warp's.
bool LanesCoverGroups(const fxfuse_problem& problem, int width);

// Whether any output is summed.
bool HasSums(const fxfuse_problem& problem);

// Whether rows of a matrix all start at multiples of `bytes`; the stride of a single row is moot.
bool RowsAligned(const void* data, int64_t row_stride, int64_t rows, int dtype, int bytes);

// The same for 16 bytes, as vector accesses want it.
bool VectorAligned(const void* data, int64_t row_stride, int64_t rows, int dtype);

}  // namespace fxfuse

#endif  // FXFUSE_CUDA_DEVICE_PROGRAM_H_
