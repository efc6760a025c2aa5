// The functors of the epilogue program, one per row of opcodes.def, shared by host and device.
//
// Each is written once, over a math policy `M` that supplies what depends on the machine
// (HostMath in math_host.h; DeviceMath, DeviceHalfMath and DeviceFastMath in
// cuda/math_device.cuh): exp, log, tanh, ... and the few composites worth a form of their own.
// Values are fp32; semantics are PyTorch's, NaN, infinities and thresholds included.
//
// Ops over groups of columns are in group_opcodes.def, and are no functors.
//
// An interpreter needs no list of its own: with FXFUSE_OP(name, arity, params) defined as
//   case Opcode::name: r = Apply<M, Opcode::name>(a, b, c, p0, p1); break;
// including opcodes.def writes its switch.

#ifndef FXFUSE_POINTWISE_H_
#define FXFUSE_POINTWISE_H_

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
#include "group_opcodes.def"
#include "opcodes.def"
#undef FXFUSE_GROUP_OP
#undef FXFUSE_OP
};

#define FXFUSE_OP(name, arity, params) +1
#define FXFUSE_GROUP_OP FXFUSE_OP
constexpr int kPointwiseOpcodeCount = 0
#include "opcodes.def"
    ;
constexpr int kOpcodeCount = kPointwiseOpcodeCount
#include "group_opcodes.def"
    ;
#undef FXFUSE_GROUP_OP
#undef FXFUSE_OP

// Whether an op is one of group_opcodes.def. Those have no functor: each interpreter adds up as its
// fragments lie.
FXFUSE_HD constexpr bool IsGroupOp(Opcode op) {
  return static_cast<int>(op) >= kPointwiseOpcodeCount;
}

// A sigmoid s and 1 - s, neither taken from the other: both keep their relative accuracy.
struct SigmoidPair {
  float s, rest;
};

// Arguments in the order of opcodes.def: tensors first, then parameters.
template <class M>
struct Pointwise {
  // Casts. Each keeps NaN.
  static FXFUSE_HD float copy(float x) { return x; }
  static FXFUSE_HD float cast_f32(float x) { return x; }
  static FXFUSE_HD float cast_f16(float x) { return M::round_f16(x); }
  static FXFUSE_HD float cast_bf16(float x) { return M::round_bf16(x); }

  // Activations. Conditions are phrased so that NaN falls through to `x`.
  static FXFUSE_HD float relu(float x) { return M::max(0.0f, x); }
  static FXFUSE_HD float relu6(float x) { return clamp(x, 0.0f, 6.0f); }
  static FXFUSE_HD float leaky_relu(float x, float slope) { return x > 0.0f ? x : x * slope; }
  static FXFUSE_HD float prelu(float x, float weight) { return x > 0.0f ? x : x * weight; }
  static FXFUSE_HD float elu(float x, float alpha) { return x > 0.0f ? x : alpha * M::expm1(x); }
  static FXFUSE_HD float selu(float x) {
    constexpr float kScale = 1.0507009873554805f;
    constexpr float kScaleAlpha = 1.7580993408473766f;
    return x > 0.0f ? kScale * x : kScaleAlpha * M::expm1(x);
  }
  static FXFUSE_HD float celu(float x, float alpha) {
    return x > 0.0f ? x : alpha * M::expm1(M::div(x, alpha));
  }
  static FXFUSE_HD float gelu(float x) { return M::gelu(x); }
  static FXFUSE_HD float gelu_tanh(float x) {
    // 0.5 x (1 + tanh(u)) = x sigmoid(2u), which keeps its relative accuracy where tanh(u) is
    // close to -1.
    return M::times_sigmoid(x, x * (kGeluTwoBeta + kGeluCubic * (x * x)));
  }
  static FXFUSE_HD float silu(float x) { return M::times_sigmoid(x, x); }
  static FXFUSE_HD float mish(float x) { return M::mish(x); }
  static FXFUSE_HD float softplus(float x, float beta, float threshold) {
    const float scaled = x * beta;
    return scaled > threshold ? x : M::div(M::softplus(scaled), beta);
  }
  static FXFUSE_HD float softsign(float x) { return M::div(x, 1.0f + M::abs(x)); }
  static FXFUSE_HD float sigmoid(float x) { return M::sigmoid(x); }
  static FXFUSE_HD float logsigmoid(float x) { return 0.0f - M::softplus(-x); }
  static FXFUSE_HD float hardsigmoid(float x) { return M::sixth(clamp(x + 3.0f, 0.0f, 6.0f)); }
  static FXFUSE_HD float hardswish(float x) {
    // The gate is finished before x comes in: x * 6 would overflow where the result does not.
    return x * hardsigmoid(x);
  }
  static FXFUSE_HD float clamp(float x, float low, float high) {
    return M::min(high, M::max(low, x));
  }
  static FXFUSE_HD float hardshrink(float x, float lambd) {
    return x >= -lambd && x <= lambd ? 0.0f : x;
  }
  static FXFUSE_HD float softshrink(float x, float lambd) {
    const float small = x != x ? x : 0.0f;
    return x > lambd ? x - lambd : (x < -lambd ? x + lambd : small);
  }
  static FXFUSE_HD float tanhshrink(float x) { return M::tanhshrink(x); }
  static FXFUSE_HD float threshold(float x, float limit, float value) {
    return x <= limit ? value : x;
  }

