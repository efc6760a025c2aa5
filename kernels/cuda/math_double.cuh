// The math policy of pointwise.h for problems in double precision.
//
// Made of the C library's functions, which CUDA has for the device and any host has, too, so that
// the emulation tests this very code. Results are within a few units in the last place, tails and
// neighbourhoods of zeros included, where a formula of torch's cancels.

#ifndef FXFUSE_CUDA_MATH_DOUBLE_CUH_
#define FXFUSE_CUDA_MATH_DOUBLE_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math.h>

#include "../pointwise.h"
#include "device_program.h"

namespace fxfuse {

struct DeviceDoubleMath {
  using Value = double;
  static constexpr MathLevel kLevel = MathLevel::kDouble;
  static FXFUSE_HD double abs(double x) { return ::fabs(x); }
  // NaN passes from either side.
  static FXFUSE_HD double min(double a, double b) {
    return a != a ? a : (b != b ? b : ::fmin(a, b));
  }
  static FXFUSE_HD double max(double a, double b) {
    return a != a ? a : (b != b ? b : ::fmax(a, b));
  }
  static FXFUSE_HD double div(double a, double b) { return a / b; }
  static FXFUSE_HD double rcp(double x) { return 1.0 / x; }
  static FXFUSE_HD double sixth(double x) { return x / 6.0; }
  static FXFUSE_HD double sqrt(double x) { return ::sqrt(x); }
  static FXFUSE_HD double rsqrt(double x) { return 1.0 / ::sqrt(x); }
  static FXFUSE_HD double floor(double x) { return ::floor(x); }
  static FXFUSE_HD double ceil(double x) { return ::ceil(x); }
  static FXFUSE_HD double round(double x) { return ::rint(x); }
  static FXFUSE_HD double trunc(double x) { return ::trunc(x); }
  // Rounded once: by way of fp32, a 16-bit number could be rounded twice.
  static FXFUSE_HD double round_f32(double x) { return static_cast<float>(x); }
  static FXFUSE_HD double round_f16(double x) { return __half2float(__double2half(x)); }
  static FXFUSE_HD double round_bf16(double x) { return __bfloat162float(__double2bfloat16(x)); }

  static FXFUSE_HD double exp(double x) { return ::exp(x); }
  static FXFUSE_HD double exp2(double x) { return ::exp2(x); }
  static FXFUSE_HD double expm1(double x) { return ::expm1(x); }
  static FXFUSE_HD double log(double x) { return ::log(x); }
  static FXFUSE_HD double log2(double x) { return ::log2(x); }
  static FXFUSE_HD double log10(double x) { return ::log10(x); }
  static FXFUSE_HD double log1p(double x) { return ::log1p(x); }
  static FXFUSE_HD double sin(double x) { return ::sin(x); }
  static FXFUSE_HD double cos(double x) { return ::cos(x); }
  static FXFUSE_HD double pow(double a, double b) { return ::pow(a, b); }
  static FXFUSE_HD double tanh(double x) { return ::tanh(x); }
  static FXFUSE_HD double erf(double x) { return ::erf(x); }

  // x - tanh(x). Lambert's continued fraction is tanh(x) = x / (1 + q), q = u / (3 + u / (5 + ...))
  // with u = x^2, so the difference is x q / (1 + q): sums of positive terms. Cut off after 21 it
  // is off by 2^-60 at 1, from where on the difference loses two bits at most.
  static FXFUSE_HD double tanhshrink(double x) {
    if (!(::fabs(x) < 1.0)) return x - ::tanh(x);
    double q = 0.0;
#pragma unroll 1
    for (int i = 21; i > 1; i -= 2) q = x * x / (i + q);
    // The difference of two zeros is a zero without a minus sign.
    return x * q / (1.0 + q) + 0.0;
  }
  static FXFUSE_HD double sigmoid(double x) {
    const double e = ::exp(-::fabs(x));
    return (x < 0.0 ? e : 1.0) / (1.0 + e);
  }
  // x * sigmoid(y)
  static FXFUSE_HD double times_sigmoid(double x, double y) { return x * sigmoid(y); }
  static FXFUSE_HD SigmoidPairOf<double> sigmoid_pair(double x) {
    const double e = ::exp(-::fabs(x));
    const double large = 1.0 / (1.0 + e), small = e * large;
    return {x < 0.0 ? small : large, x < 0.0 ? large : small};
  }
  // x Phi(x)
  static FXFUSE_HD double gelu(double x) { return x * Phi(x); }
  // Phi(x) + x phi(x), the normal distribution function and its density
  static FXFUSE_HD double gelu_slope(double x) {
    constexpr double kDensityAtZero = 0.39894228040143267794;
    return Phi(x) + x * (kDensityAtZero * Bell(x));
  }
  // log(1 + exp(x))
  static FXFUSE_HD double softplus(double x) {
    return (x > 0.0 ? x : 0.0) + ::log1p(::exp(-::fabs(x)));
  }
  // x tanh(log(1 + e)) = x (e^2 + 2e) / (e^2 + 2e + 2), e = exp(x); the quotient is 1 from 40 on.
  static FXFUSE_HD double mish(double x) {
    const double e = ::exp(min(x, 40.0));
    const double n = e * (e + 2.0);
    return x * (n / (n + 2.0));
  }

  // The normal distribution function, erfc(-x / sqrt 2) / 2. A tail is as sensitive to its argument
  // as the argument is large, so what rounding took from that is given back by erfc's slope, which
  // is about -2 z erfc(z).
  static FXFUSE_HD double Phi(double x) {
    constexpr double kRootHalf = 0.70710678118654757274;
    constexpr double kRootHalfRest = -4.8336466567264565e-17;
    const double bounded = x < -40.0 ? -40.0 : x;  // erfc is zero from -38.6 on
    const double z = bounded * -kRootHalf;
    const double lost = ::fma(bounded, -kRootHalf, -z) - bounded * kRootHalfRest;
    const double tail = ::erfc(z);
    return 0.5 * (z > 1.0 ? ::fma(-2.0 * z * lost, tail, tail) : tail);
  }
  // exp(-x^2 / 2), with what rounding took from the square.
  static FXFUSE_HD double Bell(double x) {
    const double a = min(::fabs(x), 40.0);
    const double square = a * a;
    const double lost = ::fma(a, a, -square);
    const double bell = ::exp(-0.5 * square);
    return ::fma(bell, -0.5 * lost, bell);
  }
};

}  // namespace fxfuse

#endif  // FXFUSE_CUDA_MATH_DOUBLE_CUH_
