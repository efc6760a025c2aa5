// Runs an epilogue program over a slab of the output matrix that one warp keeps in shared memory:
//
//   slab          = accumulator                  16 rows of a warpgroup tile's columns
//   slab, slots   = opcode(slab, arguments)      for each instruction in turn, over the whole slab
//   output[store] = slab                         where an instruction says so
//
// A vector machine: an instruction is decoded once for 64 values a lane, not once for 16 as by the
// register interpreter, and a row operand is fetched once for all rows. That matters where only
// one warp of each SM quarter runs the epilogue, with nobody to hide its latencies but itself. The
// price is a load and a store of shared memory per value and instruction.
//
// Every lane reads and writes its own elements, so nothing is synchronised between instructions.

#ifndef FXFUSE_CUDA_SLAB_INTERPRETER_CUH_
#define FXFUSE_CUDA_SLAB_INTERPRETER_CUH_

#include "fragment.cuh"
#include "interpreter.cuh"

namespace fxfuse {

// Rows are divided into chunks of four floats. Chunk c of row r lies at c ^ 2 (r % 4) ^ (c / 8 %
// 2): the first term keeps apart the four rows whose accumulators a half-warp writes at a time, the
// second the even chunks that eight lanes read at a time.
template <int kColumns_>
struct SlabShape {
  static constexpr int kRows = 16;
  static constexpr int kColumns = kColumns_;
  static constexpr int kFloats = kRows * kColumns;

  // A lane holds eight adjacent columns of every kRowStep-th row, and works on two rows at a time.
  static constexpr int kWidth = 8;
  static constexpr int kLanesPerRow = kColumns / kWidth;
  static constexpr int kRowStep = 32 / kLanesPerRow;
  static constexpr int kGroups = 2;
  static constexpr int kTurns = kRows / (kRowStep * kGroups);
  using Fragment = RowFragment<kWidth, kGroups>;

  static_assert(kColumns % 64 == 0 && kColumns <= 128,
                "whole swizzle periods, a row or more a warp");
  static_assert(kRowStep * kGroups % 4 == 0, "r % 4 is the same in every turn");

  static __device__ __forceinline__ int Offset(int row, int chunk) {
    return row * kColumns + (chunk ^ (row % 4 * 2) ^ (chunk / 8 % 2)) * 4;
  }
};

template <class Shape, class Math>
class SlabInterpreter {
 public:
  using Fragment = typename Shape::Fragment;
  static constexpr int kSize = Fragment::kSize;
  static constexpr int kChunks = kSize / 4;
  using Values = float[kSize];

  // `slab` holds the accumulators whose first element is (row, column) of the matrix.
  __device__ __forceinline__ SlabInterpreter(float* slab, uint32_t row, uint32_t column)
      : row_(row + threadIdx.x % 32 / Shape::kLanesPerRow),
        column_(column + threadIdx.x % 32 % Shape::kLanesPerRow * Shape::kWidth) {
    const int lane_row = threadIdx.x % 32 / Shape::kLanesPerRow;
    const int lane_chunk = threadIdx.x % 32 % Shape::kLanesPerRow * 2;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      chunk_[i] = slab + Shape::Offset(lane_row + i / 2 * Shape::kRowStep, lane_chunk + i % 2);
    }
  }

  __device__ __forceinline__ void Run(const DeviceProgram& program) {
    float slot[FXFUSE_MAX_SLOTS][Shape::kTurns][kSize];  // in local memory; rarely used
#pragma unroll 1
    for (int i = 0; i < program.instruction_count; ++i) {
      const fxfuse_instruction& instruction = program.instruction[i];
      const bool chained = instruction.source[0] == FXFUSE_FROM_PREVIOUS;
      if (instruction.arity == 1 && chained) {
        RunUnary(instruction);
      } else {
        RunGeneral(program, instruction, slot);
      }
      if (instruction.save >= 0) {
#pragma unroll 1
        for (int turn = 0; turn < Shape::kTurns; ++turn) {
          Values v;
          Read(turn, v);
#pragma unroll
          for (int j = 0; j < kSize; ++j) slot[instruction.save][turn][j] = v[j];
        }
      }
      if (instruction.store >= 0) {
#pragma unroll 1
        for (int turn = 0; turn < Shape::kTurns; ++turn) {
          Values v;
          Read(turn, v);
          Interpreter<Fragment, Math>::Store(program, program.output[instruction.store], At(turn),
                                             v);
        }
      }
    }
  }

 private:
  using Slots = float[FXFUSE_MAX_SLOTS][Shape::kTurns][kSize];

  __device__ __forceinline__ Fragment At(int turn) const {
    return Fragment(row_ + turn * (Shape::kRowStep * Shape::kGroups), Shape::kRowStep, column_);
  }

  __device__ __forceinline__ float4* Chunk(int turn, int i) const {
    return reinterpret_cast<float4*>(chunk_[i] +
                                     turn * (Shape::kRowStep * Shape::kGroups * Shape::kColumns));
  }

