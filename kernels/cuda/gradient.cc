#include "gradient.h"

#include <string.h>

namespace fxfuse {
namespace {

constexpr int kNone = -1;
constexpr int kMostSlots = 7;
constexpr int kMostValues = FXFUSE_MAX_INSTRUCTIONS + 1;

// An argument of an instruction, looked up in its slot. Value 0 is the accumulator, value i + 1
// the result of instruction i or, if that copies, what it copies.
struct Argument {
  fxfuse_source source = FXFUSE_FROM_PREVIOUS;  // of a value, whichever way it comes
  int index = kNone;                            // of the value or the operand
  float constant = 0.0f;

  bool IsValue() const { return source == FXFUSE_FROM_PREVIOUS; }
  bool IsOperand() const { return source == FXFUSE_FROM_OPERAND; }
};

// A derivative: the op whose it is, and the code of both, or of what comes in the end (normalize).
struct Derivative {
  Opcode op, of;
  GradientCode code;
  bool of_result;  // it takes the result of the op, not its argument
  bool masks;  // leaves zeros whatever comes in, infinities included: it wants to meet dy itself
};
constexpr Derivative kDerivatives[] = {
    {Opcode::threshold_grad, Opcode::relu, GradientCode::relu, false, true},
    {Opcode::clamp_grad, Opcode::clamp, GradientCode::clamp, false, true},
    {Opcode::hardtanh_grad, Opcode::clamp, GradientCode::hardtanh, false, true},
    {Opcode::silu_grad, Opcode::silu, GradientCode::silu, false, false},
    {Opcode::gelu_grad, Opcode::gelu, GradientCode::gelu, false, false},
    {Opcode::gelu_tanh_grad, Opcode::gelu_tanh, GradientCode::gelu_tanh, false, false},
    {Opcode::tanh_grad, Opcode::tanh, GradientCode::tanh, true, false},
    {Opcode::sigmoid_grad, Opcode::sigmoid, GradientCode::sigmoid, true, false},
    {Opcode::normalize_grad, Opcode::normalize, GradientCode::normalize_back, false, false},
};

const Derivative* FindDerivative(Opcode op) {
  for (const Derivative& derivative : kDerivatives) {
    if (derivative.op == op) return &derivative;
  }
  return nullptr;
}

// A step of the chain, from value j to value j + 1 of it.
struct Link {
  Opcode op;
  Argument other;  // of add and mul
  float p0, p1;
  int factor = kNone;  // of the product, that is taken here
};

// A factor of the product: a derivative at a value of the chain, or a constant or an operand.
struct Factor {
  const Derivative* derivative;  // or null
  Argument other;                // where there is none
  float p0, p1;
  int at = kNone;  // the value of the chain that it is taken at, or that is the result there

  bool OfNorm() const { return derivative != nullptr && derivative->of == Opcode::normalize; }
};

// Output `output` is the product up to so many factors, times a value of the chain.
struct Use {
  int factors;
  int times;  // a value of the chain; or kNone
  int output;
};

// The gradient of a chain as Read finds it in a program.
class ChainGradient {
 public:
  // Whether the program is one.
  bool Read(const fxfuse_program& program);
  // Whether its steps could be written.
  bool Write(DeviceStep* steps, int* step_count, int* slot_count);

 private:
  bool ReadInstruction(const fxfuse_instruction& instruction, int value, const Argument* arguments);
  bool ReadLink(const fxfuse_instruction& instruction, const Argument* arguments);
  bool ReadFactor(const fxfuse_instruction& instruction, const Argument* arguments);
  bool ReadUse(const fxfuse_instruction& instruction, int value, const Argument* arguments);
  // How many factors of the product a value or the incoming gradient has; kNone if it is neither.
  int FactorsOf(const Argument& argument) const;
  int ChainValue(const Argument& argument) const {
    return argument.IsValue() ? chain_value_[argument.index] : kNone;
  }
  bool PairFactors();
  void CutParts();

  void Add(GradientCode code, int index = 0, int result = 0, float p0 = 0, float p1 = 0) {
    steps_[step_count_++] = {static_cast<uint8_t>(code),
                             Second::kNone,
                             static_cast<uint8_t>(index),
                             static_cast<uint8_t>(result),
                             p0,
                             p1};
  }
  void AddFactor(const Argument& other) {
    if (other.IsOperand()) {
      Add(GradientCode::operand, other.index, static_cast<int>(OperandUse::times_product));
    } else {
      Add(GradientCode::scale, 0, 0, 1.0f, other.constant);
    }
  }
  bool Enter(int part);
  bool WriteChain();
  bool WriteLink(int j);
  bool WriteDerivative(int j, int factor);
  void WriteProducts();
  void WriteUses(int factors);

