// The device math policies of pointwise.h.
//
//   DeviceMath      for fp32 outputs: the accuracy of CUDA's own single-precision functions.
//   DeviceHalfMath  for fp16 outputs and products of scaled planes: an activation's error is below
//                   2^-14 of the result, where fp16 rounds at 2^-12. What saturates (a sigmoid, a
//                   tanh, either end of [-1, 1]) is exact there, where products leave no error.
//   DeviceFastMath  for bf16 outputs: tanh.approx and kin. Its documented bound is 2^-11 of a
//                   result, where bf16 rounds at 2^-9; in norm an H200 is within 5e-6.
//
// DeviceDoubleMath is in math_double.cuh.
//
// Special functions are the budget of an epilogue: an SM has 16 a cycle, and 128 multiply-adds, so
// one of them costs what eight other instructions do. The first policy takes two for a gelu, a
// sigmoid or a tanh, the others one: a gelu's tail is 2 to the power of a polynomial, a sigmoid's
// reciprocal is made of multiply-adds. What is known to lie in [-1, 1] (tanh_unit, gelu_unit) takes
// a polynomial and none.
//
// Errors given here are of the formula in fp32, special functions at their documented bounds; those
// of fits were found by a scan in double.

#ifndef FXFUSE_CUDA_MATH_DEVICE_CUH_
#define FXFUSE_CUDA_MATH_DEVICE_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../pointwise.h"
#include "device_program.h"

