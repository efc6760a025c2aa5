// The functors of the epilogue program, one per row of opcodes.def, shared by host and device.
//
// Each is written once, over a math policy `M` that supplies what depends on the machine
// (HostMath in math_host.h; DeviceMath, DeviceHalfMath and DeviceFastMath in
// cuda/math_device.cuh; DeviceDoubleMath in cuda/math_double.cuh): exp, log, tanh, ... and the few
// composites worth a form of their own. Values are of the policy's type `M::Value`, fp32 or fp64;
// semantics are PyTorch's, NaN, infinities and thresholds included.
//
// Ops over groups of columns are no functors.
//
// An interpreter needs no list of its own: with FXFUSE_OP(name, arity, params) defined as
//   case Opcode::name: r = Apply<M, Opcode::name>(a, b, c, p0, p1); break;
// including opcodes.def writes its switch.

#ifndef FXFUSE_POINTWISE_H_
#define FXFUSE_POINTWISE_H_

#include <math.h>
#include <stdint.h>

// A functor is a device function in CUDA sources and a host function in C++ sources: nothing needs
// it to be both in one translation unit, and a device policy has no host half.
#if defined(__CUDACC__)
#define FXFUSE_HD __device__ __forceinline__
#else
#define FXFUSE_HD inline __attribute__((always_inline))
#endif

namespace fxfuse {

enum class Opcode : uint16_t {
#define FXFUSE_OP(name, arity, params) name,
#define FXFUSE_GROUP_OP FXFUSE_OP
#include "opcodes.def"
#undef FXFUSE_GROUP_OP
#undef FXFUSE_OP
};

#define FXFUSE_OP(name, arity, params) +1
constexpr int kPointwiseOpcodeCount = 0
#include "opcodes.def"
    ;
#define FXFUSE_GROUP_OP FXFUSE_OP
constexpr int kOpcodeCount = 0
#include "opcodes.def"
    ;
#undef FXFUSE_GROUP_OP
#undef FXFUSE_OP

static_assert(static_cast<int>(Opcode::normalize) == kPointwiseOpcodeCount, "groups come last");

// Whether an op is over groups of columns. Those have no functor: each interpreter adds up as its
// fragments lie.
FXFUSE_HD constexpr bool IsGroupOp(Opcode op) {
  return static_cast<int>(op) >= kPointwiseOpcodeCount;
}

// A sigmoid s and 1 - s, neither taken from the other: both keep their relative accuracy.
template <class Value>
struct SigmoidPairOf {
  Value s, rest;
};
using SigmoidPair = SigmoidPairOf<float>;

// The normal distribution below x, Phi(x), and exp(-x^2 / 2).
template <class Value>
struct NormalOf {
  Value below, bell;
};
using Normal = NormalOf<float>;

// A function's value and its slope there. `masked`: what comes in is dropped, be it infinite.
template <class Value>
struct ValueAndSlope {
  Value value, slope;
  bool masked = false;
};

// Arguments in the order of opcodes.def: tensors first, then parameters.
template <class M>
struct Pointwise {
  using Value = typename M::Value;
  using Both = ValueAndSlope<Value>;

  // Casts. Each keeps NaN.
  static FXFUSE_HD Value copy(Value x) { return x; }
  static FXFUSE_HD Value cast_f32(Value x) { return M::round_f32(x); }
  static FXFUSE_HD Value cast_f16(Value x) { return M::round_f16(x); }
  static FXFUSE_HD Value cast_bf16(Value x) { return M::round_bf16(x); }

