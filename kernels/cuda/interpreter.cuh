// Runs an epilogue program over a fragment of the output matrix held in registers:
//
//   value            = accumulator                              at each element of the fragment
//   value, slots     = opcode(arguments)                        for each instruction in turn
//   output[store]    = value                                    where an instruction says so
//
// Decoding and dispatch cost some 100 cycles per instruction and fragment. They exist once per
// kernel: callers loop over fragments instead of unrolling.

#ifndef FXFUSE_CUDA_INTERPRETER_CUH_
#define FXFUSE_CUDA_INTERPRETER_CUH_

#include <stddef.h>

#include <type_traits>

#include "device_program.h"
#include "memory.cuh"
#include "pointwise.h"

namespace fxfuse {

// Opcodes that most programs are made of: tried first, and unrolled over the whole fragment.
#define FXFUSE_HOT_OPS(X) \
  X(add) X(relu) X(mul) X(gelu) X(silu) X(tanh) X(clamp) X(sigmoid) X(gelu_tanh)

FXFUSE_HD constexpr bool IsHot(Opcode op) {
#define FXFUSE_HOT(name) || op == Opcode::name
  return false FXFUSE_HOT_OPS(FXFUSE_HOT);
#undef FXFUSE_HOT
}

// Opcodes that are long in instructions and rare in models. They run a few elements at a time in a
// loop, which keeps them from dominating the size (and the compile time) of every kernel.
FXFUSE_HD constexpr bool IsCompact(Opcode op) {
  return op == Opcode::pow || op == Opcode::sin || op == Opcode::cos || op == Opcode::log1p ||
         op == Opcode::expm1 || op == Opcode::log10 || op == Opcode::mish ||
         op == Opcode::softplus || op == Opcode::logsigmoid || op == Opcode::tanhshrink ||
         op == Opcode::celu;
}

// An instruction in registers: five words fetched at once, and one instruction ahead, so that
// decoding never waits for constant memory.
class Decoded {
 public:
  // `i` may be one past the last.
  __device__ __forceinline__ Decoded(const DeviceProgram& program, int i) {
    static_assert(
        sizeof(fxfuse_instruction) == sizeof(word_) && offsetof(fxfuse_instruction, source) == 4 &&
            offsetof(fxfuse_instruction, index) == 7 && offsetof(fxfuse_instruction, arity) == 10 &&
            offsetof(fxfuse_instruction, immediate) == 12,
        "the shifts below");
    i = min(i, kMaxDeviceInstructions - 1);
    const uint32_t* from = reinterpret_cast<const uint32_t*>(&program.instruction[i]);
#pragma unroll
    for (int j = 0; j < 5; ++j) word_[j] = from[j];
  }

  __device__ __forceinline__ Opcode opcode() const {
    return static_cast<Opcode>(word_[0] & 0xffff);
  }
  __device__ __forceinline__ int save() const { return static_cast<int8_t>(word_[0] >> 16); }
  __device__ __forceinline__ int store() const { return static_cast<int8_t>(word_[0] >> 24); }
  __device__ __forceinline__ int source(int argument) const {
    return word_[1] >> (8 * argument) & 0xff;
  }
  __device__ __forceinline__ int index(int argument) const {
    return (word_[1] >> 24 | word_[2] << 8) >> (8 * argument) & 0xff;
  }
  __device__ __forceinline__ int arity() const { return word_[2] >> 16 & 0xff; }
  __device__ __forceinline__ float immediate(int i) const {
    return __uint_as_float(i == 0 ? word_[3] : word_[4]);
  }

 private:
  uint32_t word_[5];
};

// The same in double precision, with immediates out of their table.
class DecodedDouble : public Decoded {
 public:
  __device__ __forceinline__ DecodedDouble(const DoubleProgram& program, int i)
      : Decoded(program, i) {
    i = min(i, kMaxDeviceInstructions - 1);
    immediate_[0] = program.immediate[i][0], immediate_[1] = program.immediate[i][1];
  }
  __device__ __forceinline__ double immediate(int i) const {
    return i == 0 ? immediate_[0] : immediate_[1];
  }

 private:
  double immediate_[2];
};

// What is interpreted over values of a type.
template <class Value>
struct ProgramOver {
  using Program = DeviceProgram;
  using Instruction = Decoded;
};
template <>
struct ProgramOver<double> {
  using Program = DoubleProgram;
  using Instruction = DecodedDouble;
};

// In place of sums, for kernels whose problems have none.
struct NoSums {};

// Sums: what takes the values of outputs that are summed, by Add(program, output, at, values).
template <class Fragment, class Math, class Sums = NoSums>
struct Interpreter {
  static constexpr int kSize = Fragment::kSize;
  static constexpr bool kSums = !std::is_same<Sums, NoSums>::value;
  using Value = typename Math::Value;
  using Values = Value[kSize];
  using Program = typename ProgramOver<Value>::Program;
  using Instruction = typename ProgramOver<Value>::Instruction;

  // Leaves the program's last value in `v`, beginning at instruction `first`.
  static __device__ __forceinline__ void Run(const Program& program, const Fragment& at, Values& v,
                                             int first = 0, Sums sums = {}) {
    Slots slot;
    Values b = {};
    Instruction next(program, first);
#pragma unroll 1
    for (int i = first; i < program.instruction_count; ++i) {
      const Instruction instruction = next;
      next = Instruction(program, i + 1);
      Gather(program, instruction, at, slot, v, b);
      Dispatch(instruction, v, b, slot[kThird]);
      if (instruction.save() >= 0) {
#pragma unroll
        for (int j = 0; j < kSize; ++j) slot[instruction.save()][j] = v[j];
      }
      if (instruction.store() < 0) continue;
      const DeviceOutput& output = program.output[instruction.store()];
      if constexpr (kSums) {
        if (output.sum != FXFUSE_SUM_NONE) {
          sums.Add(program, instruction.store(), at, v);
          continue;
        }
      }
      Store(program, output, at, v);
    }
  }

