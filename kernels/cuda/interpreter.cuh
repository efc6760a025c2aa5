// Runs an epilogue program over a fragment of the output matrix held in registers:
//
//   value            = accumulator                              at each element of the fragment
//   value, slots     = opcode(arguments)                        for each step in turn
//   output[store]    = value                                    where a step says so
//
// Only the value lives in registers from step to step. A second argument is put into a slot, in
// memory, and read there by the op's own code: held in registers, it would be moved to where each
// op expects it, at every branch on the way.
//
// The code exists once per kernel: callers loop over fragments instead of unrolling.

#ifndef FXFUSE_CUDA_INTERPRETER_CUH_
#define FXFUSE_CUDA_INTERPRETER_CUH_

#include <stddef.h>

#include <type_traits>

#include "device_program.h"
#include "fragment.cuh"
#include "group_ops.cuh"
#include "memory.cuh"
#include "pointwise.h"

namespace fxfuse {

// Opcodes that most programs are made of: unrolled over the whole fragment.
FXFUSE_HD constexpr bool IsHot(Opcode op) {
  return op == Opcode::add || op == Opcode::relu || op == Opcode::mul || op == Opcode::gelu ||
         op == Opcode::silu || op == Opcode::tanh || op == Opcode::clamp || op == Opcode::sigmoid ||
         op == Opcode::gelu_tanh;
}

// Opcodes that are long in instructions and rare in models. They run a few elements at a time in a
// loop, which keeps them from dominating the size (and the compile time) of every kernel.
FXFUSE_HD constexpr bool IsCompact(Opcode op) {
  return op == Opcode::pow || op == Opcode::sin || op == Opcode::cos || op == Opcode::log1p ||
         op == Opcode::expm1 || op == Opcode::log10 || op == Opcode::mish ||
         op == Opcode::softplus || op == Opcode::logsigmoid || op == Opcode::tanhshrink ||
         op == Opcode::celu;
}

// A step in registers, fetched whole, and one step ahead, so that decoding never waits for constant
// memory.
class Decoded {
 public:
  __device__ __forceinline__ Decoded(const DeviceProgram& program, int i) {
    static_assert(offsetof(DeviceStep, second) == 1 && offsetof(DeviceStep, index) == 2 &&
                      offsetof(DeviceStep, result) == 3 && offsetof(DeviceStep, p0) == 4 &&
                      sizeof(DeviceStep) == 12,
                  "the shifts below");
    const uint32_t* from = reinterpret_cast<const uint32_t*>(&program.step[i]);
    word_ = from[0];
    p0_ = __uint_as_float(from[1]);
    p1_ = __uint_as_float(from[2]);
  }

  __device__ __forceinline__ int code() const { return word_ & 0xff; }
  __device__ __forceinline__ Second second() const {
    return static_cast<Second>(word_ >> 8 & 0xff);
  }
  __device__ __forceinline__ int index() const { return word_ >> 16 & 0xff; }
  __device__ __forceinline__ int result() const { return word_ >> 24; }
  __device__ __forceinline__ float p0() const { return p0_; }
  __device__ __forceinline__ float p1() const { return p1_; }

 private:
  uint32_t word_;
  float p0_, p1_;
};

// The same in double precision, with constants out of their table.
class DecodedDouble : public Decoded {
 public:
  __device__ __forceinline__ DecodedDouble(const DoubleProgram& program, int i)
      : Decoded(program, i) {
    const uint32_t place = __float_as_uint(Decoded::p0());
    p0_ = program.constant[place];
    p1_ = program.constant[place + 1];
  }
  __device__ __forceinline__ double p0() const { return p0_; }
  __device__ __forceinline__ double p1() const { return p1_; }

 private:
  double p0_, p1_;
};

// What is interpreted over values of a type.
template <class Value>
struct ProgramOver {
  using Program = DeviceProgram;
  using Step = Decoded;
};
template <>
struct ProgramOver<double> {
  using Program = DoubleProgram;
  using Step = DecodedDouble;
};

// In place of sums, for kernels whose problems have none.
struct NoSums {};

// A thread's slots in local memory: registers cannot be indexed.
template <class Value, int kSize>
class LocalSlots {
 public:
  __device__ __forceinline__ LocalSlots() {}

  // Values `from` and after of a slot.
  template <int kCount>
  __device__ __forceinline__ void Read(int slot, int from, Value (&to)[kCount]) const {
#pragma unroll
    for (int j = 0; j < kCount; ++j) to[j] = value_[slot][from + j];
  }
  __device__ __forceinline__ void Write(int slot, const Value (&from)[kSize]) {
#pragma unroll
    for (int j = 0; j < kSize; ++j) value_[slot][j] = from[j];
  }
  __device__ __forceinline__ void Fill(int slot, Value value) {
#pragma unroll
    for (int j = 0; j < kSize; ++j) value_[slot][j] = value;
  }