  // Activations. Conditions are phrased so that NaN falls through to `x`.
  static FXFUSE_HD Value relu(Value x) { return M::max(0.0f, x); }
  static FXFUSE_HD Value relu6(Value x) { return clamp(x, 0.0f, 6.0f); }
  static FXFUSE_HD Value leaky_relu(Value x, Value slope) { return x > 0.0f ? x : x * slope; }
  static FXFUSE_HD Value prelu(Value x, Value weight) { return x > 0.0f ? x : x * weight; }
  static FXFUSE_HD Value elu(Value x, Value alpha) { return x > 0.0f ? x : alpha * M::expm1(x); }
  static FXFUSE_HD Value selu(Value x) {
    constexpr Value kScale = static_cast<Value>(1.0507009873554804934);
    constexpr Value kScaleAlpha = static_cast<Value>(1.7580993408473768599);
    return x > 0.0f ? kScale * x : kScaleAlpha * M::expm1(x);
  }
  static FXFUSE_HD Value celu(Value x, Value alpha) {
    return x > 0.0f ? x : alpha * M::expm1(M::div(x, alpha));
  }
  static FXFUSE_HD Value gelu(Value x) { return M::gelu(x); }
  static FXFUSE_HD Value gelu_tanh(Value x) {
    // 0.5 x (1 + tanh(u)) = x sigmoid(2u), which keeps its relative accuracy where tanh(u) is
    // close to -1.
    return M::times_sigmoid(x, x * (kGeluTwoBeta + kGeluCubic * (x * x)));
  }
  static FXFUSE_HD Value silu(Value x) { return M::times_sigmoid(x, x); }
  static FXFUSE_HD Value mish(Value x) { return M::mish(x); }
  static FXFUSE_HD Value softplus(Value x, Value beta, Value threshold) {
    const Value scaled = x * beta;
    return scaled > threshold ? x : M::div(M::softplus(scaled), beta);
  }
  static FXFUSE_HD Value softsign(Value x) { return M::div(x, 1.0f + M::abs(x)); }
  static FXFUSE_HD Value sigmoid(Value x) { return M::sigmoid(x); }
  static FXFUSE_HD Value logsigmoid(Value x) { return 0.0f - M::softplus(-x); }
  static FXFUSE_HD Value hardsigmoid(Value x) { return M::sixth(clamp(x + 3.0f, 0.0f, 6.0f)); }
  static FXFUSE_HD Value hardswish(Value x) {
    // The gate is finished before x comes in: x * 6 would overflow where the result does not.
    return x * hardsigmoid(x);
  }
  static FXFUSE_HD Value clamp(Value x, Value low, Value high) {
    return M::min(high, M::max(low, x));
  }
  static FXFUSE_HD Value hardshrink(Value x, Value lambd) {
    return x >= -lambd && x <= lambd ? 0.0f : x;
  }
  static FXFUSE_HD Value softshrink(Value x, Value lambd) {
    const Value small = x != x ? x : 0.0f;
    return x > lambd ? x - lambd : (x < -lambd ? x + lambd : small);
  }
  static FXFUSE_HD Value tanhshrink(Value x) { return M::tanhshrink(x); }
  static FXFUSE_HD Value threshold(Value x, Value limit, Value value) {
    return x <= limit ? value : x;
  }

  // Elementary functions.
  static FXFUSE_HD Value tanh(Value x) { return M::tanh(x); }
  static FXFUSE_HD Value abs(Value x) { return M::abs(x); }
  static FXFUSE_HD Value neg(Value x) { return -x; }
  static FXFUSE_HD Value sign(Value x) {  // torch.sign(NaN) is 0
    return x > 0.0f ? 1.0f : (x < 0.0f ? -1.0f : 0.0f);
  }
  static FXFUSE_HD Value exp(Value x) { return M::exp(x); }
  static FXFUSE_HD Value exp2(Value x) { return M::exp2(x); }
  static FXFUSE_HD Value expm1(Value x) { return M::expm1(x); }
  static FXFUSE_HD Value log(Value x) { return M::log(x); }
  static FXFUSE_HD Value log2(Value x) { return M::log2(x); }
  static FXFUSE_HD Value log10(Value x) { return M::log10(x); }
  static FXFUSE_HD Value log1p(Value x) { return M::log1p(x); }
  static FXFUSE_HD Value sqrt(Value x) { return M::sqrt(x); }
  static FXFUSE_HD Value rsqrt(Value x) { return M::rsqrt(x); }
  static FXFUSE_HD Value reciprocal(Value x) { return M::rcp(x); }
  static FXFUSE_HD Value square(Value x) { return x * x; }
  static FXFUSE_HD Value sin(Value x) { return M::sin(x); }
  static FXFUSE_HD Value cos(Value x) { return M::cos(x); }
  static FXFUSE_HD Value erf(Value x) { return M::erf(x); }
  static FXFUSE_HD Value floor(Value x) { return M::floor(x); }
  static FXFUSE_HD Value ceil(Value x) { return M::ceil(x); }
  static FXFUSE_HD Value round(Value x) { return M::round(x); }
  static FXFUSE_HD Value trunc(Value x) { return M::trunc(x); }