 private:
  // Indexed at run time, hence in local memory; rarely used. The one past the last holds the third
  // argument of an instruction: too rare for registers.
  static constexpr int kThird = FXFUSE_MAX_SLOTS;
  using Slots = Value[FXFUSE_MAX_SLOTS + 1][kSize];

  // Puts the arguments where Dispatch wants them: the first in `v`, the second in `b`, the third in
  // slot[kThird]. Not unrolled: one copy of the fetching code, into `b`, serves all three. The
  // second is fetched last, and `v` gives way to the first only when no one else asks for it.
  static __device__ __forceinline__ void Gather(const Program& program,
                                                const Instruction& instruction, const Fragment& at,
                                                Slots& slot, Values& v, Values& b) {
    const int arity = instruction.arity();
    if (arity == 1 && instruction.source(0) == FXFUSE_FROM_PREVIOUS) return;
#pragma unroll 1
    for (int turn = arity == 3 ? 0 : 1; turn < 3; ++turn) {
      const int argument = turn == 0 ? 2 : turn - 1;
      if (argument >= arity) break;
      const int source = instruction.source(argument);
      const int index = instruction.index(argument);
      if (source == FXFUSE_FROM_OPERAND) {
        Load(program, program.operand[index], at, b);
      } else if (source == FXFUSE_FROM_IMMEDIATE) {
        const Value immediate = instruction.immediate(index);
#pragma unroll
        for (int j = 0; j < kSize; ++j) b[j] = immediate;
      } else if (source == FXFUSE_FROM_SLOT) {
#pragma unroll
        for (int j = 0; j < kSize; ++j) b[j] = slot[index][j];
      } else {
        if (argument == 0) continue;  // in place
#pragma unroll
        for (int j = 0; j < kSize; ++j) b[j] = v[j];
      }
      if (argument == 2) {
#pragma unroll
        for (int j = 0; j < kSize; ++j) slot[kThird][j] = b[j];
      } else if (argument == 0) {
#pragma unroll
        for (int j = 0; j < kSize; ++j) {
          const Value previous = v[j];
          v[j] = b[j];
          b[j] = previous;
        }
        if (arity > 1 && instruction.source(1) == FXFUSE_FROM_PREVIOUS) break;
      }
    }
  }

  static __device__ __forceinline__ void Dispatch(const Instruction& instruction, Values& v,
                                                  Values& b, const Values& c) {
    const Value p0 = instruction.immediate(0);
    const Value p1 = instruction.immediate(1);
    const Opcode opcode = instruction.opcode();
#define FXFUSE_HOT(name) \
  if (opcode == Opcode::name) return Execute<Opcode::name>(v, b, c, p0, p1);
    FXFUSE_HOT_OPS(FXFUSE_HOT)
#undef FXFUSE_HOT
    switch (opcode) {
#define FXFUSE_OP(name, arity, params)                                          \
  case Opcode::name:                                                            \
    if constexpr (!IsHot(Opcode::name)) Execute<Opcode::name>(v, b, c, p0, p1); \
    break;
#include "opcodes.def"
#undef FXFUSE_OP
    }
  }

  template <Opcode op>
  static __device__ __forceinline__ void Execute(Values& v, Values& b, const Values& c, Value p0,
                                                 Value p1) {
    constexpr int kArguments = kArity[static_cast<int>(op)];
    constexpr int kStep = std::is_same<Value, double>::value && kArguments < 3
                              ? (IsCompact(op) ? 1 : 2)  // functions of doubles are long
                          : IsHot(op) || kArguments == 3
                              ? kSize
                              : (IsCompact(op) ? 4 : (kSize < 16 ? kSize : 16));
    static_assert(kSize % kStep == 0, "the loop below takes whole steps");
    // Registers cannot be indexed, so the fragment turns past a fixed window instead: after a full
    // turn every element is back in its place.
#pragma unroll 1
    for (int i = 0; i < kSize; i += kStep) {
      Value result[kStep];
#pragma unroll
      for (int j = 0; j < kStep; ++j) result[j] = Apply<Math, op>(v[j], b[j], c[j], p0, p1);
      Turn<kStep>(v);
      if constexpr (kArguments > 1) Turn<kStep>(b);
#pragma unroll
      for (int j = 0; j < kStep; ++j) v[kSize - kStep + j] = result[j];
    }
  }

  template <int kStep>
  static __device__ __forceinline__ void Turn(Values& x) {
    Value head[kStep];
#pragma unroll
    for (int j = 0; j < kStep; ++j) head[j] = x[j];
#pragma unroll
    for (int j = 0; j < kSize - kStep; ++j) x[j] = x[j + kStep];
#pragma unroll
    for (int j = 0; j < kStep; ++j) x[kSize - kStep + j] = head[j];
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

  // Where the operand's row for row `row` of the matrix begins, in elements. Rows past the end are
  // read as the last one and never stored.
  static __device__ __forceinline__ int64_t OperandRow(const DeviceProgram& program,
                                                       const DeviceOperand& operand, uint32_t row) {
    row = min(row, program.rows - 1);
    if (operand.periodic) row = row / operand.repeat % operand.period;
    return row * operand.row_stride;
  }

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
};

}  // namespace fxfuse

#endif  // FXFUSE_CUDA_INTERPRETER_CUH_