 private:
  Value value_[kDeviceSlots][kSize];
};

// Sums: what takes the values of outputs that are summed, by Add(program, output, at, values).
// kGroups: whether programs may have ops over groups of columns. Then all lanes of a warp run at
// once, and those side by side have adjacent columns, from a multiple of every group's width on.
// Slots: as LocalSlots.
template <class Fragment, class Math, class Sums = NoSums, bool kGroups = false,
          class Slots = LocalSlots<typename Math::Value, Fragment::kSize>>
struct Interpreter {
  static constexpr int kSize = Fragment::kSize;
  static constexpr bool kSums = !std::is_same<Sums, NoSums>::value;
  using Value = typename Math::Value;
  using Values = Value[kSize];
  using Program = typename ProgramOver<Value>::Program;
  using Step = typename ProgramOver<Value>::Step;

  // Leaves the program's last value in `v`, beginning at step `first`.
  static __device__ __forceinline__ void Run(const Program& program, const Fragment& at, Values& v,
                                             int first = 0, Sums sums = {}, Slots slot = {}) {
    Step next(program, first);
    if (program.first_slot > 0) slot.Write(program.first_slot, v);
#pragma unroll 1
    for (int i = first; i < program.step_count; ++i) {
      const Step step = next;
      next = Step(program, i + 1);
      if (step.second() > Second::kSlot) Fetch(program, step, at, v, slot);
      Dispatch(step, v, slot);
      const int result = step.result();
      if (result == 0) continue;
      if (KeptSlot(result) > 0) slot.Write(KeptSlot(result), v);
      if (StoredOutput(result) == 0) continue;
      const int last = StoredOutput(result) - 1 + StoredAgain(result);
#pragma unroll 1
      for (int index = StoredOutput(result) - 1; index <= last; ++index) {
        const DeviceOutput& output = program.output[index];
        if constexpr (kSums) {
          if (output.sum != FXFUSE_SUM_NONE) {
            sums.Add(program, index, at, v);
            continue;
          }
        }
        Store(program, output, at, v);
      }
    }
  }

