// The device math policies of pointwise.h.
//
//   DeviceMath      for fp32 outputs: the accuracy of CUDA's own single-precision functions.
//   DeviceHalfMath  for fp16 outputs: errors near 2^-20, below fp16's rounding of 2^-12.
//   DeviceFastMath  for bf16 outputs: tanh.approx and kin. Its documented bound is 2^-11 of a
//                   result, where bf16 rounds at 2^-9; in norm an H200 is within 5e-6.
//
// Special functions are the budget of an epilogue (16 per cycle and SM): a sigmoid or a gelu is two
// of them (ex2, rcp), a tanh two in the first two policies and one in the last.

#ifndef FXFUSE_CUDA_MATH_DEVICE_CUH_
#define FXFUSE_CUDA_MATH_DEVICE_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../pointwise.h"
#include "device_program.h"

namespace fxfuse {
namespace device_math {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kSqrtHalf = 0.70710678118654752f;
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

// x / (1 + e) for e >= 0, with a quotient at zero where e is above 2^126: then x = -inf gives NaN
// and a finite x gives zero, as x / (1 + inf) would.
static __device__ __forceinline__ float OverOnePlus(float x, float e) {
  const float d = 1.0f + Min(e, 1.7e38f);
  const float r = Rcp(d);
  return x * fmaf(fmaf(-d, r, 1.0f), r, r);
}

// sigmoid(x) and 1 - sigmoid(x), given the smaller and the larger of them.
static __device__ __forceinline__ SigmoidPair InOrder(float x, float small, float large) {
  return x < 0.0f ? SigmoidPair{small, large} : SigmoidPair{large, small};
}

}  // namespace device_math

struct DeviceMath {
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
  static FXFUSE_HD float gelu(float x) {
    return 0.5f * x * (1.0f + erff(x * device_math::kSqrtHalf));
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
  static FXFUSE_HD float tanh(float x) {
    const float u = x * x;
    float p = fmaf(u, -0.053968253968253968f, 0.13333333333333333f);
    p = fmaf(u, p, -0.33333333333333333f);
    const float e = device_math::Ex2(2.0f * device_math::kLog2E * x);
    const float far = fmaf(-2.0f, device_math::Rcp(1.0f + e), 1.0f);
    return fabsf(x) < 0.25f ? fmaf(x * u, p, x) : far;
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
  static FXFUSE_HD float sigmoid(float x) {
    return device_math::Rcp(1.0f + device_math::Ex2(-device_math::kLog2E * x));
  }
  static FXFUSE_HD float times_sigmoid(float x, float y) { return x * sigmoid(y); }
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
  // x Phi(x)
  static FXFUSE_HD float gelu(float x) {
    const float tail = NormalTail(x, Bell(x));
    return x > 0.0f ? x - fminf(x, 100.0f) * tail : x * tail;
  }
  // Phi(x) + x phi(x)
  static FXFUSE_HD float gelu_slope(float x) {
    const float bell = Bell(x);
    const float tail = NormalTail(x, bell);
    return fmaf(x, device_math::kDensityAtZero * bell, x > 0.0f ? 1.0f - tail : tail);
  }

  static FXFUSE_HD float Bell(float x) {  // exp(-x^2 / 2)
    return device_math::Ex2(x * x * (-0.5f * device_math::kLog2E));
  }
  // Phi(-|x|) = t poly(t) exp(-x^2 / 2) / 2 with t = 1 / (1 + 0.3275911 |x| / sqrt 2) (Abramowitz
  // and Stegun, 7.1.26: error of the product below 1.5e-7 exp(-x^2 / 2) or so).
  static FXFUSE_HD float NormalTail(float x, float bell) {
    const float t = device_math::Rcp(fmaf(fabsf(x), 0.23164189f, 1.0f));
    float p = fmaf(t, 0.530702715f, -0.726576013f);
    p = fmaf(t, p, 0.710706871f);
    p = fmaf(t, p, -0.142248368f);
    p = fmaf(t, p, 0.127414796f);
    return p * t * bell;
  }
};

// Relative errors matter, not only absolute ones: where all inputs lie in the negative tail, the
// tail is the result. So a sigmoid stays an exponential and a reciprocal, and gelu is built on the
// complement of erf.
struct DeviceFastMath : DeviceHalfMath {
  static constexpr MathLevel kLevel = MathLevel::kFast;
  static FXFUSE_HD float tanh(float x) { return device_math::Tanh(x); }
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