  // Elementary functions.
  static FXFUSE_HD float tanh(float x) { return M::tanh(x); }
  static FXFUSE_HD float abs(float x) { return M::abs(x); }
  static FXFUSE_HD float neg(float x) { return -x; }
  static FXFUSE_HD float sign(float x) {  // torch.sign(NaN) is 0
    return x > 0.0f ? 1.0f : (x < 0.0f ? -1.0f : 0.0f);
  }
  static FXFUSE_HD float exp(float x) { return M::exp(x); }
  static FXFUSE_HD float exp2(float x) { return M::exp2(x); }
  static FXFUSE_HD float expm1(float x) { return M::expm1(x); }
  static FXFUSE_HD float log(float x) { return M::log(x); }
  static FXFUSE_HD float log2(float x) { return M::log2(x); }
  static FXFUSE_HD float log10(float x) { return M::log10(x); }
  static FXFUSE_HD float log1p(float x) { return M::log1p(x); }
  static FXFUSE_HD float sqrt(float x) { return M::sqrt(x); }
  static FXFUSE_HD float rsqrt(float x) { return M::rsqrt(x); }
  static FXFUSE_HD float reciprocal(float x) { return M::rcp(x); }
  static FXFUSE_HD float square(float x) { return x * x; }
  static FXFUSE_HD float sin(float x) { return M::sin(x); }
  static FXFUSE_HD float cos(float x) { return M::cos(x); }
  static FXFUSE_HD float erf(float x) { return M::erf(x); }
  static FXFUSE_HD float floor(float x) { return M::floor(x); }
  static FXFUSE_HD float ceil(float x) { return M::ceil(x); }
  static FXFUSE_HD float round(float x) { return M::round(x); }
  static FXFUSE_HD float trunc(float x) { return M::trunc(x); }

  // Binary arithmetic.
  static FXFUSE_HD float add(float a, float b) { return a + b; }
  static FXFUSE_HD float sub(float a, float b) { return a - b; }
  static FXFUSE_HD float mul(float a, float b) { return a * b; }
  static FXFUSE_HD float div(float a, float b) { return M::div(a, b); }
  static FXFUSE_HD float minimum(float a, float b) { return M::min(a, b); }
  static FXFUSE_HD float maximum(float a, float b) { return M::max(a, b); }
  static FXFUSE_HD float pow(float a, float b) { return M::pow(a, b); }

