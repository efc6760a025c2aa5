// Runs an epilogue program over a fragment of the output matrix held in registers:
//
//   value            = accumulator                              at each element of the fragment
//   value, slots     = opcode(arguments)                        for each instruction in turn
//   output[store]    = value                                    where an instruction says so
//
// The dispatch is one uniform branch per instruction and fragment. It exists once per kernel:
// callers loop over fragments instead of unrolling.

#ifndef FXFUSE_CUDA_INTERPRETER_CUH_
#define FXFUSE_CUDA_INTERPRETER_CUH_

#include "device_program.h"
#include "memory.cuh"
#include "pointwise.h"

namespace fxfuse {

// Opcodes that are long in instructions and rare in models. They run a few elements at a time in a
// loop, which keeps them from dominating the size (and the compile time) of every kernel.
FXFUSE_HD constexpr bool IsCompact(Opcode op) {
  return op == Opcode::pow || op == Opcode::sin || op == Opcode::cos || op == Opcode::log1p ||
         op == Opcode::expm1 || op == Opcode::log10 || op == Opcode::mish ||
         op == Opcode::softplus || op == Opcode::logsigmoid || op == Opcode::tanhshrink ||
         op == Opcode::celu;
}

template <class Fragment, class Math>
struct Interpreter {
  static constexpr int kSize = Fragment::kSize;
  static constexpr int kCompactStep = 4;
  static_assert(kSize % kCompactStep == 0, "the compact loop takes whole steps");

  using Values = float[kSize];

  // Leaves the program's last value in `v`.
  static __device__ __forceinline__ void Run(const DeviceProgram& program, const Fragment& at,
                                             Values& v) {
    float slot[FXFUSE_MAX_SLOTS][kSize];  // indexed at run time, hence in local memory; rarely used
    Values b = {}, c = {};
#pragma unroll 1
    for (int i = 0; i < program.instruction_count; ++i) {
      const fxfuse_instruction& instruction = program.instruction[i];
      Gather(program, instruction, at, slot, v, b, c);
      Dispatch(instruction, v, b, c);
      if (instruction.save >= 0) {
#pragma unroll
        for (int j = 0; j < kSize; ++j) slot[instruction.save][j] = v[j];
      }
      if (instruction.store >= 0) Store(program, program.output[instruction.store], at, v);
    }
  }

  // Shared with the slab interpreter from here on.

  // Puts the arguments where Dispatch wants them. Last to first, as `v` is still the previous
  // value while it may be asked for. Not unrolled: one copy of the fetching code serves all three.
  static __device__ __forceinline__ void Gather(const DeviceProgram& program,
                                                const fxfuse_instruction& instruction,
                                                const Fragment& at,
                                                const float (&slot)[FXFUSE_MAX_SLOTS][kSize],
                                                Values& v, Values& b, Values& c) {
#pragma unroll 1
    for (int argument = instruction.arity - 1; argument >= 0; --argument) {
      const int source = instruction.source[argument];
      const int index = instruction.index[argument];
      if (argument == 0 && source == FXFUSE_FROM_PREVIOUS) break;
      Values t;
      if (source == FXFUSE_FROM_OPERAND) {
        Load(program, program.operand[index], at, t);
      } else if (source == FXFUSE_FROM_IMMEDIATE) {
        const float immediate = instruction.immediate[index];
#pragma unroll
        for (int j = 0; j < kSize; ++j) t[j] = immediate;
      } else if (source == FXFUSE_FROM_SLOT) {
#pragma unroll
        for (int j = 0; j < kSize; ++j) t[j] = slot[index][j];
      } else {
#pragma unroll
        for (int j = 0; j < kSize; ++j) t[j] = v[j];
      }
      if (argument == 0) {
#pragma unroll
        for (int j = 0; j < kSize; ++j) v[j] = t[j];
      } else if (argument == 1) {
#pragma unroll
        for (int j = 0; j < kSize; ++j) b[j] = t[j];
      } else {
#pragma unroll
        for (int j = 0; j < kSize; ++j) c[j] = t[j];
      }
    }
  }

  static __device__ __forceinline__ void Dispatch(const fxfuse_instruction& instruction, Values& v,
                                                  Values& b, Values& c) {
    const float p0 = instruction.immediate[0];
    const float p1 = instruction.immediate[1];
    switch (static_cast<Opcode>(instruction.opcode)) {
#define FXFUSE_OP(name, arity, params)      \
  case Opcode::name:                        \
    Execute<Opcode::name>(v, b, c, p0, p1); \
    break;
#include "opcodes.def"
#undef FXFUSE_OP
    }
  }