  // Binary arithmetic.
  static FXFUSE_HD Value add(Value a, Value b) { return a + b; }
  static FXFUSE_HD Value sub(Value a, Value b) { return a - b; }
  static FXFUSE_HD Value mul(Value a, Value b) { return a * b; }
  static FXFUSE_HD Value div(Value a, Value b) { return M::div(a, b); }
  static FXFUSE_HD Value minimum(Value a, Value b) { return M::min(a, b); }
  static FXFUSE_HD Value maximum(Value a, Value b) { return M::max(a, b); }
  static FXFUSE_HD Value pow(Value a, Value b) { return M::pow(a, b); }

  // Comparisons.
  static FXFUSE_HD Value eq(Value a, Value b) { return a == b ? 1.0f : 0.0f; }
  static FXFUSE_HD Value ne(Value a, Value b) { return a != b ? 1.0f : 0.0f; }
  static FXFUSE_HD Value lt(Value a, Value b) { return a < b ? 1.0f : 0.0f; }
  static FXFUSE_HD Value le(Value a, Value b) { return a <= b ? 1.0f : 0.0f; }
  static FXFUSE_HD Value gt(Value a, Value b) { return a > b ? 1.0f : 0.0f; }
  static FXFUSE_HD Value ge(Value a, Value b) { return a >= b ? 1.0f : 0.0f; }

  // Ternary.
  static FXFUSE_HD Value where(Value condition, Value a, Value b) {
    return condition != 0.0f ? a : b;
  }
  static FXFUSE_HD Value lerp(Value start, Value end, Value weight) {
    // Two forms, so that weight 0 gives start and weight 1 gives end exactly.
    const Value difference = end - start;
    return M::abs(weight) < 0.5f ? start + weight * difference : end - difference * (1.0f - weight);
  }

  // Gradients.
  static FXFUSE_HD Value gelu_grad(Value grad, Value x) { return grad * M::gelu_slope(x); }
  static FXFUSE_HD Value gelu_tanh_grad(Value grad, Value x) {
    const Value u = x * x;
    const Value slope = kGeluTwoBeta + 3.0f * kGeluCubic * u;
    return grad * GateSlope(x, x * (kGeluTwoBeta + kGeluCubic * u), slope);
  }
  static FXFUSE_HD Value silu_grad(Value grad, Value x) { return grad * GateSlope(x, x, 1.0f); }
  static FXFUSE_HD Value clamp_grad(Value grad, Value x, Value low, Value high) {
    return x >= low && x <= high ? grad : 0.0f;
  }
  static FXFUSE_HD Value hardtanh_grad(Value grad, Value x, Value low, Value high) {
    return x <= low || x >= high ? 0.0f : grad;
  }
  static FXFUSE_HD Value threshold_grad(Value grad, Value x, Value limit) {
    return x <= limit ? 0.0f : grad;
  }
  static FXFUSE_HD Value tanh_grad(Value grad, Value result) {
    return grad * (1.0f - result * result);
  }
  static FXFUSE_HD Value sigmoid_grad(Value grad, Value result) {
    return grad * (1.0f - result) * result;
  }

  // Activations and their gradients in one. Those of clamp and hardtanh treat bounds and NaN as the
  // ops above do, but where a gradient is masked a NaN does not go on as a value.
  static FXFUSE_HD Both relu_both(Value x, Value limit) {
    return {M::max(0.0f, x), 1.0f, x <= limit};
  }
  static FXFUSE_HD Both clamp_both(Value x, Value low, Value high) {
    return {fminf(fmaxf(x, low), high), 1.0f, !(x >= low && x <= high)};
  }
  static FXFUSE_HD Both hardtanh_both(Value x, Value low, Value high) {
    return {clamp(x, low, high), 1.0f, x <= low || x >= high};
  }
  static FXFUSE_HD Both silu_both(Value x) { return GateBoth(x, x, 1.0f); }
  static FXFUSE_HD Both gelu_tanh_both(Value x) {
    const Value u = x * x;
    const Value slope = kGeluTwoBeta + 3.0f * kGeluCubic * u;
    return GateBoth(x, x * (kGeluTwoBeta + kGeluCubic * u), slope);
  }
  static FXFUSE_HD Both gelu_both(Value x) { return GeluBoth(x, M::normal(x)); }
  static FXFUSE_HD Both gelu_unit_both(Value x) { return GeluBoth(x, M::normal_unit(x)); }
  static FXFUSE_HD Both tanh_both(Value x) {
    const Value result = M::tanh(x);
    return {result, 1.0f - result * result};
  }
  static FXFUSE_HD Both sigmoid_both(Value x) {
    const Value result = M::sigmoid(x);
    return {result, (1.0f - result) * result};
  }

