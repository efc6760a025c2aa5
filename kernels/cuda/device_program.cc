#include "device_program.h"

#include <math.h>
#include <string.h>

#include <algorithm>

#include "common.h"
#include "pointwise.h"

namespace fxfuse {
namespace {

constexpr int64_t kIndexLimit = INT32_MAX;

int DtypeBytes(int dtype) {
  if (dtype == FXFUSE_F64) return 8;
  return dtype == FXFUSE_F32 ? 4 : (dtype == FXFUSE_BOOL ? 1 : 2);
}

DeviceOperand TranslateOperand(const fxfuse_operand& operand, const void* data, int64_t rows) {
  DeviceOperand device = {};
  device.data = data;
  device.row_stride = operand.row_stride;
  device.column_stride = operand.column_stride;
  device.repeat = static_cast<uint32_t>(std::min(operand.repeat, kIndexLimit));
  device.period = static_cast<uint32_t>(std::min(operand.period, kIndexLimit));
  device.dtype = static_cast<uint8_t>(operand.dtype);
  device.periodic = operand.row_stride != 0 && (operand.repeat > 1 || operand.period < rows);
  // Eight elements are one load of 8 bytes (bool), one of 16 or more of 16 (fp32, fp64).
  const int bytes = operand.dtype == FXFUSE_BOOL ? 8 : 16;
  if (operand.column_stride == 0) {
    device.access = Access::kBroadcast;
  } else if (operand.column_stride == 1 &&
             RowsAligned(data, operand.row_stride, rows, operand.dtype, bytes)) {
    device.access = Access::kVector;
  } else {
    device.access = Access::kElement;
  }
  return device;
}

// acc + bias, as the program's first instruction.
fxfuse_instruction AddBias() {
  fxfuse_instruction add = {};
  add.opcode = static_cast<uint16_t>(Opcode::add);
  add.save = -1;
  add.store = -1;
  add.arity = 2;
  add.source[0] = FXFUSE_FROM_PREVIOUS;
  add.source[1] = FXFUSE_FROM_OPERAND;
  add.index[1] = kBiasOperand;
  return add;
}

void FindVectorOperands(const fxfuse_problem& problem, DeviceProgram* device) {
  device->row_operands = device->full_operands = 0;
  if (problem.n % 8 != 0) return;
  const auto mark = [&](int i) {
    const DeviceOperand& operand = device->operand[i];
    const bool vector = operand.access == Access::kVector && operand.dtype != FXFUSE_BOOL;
    if (!vector || operand.periodic) return;
    (operand.row_stride == 0 ? device->row_operands : device->full_operands) |= 1u << i;
  };
  for (int i = 0; i < problem.program.operand_count; ++i) mark(i);
  if (problem.has_bias) mark(kBiasOperand);
}

// What the steps so far leave, but for NaN.
struct Interval {
  float low = -INFINITY;
  float high = INFINITY;