  // As read. Of each value: its number in the chain, its number of factors (kNone: it has none),
  // and the outputs it is stored to.
  int chain_value_[kMostValues], factors_of_[kMostValues];
  uint32_t stores_[kMostValues] = {};
  Link link_[kMostValues];
  Factor factor_[kMostValues];
  Use use_[FXFUSE_MAX_OUTPUTS];
  int links_ = 0, factors_ = 0, uses_ = 0;
  int incoming_ = kNone;  // the operand that is dy

  // As written. whole_[i]: the product of i factors is needed as such. Part 0 begins with dy.
  bool whole_[kMostValues] = {};
  int part_of_[kMostValues];
  int slot_of_part_[kMostValues];
  int slot_of_value_[kMostValues];
  int slot_of_rstd_ = kNone;
  int open_ = kNone;  // the part that s is
  int slots_ = 0;
  DeviceStep* steps_ = nullptr;
  int step_count_ = 0;
};

bool ChainGradient::Read(const fxfuse_program& program) {
  Argument slot[FXFUSE_MAX_SLOTS], result[kMostValues], arguments[kMostValues][3];
  for (int i = 0; i < kMostValues; ++i) {
    chain_value_[i] = factors_of_[i] = kNone;
    result[i].index = i;
  }
  chain_value_[0] = 0;
  for (int i = 0; i < program.instruction_count; ++i) {
    const fxfuse_instruction& instruction = program.instruction[i];
    for (int j = 0; j < instruction.arity; ++j) {
      const int index = instruction.index[j];
      Argument& argument = arguments[i][j];
      switch (instruction.source[j]) {
        case FXFUSE_FROM_PREVIOUS:
          argument = result[i];
          break;
        case FXFUSE_FROM_SLOT:
          argument = slot[index];
          break;
        case FXFUSE_FROM_OPERAND:
          argument.source = FXFUSE_FROM_OPERAND;
          argument.index = index;
          break;
        default:
          argument.source = FXFUSE_FROM_IMMEDIATE;
          argument.constant = instruction.immediate[index];
      }
    }
    if (instruction.opcode == static_cast<uint16_t>(Opcode::copy)) {
      if (!arguments[i][0].IsValue()) return false;
      result[i + 1] = arguments[i][0];
    }
    if (instruction.save >= 0) slot[instruction.save] = result[i + 1];
    if (instruction.store >= 0) stores_[result[i + 1].index] |= 1u << instruction.store;
  }
  for (int i = 0; i < program.instruction_count; ++i) {
    const fxfuse_instruction& instruction = program.instruction[i];
    if (instruction.opcode == static_cast<uint16_t>(Opcode::copy)) continue;
    if (!ReadInstruction(instruction, i + 1, arguments[i])) return false;
  }
  if (factors_ == 0 || stores_[0] != 0) return false;
  CutParts();
  return PairFactors();
}

int ChainGradient::FactorsOf(const Argument& argument) const {
  if (argument.IsValue()) return factors_of_[argument.index];
  return argument.IsOperand() && argument.index == incoming_ ? 0 : kNone;
}

bool ChainGradient::ReadInstruction(const fxfuse_instruction& instruction, int value,
                                    const Argument* arguments) {
  if (stores_[value] == 0 && ReadLink(instruction, arguments)) {
    chain_value_[value] = links_;
    return true;
  }
  if (ReadFactor(instruction, arguments)) {
    factors_of_[value] = factors_;
    for (int o = 0; o < FXFUSE_MAX_OUTPUTS; ++o) {
      if (stores_[value] >> o & 1) use_[uses_++] = {factors_, kNone, o};
    }
    return true;
  }
  return ReadUse(instruction, value, arguments);
}

// The chain's next value, from its last.
bool ChainGradient::ReadLink(const fxfuse_instruction& instruction, const Argument* arguments) {
  const Opcode op = static_cast<Opcode>(instruction.opcode);
  Link link = {op, {}, instruction.immediate[0], instruction.immediate[1]};
  int from = 0;
  switch (op) {
    case Opcode::relu:
    case Opcode::clamp:
    case Opcode::silu:
    case Opcode::gelu:
    case Opcode::gelu_tanh:
    case Opcode::tanh:
    case Opcode::sigmoid:
    case Opcode::normalize:
      break;
    case Opcode::add:
    case Opcode::mul:
      if (ChainValue(arguments[0]) != links_) from = 1;
      link.other = arguments[1 - from];
      if (link.other.IsValue()) return false;
      break;
    default:
      return false;
  }
  if (ChainValue(arguments[from]) != links_) return false;
  link_[links_++] = link;
  return true;
}

// The product's next factor.
bool ChainGradient::ReadFactor(const fxfuse_instruction& instruction, const Argument* arguments) {
  const Opcode op = static_cast<Opcode>(instruction.opcode);
  Factor factor = {FindDerivative(op), {}, instruction.immediate[0], instruction.immediate[1]};
  int from = 0;
  if (op == Opcode::mul) {
    // Of an operand and what is no value either it is the operand that is dy.
    if (incoming_ == kNone && !arguments[0].IsValue() && !arguments[1].IsValue()) {
      incoming_ = arguments[arguments[0].IsOperand() ? 0 : 1].index;
    }
    if (FactorsOf(arguments[0]) != factors_) from = 1;
    factor.other = arguments[1 - from];
    if (factor.other.IsValue()) return false;
  } else if (factor.derivative != nullptr) {
    if (incoming_ == kNone && arguments[0].IsOperand()) incoming_ = arguments[0].index;
    factor.at = ChainValue(arguments[1]);
    if (factor.at == kNone) return false;
  } else {
    return false;
  }
  if (FactorsOf(arguments[from]) != factors_) return false;
  factor_[factors_++] = factor;
  return true;
}

// A product stored after it is multiplied by a value of the chain.
bool ChainGradient::ReadUse(const fxfuse_instruction& instruction, int value,
                            const Argument* arguments) {
  if (instruction.opcode != static_cast<uint16_t>(Opcode::mul) || stores_[value] == 0) return false;
  const int from = ChainValue(arguments[0]) == kNone ? 0 : 1;
  const int times = ChainValue(arguments[1 - from]);
  if (incoming_ == kNone && arguments[from].IsOperand()) incoming_ = arguments[from].index;
  const int factors = FactorsOf(arguments[from]);
  if (times == kNone || factors == kNone) return false;
  for (int o = 0; o < FXFUSE_MAX_OUTPUTS; ++o) {
    if (stores_[value] >> o & 1) use_[uses_++] = {factors, times, o};
  }
  return true;
}

void ChainGradient::CutParts() {
  for (int i = 0; i < uses_; ++i) whole_[use_[i].factors] = true;
  for (int f = 0; f < factors_; ++f) {
    if (factor_[f].OfNorm()) whole_[f] = whole_[f + 1] = true;
  }
  whole_[factors_] = true;
  int part = 0;
  for (int f = 0; f < factors_; ++f) {
    part += whole_[f];
    part_of_[f] = part;
  }
}

// Finds the link each derivative is taken with, if its function is in the program.
bool ChainGradient::PairFactors() {
  for (int f = 0; f < factors_; ++f) {
    const Factor& factor = factor_[f];
    if (factor.derivative == nullptr) continue;
    const Derivative& derivative = *factor.derivative;
    if (derivative.masks && part_of_[f] != 0) return false;
    const int j = factor.at - (derivative.of_result ? 1 : 0);
    if (j == kNone) continue;  // of a result that is the accumulator
    if (j == links_) {
      if (factor.OfNorm()) return false;
      continue;
    }
    Link& link = link_[j];
    const bool same = derivative.of == Opcode::relu ? factor.p0 == 0.0f
                                                    : factor.p0 == link.p0 && factor.p1 == link.p1;
    if (link.op != derivative.of || link.factor != kNone || !same) return false;
    link.factor = f;
  }
  return true;
}

// Makes s a part of the product. Parts come in turns, the last one first.
bool ChainGradient::Enter(int part) {
  if (open_ == part) return true;
  if (open_ != kNone) {
    if (part > open_ || slots_ == kMostSlots) return false;
    Add(GradientCode::keep_product, slot_of_part_[open_] = slots_++);
  }
  open_ = part;
  if (part > 0) {
    Add(GradientCode::begin);
    return true;
  }
  Add(GradientCode::operand, incoming_, static_cast<int>(OperandUse::begin));
  for (int f = 0; f < factors_; ++f) {
    if (part_of_[f] == 0 && factor_[f].derivative == nullptr) AddFactor(factor_[f].other);
  }
  return true;
}

bool ChainGradient::Write(DeviceStep* steps, int* step_count, int* slot_count) {
  steps_ = steps;
  for (int i = 0; i < kMostValues; ++i) slot_of_part_[i] = slot_of_value_[i] = kNone;
  for (int i = 0; i < uses_; ++i) {
    if (use_[i].times != kNone) slot_of_value_[use_[i].times] = 0;  // it needs one
  }
  for (int j = 0; j < links_; ++j) {
    if (link_[j].op == Opcode::normalize && link_[j].factor != kNone) slot_of_value_[j + 1] = 0;
  }
  if (!WriteChain()) return false;
  WriteProducts();
  Add(static_cast<GradientCode>(0));  // is read ahead of time
  *step_count = step_count_ - 1;
  *slot_count = slots_;
  return true;
}

// The chain, and the parts of the product on the way.
bool ChainGradient::WriteChain() {
  for (int j = 0; j <= links_; ++j) {
    if (slot_of_value_[j] != kNone) {
      if (slots_ == kMostSlots) return false;
      Add(GradientCode::keep_value, slot_of_value_[j] = slots_++);
    }
    // Derivatives whose function is not in the program: of the last value, and of a result.
    for (int f = factors_ - 1; f >= 0; --f) {
      if (factor_[f].derivative == nullptr || factor_[f].at != j) continue;
      const bool alone = j == (factor_[f].derivative->of_result ? 0 : links_);
      if (alone && !WriteDerivative(j, f)) return false;
    }
    if (j < links_ && !WriteLink(j)) return false;
  }
  return Enter(0);
}

bool ChainGradient::WriteLink(int j) {
  const Link& link = link_[j];
  if (link.op == Opcode::add || link.op == Opcode::mul) {
    const bool adds = link.op == Opcode::add;
    if (link.other.IsOperand()) {
      const OperandUse use = adds ? OperandUse::add_to_value : OperandUse::times_value;
      Add(GradientCode::operand, link.other.index, static_cast<int>(use));
    } else if (adds) {
      Add(GradientCode::shift, 0, 0, link.other.constant);
    } else {
      Add(GradientCode::scale, 0, 0, link.other.constant, 1.0f);
    }
    return true;
  }
  if (link.op == Opcode::normalize) {
    if (open_ != kNone || slot_of_rstd_ != kNone || slots_ == kMostSlots) return false;
    Add(GradientCode::normalize, 0, 0, link.p0, link.p1);
    if (link.factor != kNone) Add(GradientCode::keep_product, slot_of_rstd_ = slots_++);
    return true;
  }
  return link.factor != kNone && WriteDerivative(j, link.factor);
}

bool ChainGradient::WriteDerivative(int j, int f) {
  const Factor& factor = factor_[f];
  if (!Enter(part_of_[f])) return false;
  const Derivative& derivative = *factor.derivative;
  GradientCode code = derivative.code;
  if (derivative.of_result && factor.at == j) {
    code = derivative.of == Opcode::tanh ? GradientCode::tanh_result : GradientCode::sigmoid_result;
  }
  if (code == GradientCode::gelu && j > 0) {
    const Link& before = link_[j - 1];
    const bool confined = before.op == Opcode::clamp && before.p0 >= -1.0f && before.p1 <= 1.0f;
    if (confined || before.op == Opcode::tanh || before.op == Opcode::sigmoid) {
      code = GradientCode::gelu_unit;
    }
  }
  Add(code, 0, 0, factor.p0, factor.p1);
  return true;
}

// The products of the parts, from that with dy on.
void ChainGradient::WriteProducts() {
  WriteUses(0);
  for (int f = 0; f < factors_; ++f) {
    const Factor& factor = factor_[f];
    const int part = part_of_[f];
    if (factor.OfNorm()) {
      Add(GradientCode::normalize_back, slot_of_value_[factor.at + 1], slot_of_rstd_, factor.p0);
    } else if (factor.derivative == nullptr && part > 0) {
      AddFactor(factor.other);
    }
    if (!whole_[f + 1]) continue;
    if (part > 0 && slot_of_part_[part] != kNone) {
      Add(GradientCode::times_slot, slot_of_part_[part]);
    }
    WriteUses(f + 1);
  }
}

void ChainGradient::WriteUses(int factors) {
  for (int i = 0; i < uses_; ++i) {
    const Use& use = use_[i];
    if (use.factors != factors) continue;
    if (use.times == kNone) {
      Add(GradientCode::store, 0, use.output);
    } else {
      Add(GradientCode::store_times, slot_of_value_[use.times], use.output);
    }
  }
}

}  // namespace

bool TranslateGradient(const fxfuse_problem& problem, DeviceProgram* device) {
  DeviceStep steps[kMaxDeviceSteps];
  int step_count, slot_count;
  ChainGradient gradient;
  if (problem.has_gemm || !gradient.Read(problem.program)) return false;
  if (!gradient.Write(steps, &step_count, &slot_count)) return false;
  memcpy(device->step, steps, (step_count + 1) * sizeof(DeviceStep));
  device->step_count = step_count;
  device->slot_count = static_cast<int16_t>(slot_count);
  device->first_slot = 0;
  return true;
}

}  // namespace fxfuse