  template <Opcode op>
  static __device__ __forceinline__ void Execute(Values& v, Values& b, Values& c, float p0,
                                                 float p1) {
    if constexpr (!IsCompact(op)) {
#pragma unroll
      for (int j = 0; j < kSize; ++j) v[j] = Apply<Math, op>(v[j], b[j], c[j], p0, p1);
    } else {
      // Registers cannot be indexed, so the fragment turns past a fixed window instead: after a
      // full turn every element is back in its place.
#pragma unroll 1
      for (int i = 0; i < kSize; i += kCompactStep) {
        float result[kCompactStep];
#pragma unroll
        for (int j = 0; j < kCompactStep; ++j) {
          result[j] = Apply<Math, op>(v[j], b[j], c[j], p0, p1);
        }
        Turn(v);
        if constexpr (kArity[static_cast<int>(op)] > 1) Turn(b);
        if constexpr (kArity[static_cast<int>(op)] > 2) Turn(c);
#pragma unroll
        for (int j = 0; j < kCompactStep; ++j) v[kSize - kCompactStep + j] = result[j];
      }
    }
  }

  static __device__ __forceinline__ void Turn(Values& x) {
    float head[kCompactStep];
#pragma unroll
    for (int j = 0; j < kCompactStep; ++j) head[j] = x[j];
#pragma unroll
    for (int j = 0; j < kSize - kCompactStep; ++j) x[j] = x[j + kCompactStep];
#pragma unroll
    for (int j = 0; j < kCompactStep; ++j) x[kSize - kCompactStep + j] = head[j];
  }

  static __device__ __forceinline__ void Load(const DeviceProgram& program,
                                              const DeviceOperand& operand, const Fragment& at,
                                              Values& t) {
    uint32_t row[Fragment::kGroups];
#pragma unroll
    for (int g = 0; g < Fragment::kGroups; ++g) {
      // Rows past the end are read as the last one and never stored.
      row[g] = min(at.Row(g), program.rows - 1);
      if (operand.periodic) row[g] = row[g] / operand.repeat % operand.period;
    }
    if (operand.access == Access::kBroadcast) {
#pragma unroll
      for (int g = 0; g < Fragment::kGroups; ++g) {
        const float value = LoadElement(operand.data, operand.dtype, row[g] * operand.row_stride);
#pragma unroll
        for (int j = 0; j < Fragment::kWidth; ++j) t[g * Fragment::kWidth + j] = value;
      }
    } else if (operand.access == Access::kVector &&
               at.Column() + Fragment::kWidth <= program.columns) {
      int64_t offset[Fragment::kGroups];
#pragma unroll
      for (int g = 0; g < Fragment::kGroups; ++g) {
        offset[g] = row[g] * operand.row_stride + at.Column();
      }
      LoadVectors<Fragment::kWidth, Fragment::kGroups>(operand.data, operand.dtype, offset, t);
    } else {
#pragma unroll
      for (int j = 0; j < Fragment::kWidth; ++j) {
        const uint32_t column = min(at.Column() + j, program.columns - 1);
#pragma unroll
        for (int g = 0; g < Fragment::kGroups; ++g) {
          const int64_t offset = row[g] * operand.row_stride + column * operand.column_stride;
          t[g * Fragment::kWidth + j] = LoadElement(operand.data, operand.dtype, offset);
        }
      }
    }
  }

  static __device__ __forceinline__ void Store(const DeviceProgram& program,
                                               const DeviceOutput& output, const Fragment& at,
                                               const Values& v) {
    const bool whole = output.vector && at.Column() + Fragment::kWidth <= program.columns;
#pragma unroll
    for (int g = 0; g < Fragment::kGroups; ++g) {
      if (at.Row(g) >= program.rows) continue;
      const int64_t offset = at.Row(g) * output.row_stride + at.Column();
      const float* values = v + g * Fragment::kWidth;
      if (whole) {
        StoreVector<Fragment::kWidth>(output.data, output.dtype, offset, values);
      } else {
#pragma unroll
        for (int j = 0; j < Fragment::kWidth; ++j) {
          if (at.Column() + j < program.columns) {
            StoreElement(output.data, output.dtype, offset + j, values[j]);
          }
        }
      }
    }
  }
};

}  // namespace fxfuse

#endif  // FXFUSE_CUDA_INTERPRETER_CUH_