  bool Within(float from, float to) const { return from <= low && high <= to; }
};

// The interval after a step; everything where it is not worth knowing.
Interval After(ChainCode code, const ChainStep& step, Interval x) {
  switch (code) {
    case ChainCode::tanh:
    case ChainCode::tanh_unit:
      return {-1.0f, 1.0f};
    case ChainCode::sigmoid:
      return {0.0f, 1.0f};
    case ChainCode::relu:
      return {std::max(0.0f, x.low), std::max(0.0f, x.high)};
    case ChainCode::clamp:  // a bound of NaN makes every result NaN
      return {std::min(step.p1, std::max(step.p0, x.low)),
              std::min(step.p1, std::max(step.p0, x.high))};
    case ChainCode::gelu_unit:  // -0.17 and 0.8413, but for the error of a fit
      return {-0.18f, 0.85f};
    case ChainCode::gelu:
    case ChainCode::gelu_tanh:
    case ChainCode::silu:
      return {-0.3f, 1.001f * std::max(0.0f, x.high)};
    case ChainCode::mul_constant: {
      const float ends[] = {x.low * step.p0, x.high * step.p0};
      return {std::min(ends[0], ends[1]), std::max(ends[0], ends[1])};
    }
    case ChainCode::add_constant:
      return {x.low + step.p0, x.high + step.p0};
    default:
      return {};
  }
}

// The step at its cheapest for arguments in an interval; `store` where they are its results.
ChainCode Cheapest(ChainCode code, const ChainStep& step, Interval x) {
  if (code == ChainCode::clamp && x.Within(step.p0, step.p1)) return ChainCode::store;
  if (!x.Within(-1.0f, 1.0f)) return code;
  if (code == ChainCode::gelu) return ChainCode::gelu_unit;
  if (code == ChainCode::tanh) return ChainCode::tanh_unit;
  return code;
}

// Whether a group's width is `unit` columns, or that times a power of two.
bool IsPowerOfTwoTimes(float width, int unit) {
  const int columns = static_cast<int>(width);
  const int units = columns / unit;
  return columns % unit == 0 && units > 0 && (units & (units - 1)) == 0;
}

// The chain code of an op without a second argument, or of a second argument of kind `kind`.
enum class ChainKind { kNone, kConstant, kRow, kFull };

bool FindCode(Opcode opcode, ChainKind kind, ChainCode* code) {
  switch (opcode) {
#define FXFUSE_CHAIN(name)   \
  case Opcode::name:         \
    *code = ChainCode::name; \
    return kind == ChainKind::kNone;
    FXFUSE_CHAIN_OPS(FXFUSE_CHAIN)
#undef FXFUSE_CHAIN
    case Opcode::copy:
      *code = ChainCode::store;
      return kind == ChainKind::kNone;
    case Opcode::normalize:
      *code = ChainCode::normalize;
      return kind == ChainKind::kNone;
    case Opcode::add:
      *code = kind == ChainKind::kConstant ? ChainCode::add_constant
              : kind == ChainKind::kRow    ? ChainCode::add_row
                                           : ChainCode::add_full;
      return kind != ChainKind::kNone;
    case Opcode::mul:
      *code = kind == ChainKind::kConstant ? ChainCode::mul_constant
              : kind == ChainKind::kRow    ? ChainCode::mul_row
                                           : ChainCode::mul_full;
      return kind != ChainKind::kNone;
    default:
      return false;
  }
}

// Fills `step` from an instruction, with the code `store` where there is nothing to do but that;
// false where a chain has no such step.
bool TranslateStep(const DeviceProgram& program, const fxfuse_instruction& instruction, int dtype,
                   ChainStep* step, ChainCode* code) {
  *step = {};
  if (instruction.save >= 0 || instruction.source[0] != FXFUSE_FROM_PREVIOUS) return false;
  step->p0 = instruction.immediate[0];
  step->p1 = instruction.immediate[1];
  if (IsGroupOp(static_cast<Opcode>(instruction.opcode)) &&
      !IsPowerOfTwoTimes(step->p0, kMinChainGroup)) {
    return false;
  }
  ChainKind kind = ChainKind::kNone;
  if (instruction.arity == 2) {
    const int index = instruction.index[1];
    if (instruction.source[1] == FXFUSE_FROM_IMMEDIATE) {
      kind = ChainKind::kConstant;
      step->p0 = instruction.immediate[index];
    } else if (instruction.source[1] == FXFUSE_FROM_OPERAND) {
      const DeviceOperand& operand = program.operand[index];
      if (((program.row_operands | program.full_operands) >> index & 1) == 0) return false;
      if (operand.dtype != dtype) return false;
      kind = operand.row_stride == 0 ? ChainKind::kRow : ChainKind::kFull;
      step->data = operand.data;
      step->row_stride = operand.row_stride;
    } else {
      return false;
    }
  }
  return FindCode(static_cast<Opcode>(instruction.opcode), kind, code);
}

// Fills the chain from the program's instructions, operands and outputs.
void TranslateChain(const fxfuse_instruction* instructions, int count, DeviceProgram* program) {
  program->chain_count = program->chain_stores = 0;
  program->chain_codes[0] = program->chain_codes[1] = 0;
  if (count > kMaxChain || program->columns % 8 != 0) return;
  const int last = instructions[count - 1].store;
  if (last < 0) return;
  const int dtype = program->output[last].dtype;
  Interval interval;
  int steps = 0;
  for (int i = 0; i < count; ++i) {
    const fxfuse_instruction& instruction = instructions[i];
    ChainStep& step = program->chain[steps];
    ChainCode code;
    if (!TranslateStep(*program, instruction, dtype, &step, &code)) return;
    code = Cheapest(code, step, interval);
    if (code != ChainCode::store) {
      interval = After(code, step, interval);
      program->chain_codes[steps / kChainCodesPerWord] |=
          static_cast<uint32_t>(code) << (kChainCodeBits * (steps % kChainCodesPerWord));
      ++steps;
    }
    if (instruction.store < 0) continue;
    const DeviceOutput& output = program->output[instruction.store];
    if (program->chain_stores == kMaxChainStores) return;
    if (output.dtype != dtype || !output.vector) return;
    program->chain_output[program->chain_stores++] = instruction.store;
    ++steps;  // its code is zero
  }
  static_assert(static_cast<int>(ChainCode::store) == 0, "as said above");
  program->chain_count = count;
}

// The constants of a program's steps: its instructions', or where they are in DoubleProgram.
class Constants {
 public:
  Constants(const fxfuse_instruction* instructions, bool places)
      : instructions_(instructions), places_(places) {}
  // Immediate `k` of an instruction.
  float operator()(const fxfuse_instruction& instruction, int k) const {
    if (!places_) return instruction.immediate[k];
    const uint32_t place = static_cast<uint32_t>(2 * (&instruction - instructions_) + k);
    float bits;
    memcpy(&bits, &place, sizeof(bits));
    return bits;
  }