 private:
  // gelu_tanh(x) is x sigmoid(x (kGeluTwoBeta + kGeluCubic x^2)).
  static constexpr Value kGeluTwoBeta =
      static_cast<Value>(1.5957691216057307117);  // 2 sqrt(2 / pi)
  static constexpr Value kGeluCubic = static_cast<Value>(0.044715) * kGeluTwoBeta;

  // The slope of x sigmoid(y), given y': s + s (1 - s) x y'.
  static FXFUSE_HD Value GateSlope(Value x, Value y, Value slope) {
    return GateBoth(x, y, slope).slope;
  }
  // x Phi(x), of slope Phi(x) + x phi(x).
  static FXFUSE_HD Both GeluBoth(Value x, const NormalOf<Value>& at) {
    constexpr Value kDensityAtZero = static_cast<Value>(0.39894228040143267794);
    return {x * at.below, at.below + x * (kDensityAtZero * at.bell)};
  }
  static FXFUSE_HD Both GateBoth(Value x, Value y, Value slope) {
    const SigmoidPairOf<Value> gate = M::sigmoid_pair(y);
    return {x * gate.s, gate.s + gate.s * (gate.rest * x) * slope};
  }
};

// How the functors take what an interpreter has in hand, by arity and parameter count.
#define FXFUSE_ARGUMENTS_1_0 (a)
#define FXFUSE_ARGUMENTS_1_1 (a, p0)
#define FXFUSE_ARGUMENTS_1_2 (a, p0, p1)
#define FXFUSE_ARGUMENTS_2_0 (a, b)
#define FXFUSE_ARGUMENTS_2_1 (a, b, p0)
#define FXFUSE_ARGUMENTS_2_2 (a, b, p0, p1)
#define FXFUSE_ARGUMENTS_3_0 (a, b, c)

template <class M, Opcode op>
struct Functor;
#define FXFUSE_OP(name, arity, params)                                            \
  template <class M>                                                              \
  struct Functor<M, Opcode::name> {                                               \
    using Value = typename M::Value;                                              \
    static FXFUSE_HD Value Apply(Value a, Value b, Value c, Value p0, Value p1) { \
      (void)b, (void)c, (void)p0, (void)p1;                                       \
      return Pointwise<M>::name FXFUSE_ARGUMENTS_##arity##_##params;              \
    }                                                                             \
  };
#include "opcodes.def"
#undef FXFUSE_OP

// One opcode on one element; arguments beyond its arity and parameter count are ignored.
template <class M, Opcode op>
FXFUSE_HD typename M::Value Apply(typename M::Value a, typename M::Value b, typename M::Value c,
                                  typename M::Value p0, typename M::Value p1) {
  return Functor<M, op>::Apply(a, b, c, p0, p1);
}

// Tensor arguments and parameters of each opcode, indexed by opcode (host tables).
constexpr uint8_t kArity[kOpcodeCount] = {
#define FXFUSE_OP(name, arity, params) arity,
#define FXFUSE_GROUP_OP FXFUSE_OP
#include "opcodes.def"
#undef FXFUSE_GROUP_OP
#undef FXFUSE_OP
};
constexpr uint8_t kParameterCount[kOpcodeCount] = {
#define FXFUSE_OP(name, arity, params) params,
#define FXFUSE_GROUP_OP FXFUSE_OP
#include "opcodes.def"
#undef FXFUSE_GROUP_OP
#undef FXFUSE_OP
};

}  // namespace fxfuse

#endif  // FXFUSE_POINTWISE_H_
