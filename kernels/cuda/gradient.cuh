// Runs the gradient of a chain (see gradient.h) over a fragment of the matrix, as Interpreter runs
// any program.

#ifndef FXFUSE_CUDA_GRADIENT_CUH_
#define FXFUSE_CUDA_GRADIENT_CUH_

#include "fragment.cuh"
#include "gradient.h"
#include "group_ops.cuh"
#include "interpreter.cuh"
#include "pointwise.h"

namespace fxfuse {

// Sums, Slots: as Interpreter's.
template <class Fragment, class Math, class Sums, class Slots>
struct GradientOfChain {
  static constexpr int kSize = Fragment::kSize;
  using Value = typename Math::Value;
  using Values = Value[kSize];
  using Functions = Pointwise<Math>;
  using Groups = GroupOps<Fragment, Math>;
  using Any = Interpreter<Fragment, Math, Sums, true, Slots>;

  // `v` is the accumulator's fragment. To be called by whole warps.
  static __device__ __forceinline__ void Run(const DeviceProgram& program, const Fragment& at,
                                             Values& v, const Sums& sums, Slots slot) {
    Values s;  // which some step begins
    Decoded next(program, 0);
#pragma unroll 1
    for (int i = 0; i < program.step_count; ++i) {
      const Decoded step = next;
      next = Decoded(program, i + 1);
      const Value p0 = step.p0(), p1 = step.p1();
      switch (static_cast<GradientCode>(step.code())) {
        case GradientCode::relu:
          Each(v, s, [&](Value x) { return Functions::relu_both(x, p0); });
          continue;
        case GradientCode::clamp:
          Each(v, s, [&](Value x) { return Functions::clamp_both(x, p0, p1); });
          continue;
        case GradientCode::hardtanh:
          Each(v, s, [&](Value x) { return Functions::hardtanh_both(x, p0, p1); });
          continue;
        case GradientCode::silu:
          Each(v, s, [](Value x) { return Functions::silu_both(x); });
          continue;
        case GradientCode::gelu:
          Each(v, s, [](Value x) { return Functions::gelu_both(x); });
          continue;
        case GradientCode::gelu_unit:
          Each(v, s, [](Value x) { return Functions::gelu_unit_both(x); });
          continue;
        case GradientCode::gelu_tanh:
          Each(v, s, [](Value x) { return Functions::gelu_tanh_both(x); });
          continue;
        case GradientCode::tanh:
          Each(v, s, [](Value x) { return Functions::tanh_both(x); });
          continue;
        case GradientCode::sigmoid:
          Each(v, s, [](Value x) { return Functions::sigmoid_both(x); });
          continue;
        case GradientCode::tanh_result:
#pragma unroll
          for (int j = 0; j < kSize; ++j) s[j] = Functions::tanh_grad(s[j], v[j]);
          continue;
        case GradientCode::sigmoid_result:
#pragma unroll
          for (int j = 0; j < kSize; ++j) s[j] = Functions::sigmoid_grad(s[j], v[j]);
          continue;
        case GradientCode::shift:
#pragma unroll
          for (int j = 0; j < kSize; ++j) v[j] += p0;
          continue;
        case GradientCode::scale:
#pragma unroll
          for (int j = 0; j < kSize; ++j) v[j] *= p0, s[j] *= p1;
          continue;
        case GradientCode::operand:
          UseOperand(program, step, at, v, s);
          continue;
        case GradientCode::normalize:
          Groups::Normalize(v, s, p0, p1);
          continue;
        case GradientCode::normalize_back:
          NormalizeBack(step, s, slot);
          continue;
        case GradientCode::begin:
          Fill(s, 1.0f);
          continue;
        case GradientCode::keep_value:
          slot.Write(step.index(), v);
          continue;
        case GradientCode::keep_product:
          slot.Write(step.index(), s);
          continue;
        case GradientCode::times_slot: {
          Values factor;
          slot.Read(step.index(), 0, factor);
#pragma unroll
          for (int j = 0; j < kSize; ++j) s[j] *= factor[j];
          continue;
        }
        case GradientCode::store:
          Store(program, step.result(), at, s, sums);
          continue;
        case GradientCode::store_times:
          StoreTimes(program, step, at, s, sums, slot);
          continue;
      }
    }
  }

 private:
  static __device__ __forceinline__ void Fill(Values& s, Value value) {
#pragma unroll
    for (int j = 0; j < kSize; ++j) s[j] = value;
  }

  // A step of the chain and of the product: function(x) takes value and slope.
  template <class Function>
  static __device__ __forceinline__ void Each(Values& v, Values& s, const Function& function) {
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      const ValueAndSlope<Value> both = function(v[j]);
      v[j] = both.value;
      s[j] = both.masked ? 0.0f : s[j] * both.slope;
    }
  }

  static __device__ __forceinline__ void UseOperand(const DeviceProgram& program,
                                                    const Decoded& step, const Fragment& at,
                                                    Values& v, Values& s) {
    const DeviceOperand& operand = program.operand[step.index()];
    const OperandUse use = static_cast<OperandUse>(step.result());
    if (use == OperandUse::begin) {
      // What sum() sends back is one number.
      if (operand.access == Access::kBroadcast && operand.row_stride == 0) {
        return Fill(s, LoadElement(operand.data, operand.dtype, 0));
      }
      return Any::Load(program, operand, at, s);
    }
    Values t;
    Any::Load(program, operand, at, t);
    if (use == OperandUse::add_to_value) {
#pragma unroll
      for (int j = 0; j < kSize; ++j) v[j] += t[j];
    } else if (use == OperandUse::times_value) {
#pragma unroll
      for (int j = 0; j < kSize; ++j) v[j] *= t[j];
    } else {
#pragma unroll
      for (int j = 0; j < kSize; ++j) s[j] *= t[j];
    }
  }

  static __device__ __forceinline__ void NormalizeBack(const Decoded& step, Values& s,
                                                       const Slots& slot) {
    Values normalized;
    slot.Read(step.index(), 0, normalized);
    Value rstd[Fragment::kGroups];
#pragma unroll
    for (int g = 0; g < Fragment::kGroups; ++g) {
      Value first[1];
      slot.Read(step.result(), g * Fragment::kWidth, first);
      rstd[g] = first[0];
    }
    Groups::NormalizeBack(s, normalized, rstd, step.p0());
  }

  static __device__ __forceinline__ void StoreTimes(const DeviceProgram& program,
                                                    const Decoded& step, const Fragment& at,
                                                    const Values& s, const Sums& sums,
                                                    const Slots& slot) {
    Values t;
    slot.Read(step.index(), 0, t);
#pragma unroll
    for (int j = 0; j < kSize; ++j) t[j] *= s[j];
    Store(program, step.result(), at, t, sums);
  }

  static __device__ __forceinline__ void Store(const DeviceProgram& program, int index,
                                               const Fragment& at, Values& s, const Sums& sums) {
    asm volatile("" : "+r"(index));  // or every step would compute where an output's sums are
    const DeviceOutput& output = program.output[index];
    if (output.sum != FXFUSE_SUM_NONE) return sums.Add(program, index, at, s);
    Any::Store(program, output, at, s);
  }
};

}  // namespace fxfuse

#endif  // FXFUSE_CUDA_GRADIENT_CUH_