 private:
  const fxfuse_instruction* instructions_;
  bool places_;
};

// A step that fetches argument `j` of an instruction as its second.
DeviceStep Fetch(const fxfuse_instruction& instruction, int j, int code,
                 const Constants& constants) {
  DeviceStep step = {};
  step.code = static_cast<uint8_t>(code);
  const int index = instruction.index[j];
  step.index = kSecondSlot;
  switch (instruction.source[j]) {
    case FXFUSE_FROM_PREVIOUS:
      step.second = Second::kPrevious;
      break;
    case FXFUSE_FROM_SLOT:
      step.second = Second::kSlot;
      step.index = static_cast<uint8_t>(kFirstSlot + index);
      break;
    case FXFUSE_FROM_OPERAND:
      step.second = static_cast<Second>(static_cast<int>(Second::kOperand) + index);
      break;
    default:
      step.second = Second::kConstant;
      step.p0 = constants(instruction, index);
  }
  return step;
}

// Whether an instruction that copies what the one before left is no step of its own: `before`
// (null: the accumulator, whose slot is `first_slot`) can write its result to one more place.
bool IsMerged(const fxfuse_instruction& instruction, DeviceStep* before, int16_t* first_slot) {
  const bool copies = instruction.opcode == static_cast<uint16_t>(Opcode::copy);
  if (!copies || instruction.source[0] != FXFUSE_FROM_PREVIOUS) return false;
  const int slot = instruction.save + 1, output = instruction.store + 1;
  static_assert(kFirstSlot == 1, "and so no slot is 0");
  if (before == nullptr) {
    if (output > 0 || *first_slot > 0) return false;
    *first_slot = static_cast<int16_t>(slot);
    return true;
  }
  const int stored = StoredOutput(before->result);
  if (slot > 0 && KeptSlot(before->result) > 0) return false;
  if (output > 0 && stored > 0 && (output != stored + 1 || StoredAgain(before->result))) {
    return false;
  }
  before->result |= slot;
  if (output > 0) before->result |= stored > 0 ? 1 << 6 : output << 3;
  return true;
}

// Fills the steps from the program's instructions.
void TranslateSteps(const fxfuse_instruction* instructions, int count, const Constants& constants,
                    DeviceProgram* program) {
  DeviceStep* next = program->step;
  program->first_slot = 0;
  for (const fxfuse_instruction* i = instructions; i < instructions + count; ++i) {
    if (IsMerged(*i, next > program->step ? next - 1 : nullptr, &program->first_slot)) continue;
    const auto fetch = [&](int j, int code) { *next++ = Fetch(*i, j, code, constants); };
    const auto is_previous = [&](int j) { return i->source[j] == FXFUSE_FROM_PREVIOUS; };
    if (i->arity == 3) fetch(2, kKeepThird);
    const bool swapped = i->arity > 1 && is_previous(1) && !is_previous(0);
    if (!is_previous(0)) fetch(0, swapped ? kSwap : kTake);
    DeviceStep op = {};
    if (swapped) {
      op.second = Second::kSlot;
      op.index = kSecondSlot;
    } else if (i->arity > 1) {
      op = Fetch(*i, 1, i->opcode, constants);
    }
    op.code = static_cast<uint8_t>(i->opcode);
    if (kParameterCount[i->opcode] > 0) {
      op.p0 = constants(*i, 0);
      op.p1 = constants(*i, 1);
    }
    op.result = static_cast<uint8_t>((i->save + 1) | (i->store + 1) << 3);
    *next++ = op;
  }
  *next = {};  // is read ahead of time, and what it says of constants followed
  program->step_count = static_cast<int32_t>(next - program->step);
  int last = program->first_slot > 0 ? program->first_slot : -1;
  for (const DeviceStep* step = program->step; step < next; ++step) {
    if (step->second != Second::kNone) last = std::max<int>(last, step->index);
    if (step->code == kKeepThird) last = std::max(last, kThirdSlot);
    if (KeptSlot(step->result) > 0) last = std::max(last, KeptSlot(step->result));
  }
  program->slot_count = static_cast<int16_t>(last + 1);
  program->leading_row = kNoOperand;
  const DeviceStep& first = program->step[0];
  if (program->first_slot > 0 || first.result != 0) return;
  if (first.code != static_cast<int>(Opcode::add) || first.second < Second::kOperand) return;
  const int index = OperandOf(first.second);
  const DeviceOperand& operand = program->operand[index];
  if (operand.access == Access::kVector && operand.row_stride == 0) {
    program->leading_row = index;
  }
}

}  // namespace

bool RowsAligned(const void* data, int64_t row_stride, int64_t rows, int dtype, int bytes) {
  const int64_t stride_bytes = rows > 1 ? row_stride * DtypeBytes(dtype) : 0;
  return reinterpret_cast<uintptr_t>(data) % bytes == 0 && stride_bytes % bytes == 0;
}

bool VectorAligned(const void* data, int64_t row_stride, int64_t rows, int dtype) {
  return RowsAligned(data, row_stride, rows, dtype, 16);
}

namespace {

// Fills `device` from a validated problem; `places`: constants are those of a DoubleProgram.
void Translate(const fxfuse_problem& problem, void* const* pointers, bool places,
               DeviceProgram* device) {
  const fxfuse_program& program = problem.program;
  device->rows = static_cast<uint32_t>(problem.m);
  device->columns = static_cast<uint32_t>(problem.n);
  fxfuse_instruction instructions[FXFUSE_MAX_INSTRUCTIONS + 1];
  fxfuse_instruction* next = instructions;
  if (problem.has_bias) {
    const fxfuse_operand row = {0, 1, 1, kIndexLimit, problem.bias_dtype, 0};
    device->operand[kBiasOperand] = TranslateOperand(row, pointers[FXFUSE_PTR_BIAS], problem.m);
    *next++ = AddBias();
  }
  memcpy(next, program.instruction, program.instruction_count * sizeof(fxfuse_instruction));
  next += program.instruction_count;
  const int count = static_cast<int>(next - instructions);
  for (int i = 0; i < program.operand_count; ++i) {
    device->operand[i] =
        TranslateOperand(program.operand[i], pointers[FXFUSE_PTR_OPERAND + i], problem.m);
  }
  device->output_count = program.output_count;
  for (int i = 0; i < program.output_count; ++i) {
    const fxfuse_output& output = program.output[i];
    DeviceOutput& to = device->output[i];
    to.data = pointers[FXFUSE_PTR_OUTPUT + i];
    to.row_stride = output.row_stride;
    to.dtype = static_cast<uint8_t>(output.dtype);
    to.sum = static_cast<uint8_t>(output.sum);
    to.vector = VectorAligned(to.data, output.row_stride, problem.m, output.dtype);
  }
  FindVectorOperands(problem, device);
  TranslateSteps(instructions, count, Constants(instructions, places), device);
  TranslateChain(instructions, count, device);
}

}  // namespace

void TranslateProgram(const fxfuse_problem& problem, void* const* pointers, DeviceProgram* device) {
  Translate(problem, pointers, false, device);
}

void TranslateProgram(const fxfuse_problem& problem, void* const* pointers, DoubleProgram* device) {
  // Without a GEMM there is no bias, so the problem's instructions are the device's.
  const fxfuse_program& program = problem.program;
  Translate(problem, pointers, true, device);
  memcpy(device->constant, program.immediate_f64,
         program.instruction_count * sizeof(program.immediate_f64[0]));
}

ChainTraits FindChain(const fxfuse_problem& problem, void* const* pointers) {
  static void* const kNoPointers[FXFUSE_PTR_COUNT] = {};
  DeviceProgram program;
  TranslateProgram(problem, pointers != nullptr ? pointers : kNoPointers, &program);
  if (program.chain_count == 0) return {};
  ChainTraits traits = {program.output[program.chain_output[0]].dtype, false};
  for (const uint32_t word : program.chain_codes) {
    for (int i = 0; i < kChainCodesPerWord; ++i) {
      const uint32_t code = word >> (i * kChainCodeBits) & ((1 << kChainCodeBits) - 1);
      traits.full_operands |= code >= static_cast<uint32_t>(ChainCode::add_full);
    }
  }
  return traits;
}

MathLevel RequiredMath(const fxfuse_problem& problem) {
  if (IsDouble(problem)) return MathLevel::kDouble;
  MathLevel level = MathLevel::kFast;
  for (int i = 0; i < problem.program.output_count; ++i) {
    const int dtype = problem.program.output[i].dtype;
    // What products of single fp16 planes are off by covers what kHalf is.
    if (dtype == FXFUSE_F32 && problem.planes != 1) return MathLevel::kExact;
    if (dtype != FXFUSE_BF16) level = MathLevel::kHalf;
  }
  return level;
}

int GroupWidth(const fxfuse_problem& problem) {
  int widest = 0;
  for (int i = 0; i < problem.program.instruction_count; ++i) {
    const fxfuse_instruction& instruction = problem.program.instruction[i];
    if (!IsGroupOp(static_cast<Opcode>(instruction.opcode))) continue;
    widest = std::max(widest, static_cast<int>(instruction.immediate[0]));
  }
  return widest;
}

bool LanesCoverGroups(const fxfuse_problem& problem, int width) {
  for (int i = 0; i < problem.program.instruction_count; ++i) {
    const fxfuse_instruction& instruction = problem.program.instruction[i];
    if (!IsGroupOp(static_cast<Opcode>(instruction.opcode))) continue;
    const float columns = instruction.immediate[0];
    if (!IsPowerOfTwoTimes(columns, width) || columns > 32.0f * width) return false;
  }
  return true;
}

bool HasSums(const fxfuse_problem& problem) {
  for (int i = 0; i < problem.program.output_count; ++i) {
    if (problem.program.output[i].sum != FXFUSE_SUM_NONE) return true;
  }
  return false;
}

}  // namespace fxfuse