  // The operand's elements that meet the fragment's.
  static __device__ __forceinline__ void Load(const DeviceProgram& program,
                                              const DeviceOperand& operand, const Fragment& at,
                                              Values& t) {
    constexpr int kWidth = Fragment::kWidth, kRows = Fragment::kRows, kBlocks = Fragment::kBlocks;
    const bool vector = operand.access == Access::kVector && WholeVectors(program);
    if (vector && operand.row_stride == 0) {  // the same for all rows
      int64_t offset[kBlocks];
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) offset[b] = ReadColumn(program, at, b * kRows);
      Value row[kWidth * kBlocks];
      LoadVectors<kWidth, kBlocks>(operand.data, operand.dtype, offset, row);
#pragma unroll
      for (int j = 0; j < kSize; ++j) t[j] = row[j / (kWidth * kRows) * kWidth + j % kWidth];
    } else if (vector) {
      int64_t offset[Fragment::kGroups];
#pragma unroll
      for (int g = 0; g < Fragment::kGroups; ++g) {
        offset[g] = OperandRow(program, operand, at.Row(g)) + ReadColumn(program, at, g);
      }
      LoadVectors<kWidth, Fragment::kGroups>(operand.data, operand.dtype, offset, t);
    } else if (operand.access == Access::kBroadcast) {
      int64_t offset[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) offset[r] = OperandRow(program, operand, at.Row(r));
      Value value[kRows];
      LoadElements<kRows>(operand.data, operand.dtype, offset, value);
#pragma unroll
      for (int j = 0; j < kSize; ++j) t[j] = value[j / kWidth % kRows];
    } else {
#pragma unroll 1
      for (int g = 0; g < Fragment::kGroups; ++g) {
        const int64_t row = OperandRow(program, operand, at.Row(g));
        int64_t offset[kWidth];
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          offset[j] = row + min(at.Column(g) + j, program.columns - 1) * operand.column_stride;
        }
        Value value[kWidth];
        LoadElements<kWidth>(operand.data, operand.dtype, offset, value);
        Turn<kWidth>(t);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) t[kSize - kWidth + j] = value[j];
      }
    }
  }

  // The values may be turned on the way, and are as they were in the end.
  static __device__ __forceinline__ void Store(const DeviceProgram& program,
                                               const DeviceOutput& output, const Fragment& at,
                                               Values& v) {
    constexpr int kWidth = Fragment::kWidth;
    if (output.vector && WholeVectors(program)) {
#pragma unroll
      for (int g = 0; g < Fragment::kGroups; ++g) {
        if (at.Row(g) >= program.rows || at.Column(g) >= program.columns) continue;
        const int64_t offset = at.Row(g) * output.row_stride + at.Column(g);
        StoreVector<kWidth>(output.data, output.dtype, offset, v + g * kWidth);
      }
      return;
    }
#pragma unroll 1
    for (int g = 0; g < Fragment::kGroups; ++g) {
      if (at.Row(g) < program.rows) {
        const int64_t offset = at.Row(g) * output.row_stride + at.Column(g);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          if (at.Column(g) + j < program.columns) {
            StoreElement(output.data, output.dtype, offset + j, v[j]);
          }
        }
      }
      Turn<kWidth>(v);
    }
  }

 private:
  // Puts a step's second, which lies in no slot, into the one for it.
  static __device__ __forceinline__ void Fetch(const Program& program, const Step& step,
                                               const Fragment& at, const Values& v, Slots& slot) {
    if (step.second() == Second::kPrevious) return slot.Write(kSecondSlot, v);
    if (step.second() == Second::kConstant) return slot.Fill(kSecondSlot, step.p0());
    Values b;
    Load(program, program.operand[OperandOf(step.second())], at, b);
    slot.Write(kSecondSlot, b);
  }

  static __device__ __forceinline__ void Dispatch(const Step& step, Values& v, Slots& slot) {
    const Value p0 = step.p0(), p1 = step.p1();
    const int b = step.index();
    switch (step.code()) {
#define FXFUSE_OP(name, arity, params) \
  case static_cast<int>(Opcode::name): \
    return Execute<Opcode::name>(v, slot, b, p0, p1);
#define FXFUSE_GROUP_OP(name, arity, params) case static_cast<int>(Opcode::name):
#include "opcodes.def"
#undef FXFUSE_GROUP_OP
#undef FXFUSE_OP
      if constexpr (kGroups) {
        const auto second = [&](int from, auto& to) { slot.Read(b, from, to); };
        GroupOps<Fragment, Math>::Run(static_cast<Opcode>(step.code()), v, second, p0, p1);
      }
      return;
      case kSwap: {
        Values first;
        slot.Read(b, 0, first);
        slot.Write(kSecondSlot, v);
#pragma unroll
        for (int j = 0; j < kSize; ++j) v[j] = first[j];
        return;
      }
      case kTake:
        return slot.Read(b, 0, v);
      case kKeepThird: {
        Values third;
        slot.Read(b, 0, third);
        return slot.Write(kThirdSlot, third);
      }
    }
  }

  // v = op(v, slot b, third slot) over the fragment; no more is read than the op takes.
  template <Opcode op>
  static __device__ __forceinline__ void Execute(Values& v, const Slots& slot, int b, Value p0,
                                                 Value p1) {
    constexpr int kArguments = kArity[static_cast<int>(op)];
    constexpr int kStep = std::is_same<Value, double>::value && kArguments < 3
                              ? (IsCompact(op) ? 1 : 2)  // functions of doubles are long
                          : IsHot(op) || kArguments == 3
                              ? kSize
                              : (IsCompact(op) ? 4 : (kSize < 16 ? kSize : 16));
    static_assert(kSize % kStep == 0, "the loop below takes whole steps");
#pragma unroll 1
    for (int i = 0; i < kSize; i += kStep) {
      Value second[kStep] = {}, third[kStep] = {};
      if constexpr (kArguments > 1) slot.Read(b, i, second);
      if constexpr (kArguments > 2) slot.Read(kThirdSlot, i, third);
#pragma unroll
      for (int j = 0; j < kStep; ++j) v[j] = Apply<Math, op>(v[j], second[j], third[j], p0, p1);
      if constexpr (kStep < kSize) Turn<kStep>(v);
    }
  }

  // Whether vectors of the fragment's width lie wholly inside the matrix or wholly outside.
  static __device__ __forceinline__ bool WholeVectors(const DeviceProgram& program) {
    return program.columns % Fragment::kWidth == 0;
  }

  // A column to read group `g` from: the fragment's own, or a valid one where that is outside.
  static __device__ __forceinline__ uint32_t ReadColumn(const DeviceProgram& program,
                                                        const Fragment& at, int g) {
    return min(at.Column(g), program.columns - Fragment::kWidth);
  }

  // Where the operand's row for row `row` of the matrix begins, in elements. Rows past the end are
  // read as the last one and never stored.
  static __device__ __forceinline__ int64_t OperandRow(const DeviceProgram& program,
                                                       const DeviceOperand& operand, uint32_t row) {
    row = min(row, program.rows - 1);
    if (operand.periodic) row = row / operand.repeat % operand.period;
    return row * operand.row_stride;
  }
};

}  // namespace fxfuse

#endif  // FXFUSE_CUDA_INTERPRETER_CUH_