namespace fxfuse {
namespace device_math {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kDensityAtZero = 0.39894228040143268f;  // of the normal distribution

// One special-function operation each; subnormal results become zero.
static __device__ __forceinline__ float Ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
static __device__ __forceinline__ float Rcp(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
static __device__ __forceinline__ float Tanh(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// NaN passes from either side.
static __device__ __forceinline__ float Min(float a, float b) {
  float y;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}
static __device__ __forceinline__ float Max(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

// |x| < limit ? below : other, both computed: the compiler would branch around one of them.
static __device__ __forceinline__ float SelectBelow(float x, float limit, float below,
                                                    float other) {
  float y;
  asm("{\n"
      ".reg .pred p;\n"
      "setp.lt.f32 p, %1, %2;\n"
      "selp.f32 %0, %3, %4, p;\n"
      "}"
      : "=f"(y)
      : "f"(fabsf(x)), "f"(limit), "f"(below), "f"(other));
  return y;
}

// x / (1 + e) for e >= 0, with a quotient at zero where e is above 2^126: then x = -inf gives NaN
// and a finite x gives zero, as x / (1 + inf) would.
static __device__ __forceinline__ float OverOnePlus(float x, float e) {
  const float d = 1.0f + Min(e, 1.7e38f);
  const float r = Rcp(d);
  return x * fmaf(fmaf(-d, r, 1.0f), r, r);
}

// 1 / d for d >= 1 without a special function, as a product of two: a first guess from the bits of
// d, and a cubic step (s^2 + a s + b) with s = d guess, whose constants were searched for. Error
// below 2^-14.3, and none at 1 and 2. d ends at kGuessLimit, where the guess is zero.
struct Reciprocal {
  float guess, factor;
};
constexpr uint32_t kGuessLimit = 0x7ef36908;  // 2^126.9
static __device__ __forceinline__ Reciprocal GuessRcp(float d) {
  const float guess = __uint_as_float(kGuessLimit - __float_as_uint(d));
  const float s = fmaf(d, guess, -1.50125f);
  return {guess, fmaf(s, s, 0.74875057f)};
}
// The same after a step of Newton's. Error 2^-23, and 1 / d <= 1.
static __device__ __forceinline__ float MultipliedRcp(float d) {
  const Reciprocal rough = GuessRcp(d);
  const float r = rough.guess * rough.factor;
  return fmaf(r, fmaf(-d, r, 1.0f), r);
}
// 1 + e within GuessRcp's limit. There x = -inf gives NaN and a finite x zero, as x / inf would.
static __device__ __forceinline__ float OnePlus(float e) {
  return Min(1.0f + e, __uint_as_float(kGuessLimit));
}

// x Phi(x), given Phi(-|x|): x - x Phi(-x) on the right. Zeros and infinities come out as those of
// 0.5 x (1 + erf(x / sqrt 2)), NaN for -inf; so on the right alone the tail's factor is finite.
static __device__ __forceinline__ float GeluOf(float x, float tail) {
  return fmaf(-fabsf(fminf(x, 100.0f)), tail, Max(x, -0.0f));
}

static __device__ __forceinline__ float Bell(float x) {  // exp(-x^2 / 2)
  return Ex2(x * x * (-0.5f * kLog2E));
}

// sigmoid(x) and 1 - sigmoid(x), given the smaller and the larger of them.
static __device__ __forceinline__ SigmoidPair InOrder(float x, float small, float large) {
  return x < 0.0f ? SigmoidPair{small, large} : SigmoidPair{large, small};
}

}  // namespace device_math

struct DeviceMath {
  using Value = float;
  static constexpr MathLevel kLevel = MathLevel::kExact;
  static FXFUSE_HD float abs(float x) { return fabsf(x); }
  static FXFUSE_HD float min(float a, float b) { return device_math::Min(a, b); }
  static FXFUSE_HD float max(float a, float b) { return device_math::Max(a, b); }
  static FXFUSE_HD float div(float a, float b) { return a / b; }
  static FXFUSE_HD float rcp(float x) { return 1.0f / x; }
  static FXFUSE_HD float sixth(float x) {  // x / 6, correctly rounded but for underflow
    const float q = x * (1.0f / 6.0f);
    return fmaf(fmaf(-6.0f, q, x), 1.0f / 6.0f, q);
  }
  static FXFUSE_HD float sqrt(float x) { return sqrtf(x); }
  static FXFUSE_HD float rsqrt(float x) { return rsqrtf(x); }
  static FXFUSE_HD float floor(float x) { return floorf(x); }
  static FXFUSE_HD float ceil(float x) { return ceilf(x); }
  static FXFUSE_HD float round(float x) { return rintf(x); }
  static FXFUSE_HD float trunc(float x) { return truncf(x); }
  static FXFUSE_HD float round_f32(float x) { return x; }
  static FXFUSE_HD float round_f16(float x) { return __half2float(__float2half_rn(x)); }
  static FXFUSE_HD float round_bf16(float x) { return __bfloat162float(__float2bfloat16_rn(x)); }

  static FXFUSE_HD float exp(float x) { return expf(x); }
  static FXFUSE_HD float exp2(float x) { return exp2f(x); }
  static FXFUSE_HD float expm1(float x) { return expm1f(x); }
  static FXFUSE_HD float log(float x) { return logf(x); }
  static FXFUSE_HD float log2(float x) { return log2f(x); }
  static FXFUSE_HD float log10(float x) { return log10f(x); }
  static FXFUSE_HD float log1p(float x) { return log1pf(x); }
  static FXFUSE_HD float sin(float x) { return sinf(x); }
  static FXFUSE_HD float cos(float x) { return cosf(x); }
  static FXFUSE_HD float pow(float a, float b) { return powf(a, b); }
  static FXFUSE_HD float tanh(float x) { return tanhf(x); }
  static FXFUSE_HD float erf(float x) { return erff(x); }

  // x - tanh(x); the difference cancels near zero, so there the series of its own.
  static FXFUSE_HD float tanhshrink(float x) {
    const float u = x * x;
    float p = fmaf(u, 0.0035921280365724811f, -0.0088632355299021965f);
    p = fmaf(u, p, 0.021869488536155203f);
    p = fmaf(u, p, -0.053968253968253968f);
    p = fmaf(u, p, 0.13333333333333333f);
    p = fmaf(u, p, -0.33333333333333333f);
    // The difference of two zeros is a zero without a minus sign.
    return fabsf(x) < 0.3f ? -x * (u * p) + 0.0f : x - tanhf(x);
  }
  static FXFUSE_HD float sigmoid(float x) { return device_math::OverOnePlus(1.0f, expf(-x)); }
  // x * sigmoid(y)
  static FXFUSE_HD float times_sigmoid(float x, float y) {
    return device_math::OverOnePlus(x, expf(-y));
  }
  static FXFUSE_HD SigmoidPair sigmoid_pair(float x) {
    const float e = expf(-fabsf(x));
    const float large = device_math::OverOnePlus(1.0f, e);
    return device_math::InOrder(x, e * large, large);
  }
  // tanh(x) for x in [-1, 1]: fit error 2^-27, 1 ulp in all.
  static FXFUSE_HD float tanh_unit(float x) {
    const float u = x * x;
    float p = fmaf(u, -0.000358010209f, 0.00229994082f);
    p = fmaf(u, p, -0.00794432176f);
    p = fmaf(u, p, 0.0214855638f);
    p = fmaf(u, p, -0.0538794662f);
    p = fmaf(u, p, 0.133323399f);
    p = fmaf(u, p, -0.333332952f);
    return fmaf(x, fmaf(u, p, 0.0f), x);  // a zero keeps its sign
  }
  // x Phi(x). Beyond 1.5, Phi(-a) = exp(-a^2 / 2) t poly(t), t = 1 / (1 + 0.51 a), a = |x|, fitted
  // with error 2^-24 to 5.5, from where on 1 + erf is zero in fp32, and 2^-15 to 14. On the right
  // all is within 2 ulp; on the left the rounding of x^2 grows, to 2^-19 of the result at -5.
  static FXFUSE_HD float gelu(float x) {
    return device_math::SelectBelow(x, 1.5f, gelu_unit(x),
                                    device_math::GeluOf(x, device_math::Bell(x) * Mills(x)));
  }
  // gelu(x) for x in [-1, 1], and in fact in [-1.5, 1.5]: fit error 2^-27, 2 ulp in all.
  static FXFUSE_HD float gelu_unit(float x) { return x * normal_unit(x).below; }
  // Phi(x), and exp(-x^2 / 2): of any x, and of one in [-1, 1] or, in fact, [-1.5, 1.5].
  static FXFUSE_HD Normal normal(float x) {
    const float bell = device_math::Bell(x);
    const float tail = bell * Mills(x);
    return {device_math::SelectBelow(x, 1.5f, normal_unit(x).below, x > 0.0f ? 1.0f - tail : tail),
            bell};
  }
  static FXFUSE_HD Normal normal_unit(float x) {
    const float u = x * x;
    float p = fmaf(u, 3.87111694e-07f, -8.53494624e-06f);
    p = fmaf(u, p, 0.000113824083f);
    p = fmaf(u, p, -0.00118574f);
    p = fmaf(u, p, 0.00997272252f);
    p = fmaf(u, p, -0.0664901772f);
    p = fmaf(u, p, 0.398942265f);
    return {fmaf(x, p, 0.5f), device_math::Bell(x)};
  }
  // exp(x^2 / 2) Phi(-|x|) = t poly(t), see gelu.
  static FXFUSE_HD float Mills(float x) {
    const float t = device_math::Rcp(fmaf(fabsf(x), 0.51f, 1.0f));
    float p = fmaf(t, 0.129829115f, -0.311979083f);
    p = fmaf(t, p, 0.147984508f);
    p = fmaf(t, p, 0.126497496f);
    p = fmaf(t, p, 0.206393758f);
    p = fmaf(t, p, 0.203313255f);
    return t * p;
  }
  // Phi(x) + x phi(x), the normal distribution function and its density
  static FXFUSE_HD float gelu_slope(float x) {
    return normcdff(x) + x * (device_math::kDensityAtZero * expf(-0.5f * x * x));
  }
  // log(1 + exp(x))
  static FXFUSE_HD float softplus(float x) { return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))); }
  // x tanh(log(1 + e)) = x (e^2 + 2e) / (e^2 + 2e + 2), e = exp(x); the quotient is 1 from 40 on.
  static FXFUSE_HD float mish(float x) {
    const float e = expf(device_math::Min(x, 40.0f));
    const float n = e * (e + 2.0f);
    const float r = device_math::Rcp(n + 2.0f);
    return x * (n * fmaf(fmaf(-(n + 2.0f), r, 1.0f), r, r));
  }
};

// What is left at DeviceMath's form is either cheap already or rare.
struct DeviceHalfMath : DeviceMath {
  static constexpr MathLevel kLevel = MathLevel::kHalf;
  static FXFUSE_HD float sixth(float x) { return x * (1.0f / 6.0f); }
  static FXFUSE_HD float exp(float x) { return __expf(x); }
  static FXFUSE_HD float expm1(float x) {
    float p = fmaf(x, 1.0f / 720.0f, 1.0f / 120.0f);
    p = fmaf(x, p, 1.0f / 24.0f);
    p = fmaf(x, p, 1.0f / 6.0f);
    p = fmaf(x, p, 0.5f);
    return fabsf(x) < 0.25f ? fmaf(x * x, p, x) : __expf(x) - 1.0f;
  }
  static FXFUSE_HD float log(float x) { return __logf(x); }
  static FXFUSE_HD float log2(float x) { return __log2f(x); }
  static FXFUSE_HD float log10(float x) { return __log10f(x); }
  static FXFUSE_HD float log1p(float x) {
    float p = fmaf(x, 0.2f, -0.25f);
    p = fmaf(x, p, 1.0f / 3.0f);
    p = fmaf(x, p, -0.5f);
    return fabsf(x) < 0.0625f ? fmaf(x * x, p, x) : __logf(1.0f + x);
  }
  // (1 - e) / (1 + e) with e = exp(-2 |x|). Error 2^-15.6, at |x| = 2^-7: below, x itself.
  static FXFUSE_HD float tanh(float x) {
    const float e = device_math::Ex2(-2.0f * device_math::kLog2E * fabsf(x));
    const float far = (1.0f - e) * device_math::MultipliedRcp(1.0f + e);
    return device_math::SelectBelow(x, 0.0078125f, x, copysignf(far, x));
  }
  // tanh(x) for x in [-1, 1]. Error 2^-16.9, none at the ends.
  static FXFUSE_HD float tanh_unit(float x) {
    const float u = x * x;
    float p = fmaf(u, 0.00886015594f, -0.0445028916f);
    p = fmaf(u, p, 0.130195692f);
    p = fmaf(u, p, -0.332951128f);
    return x * fmaf(u, p, 0.999992311f);
  }
  static FXFUSE_HD float tanhshrink(float x) {
    const float u = x * x;
    float p = fmaf(u, -0.0088632355299021965f, 0.021869488536155203f);
    p = fmaf(u, p, -0.053968253968253968f);
    p = fmaf(u, p, 0.13333333333333333f);
    p = fmaf(u, p, -0.33333333333333333f);
    const float e = device_math::Ex2(2.0f * device_math::kLog2E * x);
    const float far = x - fmaf(-2.0f, device_math::Rcp(1.0f + e), 1.0f);
    return fabsf(x) < 0.3f ? -x * (u * p) : far;
  }
  static FXFUSE_HD float sigmoid(float x) { return times_sigmoid(1.0f, x); }
  static FXFUSE_HD float times_sigmoid(float x, float y) {
    const float e = device_math::Ex2(-device_math::kLog2E * y);
    return x * device_math::MultipliedRcp(device_math::OnePlus(e));
  }
  static FXFUSE_HD SigmoidPair sigmoid_pair(float x) {
    const float e = device_math::Ex2(-device_math::kLog2E * fabsf(x));
    const float large = device_math::Rcp(1.0f + e);
    return device_math::InOrder(x, e * large, large);
  }
  static FXFUSE_HD float softplus(float x) {
    return fmaxf(x, 0.0f) + log1p(device_math::Ex2(-device_math::kLog2E * fabsf(x)));
  }
  static FXFUSE_HD float mish(float x) {
    const float e = device_math::Ex2(device_math::kLog2E * device_math::Min(x, 40.0f));
    const float n = e * (e + 2.0f);
    return x * (n * device_math::Rcp(n + 2.0f));
  }
  // x Phi(x), with Phi(-|x|) as 2^p(|x|). Error 2^-17 of the result from -6.5 on. Further left,
  // where it is below 2^-31, p falls too fast; there 1 + erf in fp32 has lost all digits, too.
  static FXFUSE_HD float gelu(float x) {
    const float a = fabsf(x);
    float p = fmaf(a, -1.75777745e-06f, 5.99365994e-05f);
    p = fmaf(a, p, -0.000916363089f);
    p = fmaf(a, p, 0.00844738632f);
    p = fmaf(a, p, -0.053824503f);
    p = fmaf(a, p, -0.45861569f);
    p = fmaf(a, p, -1.15118015f);
    p = fmaf(a, p, -1.00000381f);
    return device_math::GeluOf(x, device_math::Ex2(p));
  }
  // gelu(x) for x in [-1, 1]. Error 2^-19, none at the ends.
  static FXFUSE_HD float gelu_unit(float x) { return x * normal_unit(x).below; }
  static FXFUSE_HD Normal normal_unit(float x) {
    const float u = x * x;
    float p = fmaf(u, -0.000940374797f, 0.00977812149f);
    p = fmaf(u, p, -0.0664297938f);
    p = fmaf(u, p, 0.398936778f);
    return {fmaf(x, p, 0.5f), device_math::Bell(x)};
  }
  // Phi(x) + x phi(x). The terms cancel near -0.75, so the tail is a finer one than gelu's.
  static FXFUSE_HD float gelu_slope(float x) {
    const Normal at = normal(x);
    return fmaf(x, device_math::kDensityAtZero * at.bell, at.below);
  }
  // Abramowitz and Stegun, 7.1.26, error of the tail below 1.5e-7 bell or so.
  static FXFUSE_HD Normal normal(float x) {
    const float bell = device_math::Bell(x);
    const float t = device_math::Rcp(fmaf(fabsf(x), 0.23164189f, 1.0f));
    float p = fmaf(t, 0.530702715f, -0.726576013f);
    p = fmaf(t, p, 0.710706871f);
    p = fmaf(t, p, -0.142248368f);
    p = fmaf(t, p, 0.127414796f);
    const float tail = p * t * bell;
    return {x > 0.0f ? 1.0f - tail : tail, bell};
  }
};

// Relative errors matter, not only absolute ones: where all inputs lie in the negative tail, the
// tail is the result. So a sigmoid stays an exponential and a reciprocal, and gelu is built on the
// complement of erf.
struct DeviceFastMath : DeviceHalfMath {
  static constexpr MathLevel kLevel = MathLevel::kFast;
  static FXFUSE_HD float tanh(float x) { return device_math::Tanh(x); }
  // The first guess alone. Error 2^-14.
  static FXFUSE_HD float sigmoid(float x) { return times_sigmoid(1.0f, x); }
  static FXFUSE_HD float times_sigmoid(float x, float y) {
    const float e = device_math::Ex2(-device_math::kLog2E * y);
    const device_math::Reciprocal r = device_math::GuessRcp(device_math::OnePlus(e));
    return x * r.guess * r.factor;
  }
  // 1 - s is as good as it need be: where it cancels, s is exact, or next to it.
  static FXFUSE_HD SigmoidPair sigmoid_pair(float x) {
    const float s = sigmoid(x);
    return {s, 1.0f - s};
  }
  // tanh(x) and gelu(x) for x in [-1, 1]. Errors 2^-13.5 and 2^-14.
  static FXFUSE_HD float tanh_unit(float x) {
    const float u = x * x;
    const float p = fmaf(u, fmaf(u, -0.02661347f, 0.11887723f), -0.330648215f);
    return x * fmaf(u, p, 0.99991832f);
  }
  static FXFUSE_HD float gelu_unit(float x) { return x * normal_unit(x).below; }
  // As in DeviceHalfMath, with error 2^-12 of the result from -5.5 on, where it is 2^-23.
  static FXFUSE_HD float gelu(float x) {
    const float a = fabsf(x);
    float p = fmaf(a, -0.000233251005f, 0.00486976933f);
    p = fmaf(a, p, -0.0445989892f);
    p = fmaf(a, p, -0.469681144f);
    p = fmaf(a, p, -1.14626074f);
    p = fmaf(a, p, -1.00035906f);
    return device_math::GeluOf(x, device_math::Ex2(p));
  }
  static FXFUSE_HD Normal normal_unit(float x) {
    const float u = x * x;
    const float p = fmaf(u, fmaf(u, 0.00801769997f, -0.0654545595f), 0.398790689f);
    return {fmaf(x, p, 0.5f), device_math::Bell(x)};
  }
  // erf(z) = tanh(z q(z^2)): q fitted to atanh(erf(z)) / z on [0, 3] with error below 2^-14 in
  // erf; beyond, the tanh saturates.
  static FXFUSE_HD float erf(float z) {
    const float t = device_math::Max(-5.0f, device_math::Min(z, 5.0f));
    const float u = t * t;
    float q = fmaf(u, -0.00148834288f, 0.103454955f);
    q = fmaf(u, q, 1.12833643f);
    return device_math::Tanh(t * q);
  }
};

}  // namespace fxfuse

#endif  // FXFUSE_CUDA_MATH_DEVICE_CUH_