  // Comparisons.
  static FXFUSE_HD float eq(float a, float b) { return a == b ? 1.0f : 0.0f; }
  static FXFUSE_HD float ne(float a, float b) { return a != b ? 1.0f : 0.0f; }
  static FXFUSE_HD float lt(float a, float b) { return a < b ? 1.0f : 0.0f; }
  static FXFUSE_HD float le(float a, float b) { return a <= b ? 1.0f : 0.0f; }
  static FXFUSE_HD float gt(float a, float b) { return a > b ? 1.0f : 0.0f; }
  static FXFUSE_HD float ge(float a, float b) { return a >= b ? 1.0f : 0.0f; }

  // Ternary.
  static FXFUSE_HD float where(float condition, float a, float b) {
    return condition != 0.0f ? a : b;
  }
  static FXFUSE_HD float lerp(float start, float end, float weight) {
    // Two forms, so that weight 0 gives start and weight 1 gives end exactly.
    const float difference = end - start;
    return M::abs(weight) < 0.5f ? start + weight * difference : end - difference * (1.0f - weight);
  }

  // Gradients.
  static FXFUSE_HD float gelu_grad(float grad, float x) { return grad * M::gelu_slope(x); }
  static FXFUSE_HD float gelu_tanh_grad(float grad, float x) {
    const float u = x * x;
    const float slope = kGeluTwoBeta + 3.0f * kGeluCubic * u;
    return grad * GateSlope(x, x * (kGeluTwoBeta + kGeluCubic * u), slope);
  }
  static FXFUSE_HD float silu_grad(float grad, float x) { return grad * GateSlope(x, x, 1.0f); }
  static FXFUSE_HD float clamp_grad(float grad, float x, float low, float high) {
    return x >= low && x <= high ? grad : 0.0f;
  }
  static FXFUSE_HD float threshold_grad(float grad, float x, float limit) {
    return x <= limit ? 0.0f : grad;
  }

 private:
  // gelu_tanh(x) is x sigmoid(x (kGeluTwoBeta + kGeluCubic x^2)).
  static constexpr float kGeluTwoBeta = 1.5957691216057308f;  // 2 sqrt(2 / pi)
  static constexpr float kGeluCubic = 0.044715f * kGeluTwoBeta;

  // The slope of x sigmoid(y), given y': s + s (1 - s) x y'.
  static FXFUSE_HD float GateSlope(float x, float y, float slope) {
    const SigmoidPair gate = M::sigmoid_pair(y);
    return gate.s + gate.s * (gate.rest * x) * slope;
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
    static FXFUSE_HD float Apply(float a, float b, float c, float p0, float p1) { \
      (void)b, (void)c, (void)p0, (void)p1;                                       \
      return Pointwise<M>::name FXFUSE_ARGUMENTS_##arity##_##params;              \
    }                                                                             \
  };
#include "opcodes.def"
#undef FXFUSE_OP

// One opcode on one element; arguments beyond its arity and parameter count are ignored.
template <class M, Opcode op>
FXFUSE_HD float Apply(float a, float b, float c, float p0, float p1) {
  return Functor<M, op>::Apply(a, b, c, p0, p1);
}

// Tensor arguments and parameters of each opcode, indexed by opcode (host tables).
constexpr uint8_t kArity[kOpcodeCount] = {
#define FXFUSE_OP(name, arity, params) arity,
#define FXFUSE_GROUP_OP FXFUSE_OP
#include "group_opcodes.def"
#include "opcodes.def"
#undef FXFUSE_GROUP_OP
#undef FXFUSE_OP
};
constexpr uint8_t kParameterCount[kOpcodeCount] = {
#define FXFUSE_OP(name, arity, params) params,
#define FXFUSE_GROUP_OP FXFUSE_OP
#include "group_opcodes.def"
#include "opcodes.def"
#undef FXFUSE_GROUP_OP
#undef FXFUSE_OP
};

}  // namespace fxfuse

#endif  // FXFUSE_POINTWISE_H_