  __device__ __forceinline__ void Read(int turn, Values& v) const {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const float4 four = *Chunk(turn, i);
      v[4 * i] = four.x, v[4 * i + 1] = four.y, v[4 * i + 2] = four.z, v[4 * i + 3] = four.w;
    }
  }

  __device__ __forceinline__ void Write(int turn, const Values& v) const {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      *Chunk(turn, i) = make_float4(v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]);
    }
  }

  // An op of one argument, the value before: the switch is outside, the loop inside.
  __device__ __forceinline__ void RunUnary(const fxfuse_instruction& instruction) const {
    const float p0 = instruction.immediate[0];
    const float p1 = instruction.immediate[1];
    switch (static_cast<Opcode>(instruction.opcode)) {
#define FXFUSE_OP(name, arity, params)                             \
  case Opcode::name:                                               \
    if constexpr ((arity) == 1) ApplyToSlab<Opcode::name>(p0, p1); \
    break;
#include "opcodes.def"
#undef FXFUSE_OP
    }
  }

  template <Opcode op>
  __device__ __forceinline__ void ApplyToSlab(float p0, float p1) const {
    constexpr int kTurns = op == Opcode::copy || op == Opcode::cast_f32 ? 0 : Shape::kTurns;
#pragma unroll 1
    for (int turn = 0; turn < kTurns; ++turn) {
      if constexpr (!IsCompact(op)) {
        Values v;
        Read(turn, v);
#pragma unroll
        for (int j = 0; j < kSize; ++j) v[j] = Apply<Math, op>(v[j], 0.0f, 0.0f, p0, p1);
        Write(turn, v);
      } else {
        // Long in instructions and rare: one chunk at a time, found by selection, as pointers in
        // registers cannot be indexed.
#pragma unroll 1
        for (int i = 0; i < kChunks; ++i) {
          float4* const at = i < 2 ? (i == 0 ? Chunk(turn, 0) : Chunk(turn, 1))
                                   : (i == 2 ? Chunk(turn, 2) : Chunk(turn, 3));
          static_assert(kChunks == 4, "the selection above");
          float4 four = *at;
          four.x = Apply<Math, op>(four.x, 0.0f, 0.0f, p0, p1);
          four.y = Apply<Math, op>(four.y, 0.0f, 0.0f, p0, p1);
          four.z = Apply<Math, op>(four.z, 0.0f, 0.0f, p0, p1);
          four.w = Apply<Math, op>(four.w, 0.0f, 0.0f, p0, p1);
          *at = four;
        }
      }
    }
  }

  // Any op with any arguments: the loop is outside, so that the code that fetches arguments exists
  // once. What is the same in every row is fetched in the first turn alone.
  __device__ __forceinline__ void RunGeneral(const DeviceProgram& program,
                                             const fxfuse_instruction& instruction,
                                             const Slots& slot) const {
    Values b = {}, c = {};
#pragma unroll 1
    for (int turn = 0; turn < Shape::kTurns; ++turn) {
      Values v;
      Read(turn, v);
#pragma unroll 1
      for (int argument = instruction.arity - 1; argument >= 0; --argument) {
        const int source = instruction.source[argument];
        const int index = instruction.index[argument];
        if (argument == 0 && source == FXFUSE_FROM_PREVIOUS) break;
        const bool alike =
            source == FXFUSE_FROM_IMMEDIATE ||
            (source == FXFUSE_FROM_OPERAND && program.operand[index].row_stride == 0);
        if (turn > 0 && alike && argument > 0) continue;
        Values t;
        Fetch(program, instruction, slot, turn, source, index, v, t);
#pragma unroll
        for (int j = 0; j < kSize; ++j) {
          v[j] = argument == 0 ? t[j] : v[j];
          b[j] = argument == 1 ? t[j] : b[j];
          c[j] = argument == 2 ? t[j] : c[j];
        }
      }
      Interpreter<Fragment, Math>::Dispatch(instruction, v, b, c);
      Write(turn, v);
    }
  }

  __device__ __forceinline__ void Fetch(const DeviceProgram& program,
                                        const fxfuse_instruction& instruction, const Slots& slot,
                                        int turn, int source, int index, const Values& previous,
                                        Values& t) const {
    if (source == FXFUSE_FROM_OPERAND) {
      Interpreter<Fragment, Math>::Load(program, program.operand[index], At(turn), t);
    } else if (source == FXFUSE_FROM_IMMEDIATE) {
#pragma unroll
      for (int j = 0; j < kSize; ++j) t[j] = instruction.immediate[index];
    } else if (source == FXFUSE_FROM_SLOT) {
#pragma unroll
      for (int j = 0; j < kSize; ++j) t[j] = slot[index][turn][j];
    } else {
#pragma unroll
      for (int j = 0; j < kSize; ++j) t[j] = previous[j];
    }
  }

  float* chunk_[kChunks];
  uint32_t row_;
  uint32_t column_;
};

}  // namespace fxfuse

#endif  // FXFUSE_CUDA_SLAB_INTERPRETER_CUH_
