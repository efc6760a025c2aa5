// HostMath: the math policy of pointwise.h for CPUs.
//
// Every function is straight-line code over elements, so that a loop around it becomes SIMD code
// at whatever width the translation unit is compiled for; there are no calls and no tables. Most
// are float polynomials after range reduction. log, pow, sin and the like, which are rarer, run
// in double and come out correctly rounded but for a few in a thousand. The polynomials are
// weighted minimax fits, one ulp of a float being 2^-24 to 2^-23; the error of the fit itself
// stands beside each.
//
// Define FXFUSE_ISA before including: each instruction set gets a namespace of its own, so that
// the linker never merges code of one with code of another.

#ifndef FXFUSE_MATH_HOST_H_
#define FXFUSE_MATH_HOST_H_

#include <stdint.h>
#include <string.h>

#include "pointwise.h"

namespace fxfuse {
namespace FXFUSE_ISA {

template <class To, class From>
FXFUSE_HD To BitCast(From from) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

constexpr float kInf = __builtin_inff();
constexpr float kNan = __builtin_nanf("");

// Horner's rule, coefficients from the constant up.
template <class T, int n>
FXFUSE_HD T Polynomial(T x, const T (&c)[n]) {
  T y = c[n - 1];
#pragma GCC unroll 16
  for (int i = n - 2; i >= 0; --i) y = y * x + c[i];
  return y;
}

// Clamps that let NaN through.
FXFUSE_HD float AtMost(float x, float high) { return x > high ? high : x; }
FXFUSE_HD float AtLeast(float x, float low) { return x < low ? low : x; }

// 2^n for n in [-127, 128]; the ends come out as zero and infinity.
FXFUSE_HD float PowerOfTwo(int32_t n) { return BitCast<float>((n + 127) << 23); }

// Adding it rounds a small float to an integer, which is then in the low bits.
constexpr float kRound = 12582912.0f;              // 1.5 * 2^23
constexpr double kRoundDouble = 6755399441055744;  // 1.5 * 2^52

// exp(r) - 1 - r for |r| <= ln(2) / 2, fit error 2^-28.
FXFUSE_HD float ExpTail(float r) {
  constexpr float kTail[] = {0.5f, 0.166665152f, 0.0416661985f, 0.00836923998f, 0.00139510958f};
  return (r * r) * Polynomial(r, kTail);
}

// exp(x) = (1 + r + tail) * 2^exponent with |r| <= 0.35 and `tail` small beside 1, carrying what
// rounding took from r. |x| below 2^20, or NaN, which ends up in `r`.
struct ExpParts {
  float r, tail;
  int32_t exponent;
  FXFUSE_HD float fraction() const { return r + tail; }
};
FXFUSE_HD ExpParts SplitExp(float x) {
  constexpr float kLog2E = 1.44269502f;
  constexpr float kLn2High = 0.693359375f;  // few bits: its product with the exponent is exact
  constexpr float kLn2Low = -2.12194440e-4f;
  const float shifted = x * kLog2E + kRound;
  const float n = shifted - kRound;
  const float high = x - n * kLn2High;
  const float r = high - n * kLn2Low;
  const float lost = (high - r) - n * kLn2Low;
  return {r, ExpTail(r) + lost, BitCast<int32_t>(shifted) - BitCast<int32_t>(kRound)};
}

// 1 + exp(y) for y in [-87, 88], or NaN; rounded once where exp(y) is neither huge nor tiny.
FXFUSE_HD float OnePlusExpBounded(float y) {
  const ExpParts e = SplitExp(y);
  const float power = PowerOfTwo(e.exponent);
  return (1.0f + power) + power * e.fraction();
}

// 1 + exp(y), infinite from 88.37 on.
FXFUSE_HD float OnePlusExp(float y) {
  const float sum = OnePlusExpBounded(AtLeast(y, -87.0f));
  return y > 88.37f ? kInf : sum;
}

// log(1 + x) for finite x > -1.
FXFUSE_HD float Log1pFinite(float x) {
  constexpr float kTail[] = {0.333333313f, -0.250008315f, 0.200012758f, -0.166230381f,
                             0.142003044f, -0.131619766f, 0.127734482f, -0.0764494538f};
  constexpr float kLn2High = 0.693359375f;
  constexpr float kLn2Low = -2.12194440e-4f;
  constexpr int32_t kSqrtHalf = 0x3f3504f3;
  // 1 + x = 2^n (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)); only n is taken from the rounded sum.
  const int32_t n = (BitCast<int32_t>(1.0f + x) - kSqrtHalf) >> 23;
  // 2^(4 - n) is a normal float for every n, where 2^-n is not.
  const float scale = BitCast<float>(0x41800000 - (n << 23));
  const float f = 0.0625f * (x * scale + (scale - 16.0f));
  const float tail = (f * f) * (f * Polynomial(f, kTail) - 0.5f);  // fit error 2^-27
  const float count = static_cast<float>(n);
  return count * kLn2High + (f + (tail + count * kLn2Low));
}

// The upper tail of the normal distribution, 1 - Phi(a), for a >= 1. Relative error 2^-22 near 1,
// growing as the exponent does; zero from 14.5 on.
FXFUSE_HD float NormalTail(float a) {
  // log2(1 - Phi(a)) + a^2 log2(e) / 2, on [1, 10].
  constexpr float kSmooth[] = {-0.999955654f,  -1.15148759f,     0.263288587f,    -0.0542466789f,
                               0.00859618466f, -0.000939307676f, 6.08967675e-05f, -1.71715328e-06f};
  constexpr float kHalfLog2E = 0.721347520f;
  constexpr float kLn2 = 0.693147181f;
  const float b = AtMost(a, 15.0f);
  const float smooth = Polynomial(AtMost(a, 10.0f), kSmooth);
  const float scaled = b * kHalfLog2E;
  const float shifted = (smooth - scaled * b) + kRound;
  const float n = shifted - kRound;
  // The exponent is subtracted from the part it nearly cancels before that part is rounded.
  const float r = ((smooth - n) - scaled * b) * kLn2;
  const int32_t exponent = BitCast<int32_t>(shifted) - BitCast<int32_t>(kRound);
  const float power = BitCast<float>((exponent < -126 ? 0 : exponent + 127) << 23);
  return power + power * (r + ExpTail(r));
}

// log(x) for x > 0 (subnormal or not), as n ln(2) + rest with |rest| <= ln(2) / 2. Error 2^-45.
struct LogParts {
  double rest;
  double exponent;
};
FXFUSE_HD LogParts SplitLog(float x) {
  constexpr double kTail[] = {0.33333333337994109, 0.19999997775174305, 0.14286058742845562,
                              0.11087905954639538, 0.097949802579110734};
  constexpr int32_t kSqrtHalf = 0x3f3504f3;
  const bool subnormal = x < 1.17549435e-38f;
  const int32_t bits = BitCast<int32_t>(subnormal ? x * 33554432.0f : x);
  const int32_t n = (bits - kSqrtHalf) >> 23;
  const double f = static_cast<double>(BitCast<float>(bits - (n << 23))) - 1.0;
  // log(1 + f) = 2 atanh(f / (2 + f))
  const double s = f / (2.0 + f);
  const double u = s * s;
  return {2.0 * s + 2.0 * s * (u * Polynomial(u, kTail)),
          static_cast<double>(n - (subnormal ? 25 : 0))};
}

// What a logarithm gives outside the positive numbers.
FXFUSE_HD float LogSpecial(float x, float regular) {
  const float edge = x == 0.0f ? -kInf : (x < 0.0f ? kNan : x);
  return x > 0.0f && x < kInf ? regular : edge;
}

// 2^y as a double, for |y| < 1000 or NaN. Error 2^-40.
FXFUSE_HD double Exp2Double(double y) {
  constexpr double kTail[] = {0.69314718054589164,    0.24022650695563866,   0.055504109416811026,
                              0.0096181292176961922,  0.0013333449990068015, 0.00015403416435229335,
                              1.5310250966336895e-05, 1.3263329054082751e-06};
  const double shifted = y + kRoundDouble;
  const double r = y - (shifted - kRoundDouble);
  const double mantissa = 1.0 + r * Polynomial(r, kTail);
  return BitCast<double>(BitCast<int64_t>(mantissa) + (BitCast<int64_t>(shifted) << 52));
}

// sin(x + quarter_turns * pi / 2) for |x| <= kSinLimit.
constexpr float kSinLimit = 1e6f;
FXFUSE_HD float SinQuarter(float x, double quarter_turns) {
  constexpr double kSin[] = {-0.16666666666631269, 0.0083333333252122877, -0.00019841263789621382,
                             2.7555350506134463e-06, -2.476111613856157e-08};
  constexpr double kCos[] = {-0.49999999999540534, 0.041666666561242259, -0.0013888881032038799,
                             2.479903091537579e-05, -2.7179353184408943e-07};
  constexpr double kTwoOverPi = 0.63661977236758134;
  constexpr double kHalfPiHigh = 1.5707963267341256;  // 33 bits: exact times 20 bits of n
  constexpr double kHalfPiLow = 6.0771005065061922e-11;
  const double y = x;
  const double n = (y * kTwoOverPi + kRoundDouble) - kRoundDouble;
  const double r = (y - n * kHalfPiHigh) - n * kHalfPiLow;
  const double u = r * r;
  const double sine = r * (1.0 + u * Polynomial(u, kSin));
  const double cosine = 1.0 + u * Polynomial(u, kCos);
  // quadrant / 2 is an integer plus 0 or 1/2; its parity is the sign.
  const double half = (n + quarter_turns) * 0.5;
  const double nearest = (half + kRoundDouble) - kRoundDouble;
  const double whole = nearest > half ? nearest - 1.0 : nearest;
  const double pairs = (whole * 0.5 + kRoundDouble) - kRoundDouble;
  const double value = whole != half ? cosine : sine;
  return static_cast<float>(pairs * 2.0 != whole ? -value : value);
}

struct HostMath {
  using Value = float;
  static FXFUSE_HD float abs(float x) { return __builtin_fabsf(x); }
  static FXFUSE_HD float min(float a, float b) { return a < b || a != a ? a : b; }
  static FXFUSE_HD float max(float a, float b) { return a > b || a != a ? a : b; }
  static FXFUSE_HD float div(float a, float b) { return a / b; }
  static FXFUSE_HD float rcp(float x) { return 1.0f / x; }
  static FXFUSE_HD float sixth(float x) { return x / 6.0f; }
  static FXFUSE_HD float sqrt(float x) { return __builtin_sqrtf(x); }
  static FXFUSE_HD float rsqrt(float x) { return 1.0f / __builtin_sqrtf(x); }

  static FXFUSE_HD float round(float x) {
    // Adding 2^23 leaves no bits for a fraction; what is that large, or NaN, is whole already.
    const float big = __builtin_copysignf(8388608.0f, x);
    const float whole = __builtin_copysignf((x + big) - big, x);
    return abs(x) < 8388608.0f ? whole : x;
  }
  static FXFUSE_HD float floor(float x) {
    const float whole = round(x);
    return whole > x ? whole - 1.0f : whole;
  }
  static FXFUSE_HD float ceil(float x) { return -floor(-x); }
  static FXFUSE_HD float trunc(float x) { return __builtin_copysignf(floor(abs(x)), x); }

  static FXFUSE_HD float round_f32(float x) { return x; }
  static FXFUSE_HD float round_bf16(float x) {
    const uint32_t bits = BitCast<uint32_t>(x);
    const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u;
    return x != x ? x : BitCast<float>(rounded);
  }
  static FXFUSE_HD float round_f16(float x) {
    const uint32_t bits = BitCast<uint32_t>(x);
    const uint32_t rounded = (bits + 0xfffu + (bits >> 13 & 1u)) & 0xffffe000u;
    const float normal = abs(x) < 65520.0f ? BitCast<float>(rounded) : __builtin_copysignf(kInf, x);
    // Below 2^-14 the spacing is 2^-24, which is a float's just above 1/2.
    const float subnormal = __builtin_copysignf((abs(x) + 0.5f) - 0.5f, x);
    const float value = abs(x) < 6.103515625e-05f ? subnormal : normal;
    return x != x ? x : value;
  }

  static FXFUSE_HD float exp(float x) {
    const ExpParts e = SplitExp(AtMost(AtLeast(x, -105.0f), 89.0f));
    // In two steps, since the power of two alone may leave the range that the result is in.
    const int32_t half = e.exponent >> 1;
    const float sum = 1.0f + e.r;
    const float mantissa = sum + ((e.r - (sum - 1.0f)) + e.tail);
    return mantissa * PowerOfTwo(half) * PowerOfTwo(e.exponent - half);
  }
  static FXFUSE_HD float exp2(float x) {
    return static_cast<float>(Exp2Double(AtMost(AtLeast(x, -160.0f), 140.0f)));
  }
  static FXFUSE_HD float expm1(float x) {
    const ExpParts e = SplitExp(AtMost(AtLeast(x, -30.0f), 89.0f));
    const float half = PowerOfTwo(e.exponent - 1);
    // half - 1/2 + half r, and what rounding the two sums lost; half r itself is exact.
    const float rest = half - 0.5f;
    const float sum = half * e.r + rest;
    const float lost = ((rest - sum) + half * e.r) + ((half - rest) - 0.5f);
    const float regular = 2.0f * (sum + (half * e.tail + lost));
    return abs(x) < 1e-8f ? x : regular;
  }
  static FXFUSE_HD float log(float x) {
    const LogParts l = SplitLog(x);
    const double value = l.exponent * 0.69314718055994531 + l.rest;
    return LogSpecial(x, static_cast<float>(value));
  }
  static FXFUSE_HD float log2(float x) {
    const LogParts l = SplitLog(x);
    const double value = l.exponent + l.rest * 1.4426950408889634;
    return LogSpecial(x, static_cast<float>(value));
  }
  static FXFUSE_HD float log10(float x) {
    const LogParts l = SplitLog(x);
    const double value = l.exponent * 0.30102999566398120 + l.rest * 0.43429448190325183;
    return LogSpecial(x, static_cast<float>(value));
  }
  static FXFUSE_HD float log1p(float x) {
    const float edge = x == -1.0f ? -kInf : (x < -1.0f ? kNan : x);
    return x > -1.0f && x < kInf && x != 0.0f ? Log1pFinite(x) : edge;
  }
  // Valid for |x| <= kSinLimit; whoever loops over it mends the rest.
  static FXFUSE_HD float sin(float x) { return SinQuarter(x, 0.0); }
  static FXFUSE_HD float cos(float x) { return SinQuarter(x, 1.0); }

  static FXFUSE_HD float pow(float a, float b) {
    const float magnitude = abs(a);
    const LogParts l = SplitLog(magnitude);
    const float log_edge = magnitude == 0.0f ? -kInf : magnitude;  // 0, infinity, NaN
    const double log2 = magnitude > 0.0f && magnitude < kInf
                            ? l.exponent + l.rest * 1.4426950408889634
                            : static_cast<double>(log_edge);
    const double product = log2 == 0.0 ? 0.0 : b * log2;
    const double low = product < -160.0 ? -160.0 : product;
    const float value = static_cast<float>(Exp2Double(low > 140.0 ? 140.0 : low));
    // A negative base: odd whole exponents keep its sign, fractional ones have no real power.
    const bool whole = round(b) == b;
    const bool odd = whole && round(0.5f * b) != 0.5f * b;
    const float with_sign = odd ? __builtin_copysignf(value, a) : value;
    const float real = a < 0.0f && a > -kInf && !whole ? kNan : with_sign;
    const float or_nan = a != a || b != b ? kNan : real;
    return b == 0.0f || a == 1.0f ? 1.0f : or_nan;
  }

  static FXFUSE_HD float sigmoid(float x) { return 1.0f / OnePlusExp(-x); }
  // x * sigmoid(y)
  static FXFUSE_HD float times_sigmoid(float x, float y) { return x / OnePlusExp(-y); }
  static FXFUSE_HD SigmoidPair sigmoid_pair(float x) {
    const float a = abs(x);
    const ExpParts e = SplitExp(AtLeast(-a, -89.0f));
    // Where the power is subnormal, or below, it is lost beside 1.
    const float power = PowerOfTwo(e.exponent < -127 ? -127 : e.exponent);
    const float whole = 1.0f + power;
    const float rest = power * e.fraction();
    const float sum = whole + rest;
    const float quotient = 1.0f / sum;
    // What rounding took from the sum and, where product and difference share one rounding, from
    // the quotient.
    const float lost = (1.0f - sum * quotient) - ((whole - sum) + rest) * quotient;
    const float large = quotient + quotient * lost;
    // large exp(-a), the power in two steps, since it may be subnormal.
    const int32_t half = e.exponent >> 1;
    const float product = (quotient + quotient * (e.fraction() + lost)) * PowerOfTwo(half) *
                          PowerOfTwo(e.exponent - half);
    const float small = a > 89.0f ? 0.0f : product;
    return {x < 0.0f ? small : large, x < 0.0f ? large : small};
  }

  // tanh(a) - a for 0 <= a < 1, relative fit error 2^-28 of tanh.
  static FXFUSE_HD float TanhTail(float a) {
    constexpr float kTail[] = {-0.333332956f,   0.133323446f,   -0.0538798012f,  0.0214866512f,
                               -0.00794609636f, 0.00230135769f, -0.000358450023f};
    const float u = a * a;
    return a * (u * Polynomial(u, kTail));
  }
  static FXFUSE_HD float tanh(float x) {
    const float a = abs(x);
    const float far = 1.0f - 2.0f / OnePlusExpBounded(AtMost(2.0f * a, 40.0f));
    return __builtin_copysignf(a < 1.0f ? a + TanhTail(a) : far, x);
  }
  static FXFUSE_HD float tanhshrink(float x) {
    const float a = abs(x);
    const float far = a - (1.0f - 2.0f / OnePlusExpBounded(AtMost(2.0f * a, 40.0f)));
    return __builtin_copysignf(a < 1.0f ? -TanhTail(a) : far, x);
  }
  static FXFUSE_HD float erf(float x) {
    // erf(a) / a - 1 in a^2, for a < 1, relative fit error 2^-29.
    constexpr float kTail[] = {0.128379166f,   -0.37612626f,     0.112835854f,   -0.026853811f,
                               0.00518832728f, -0.000801019021f, 7.85385128e-05f};
    constexpr float kSqrt2 = 1.41421354f;
    const float a = abs(x);
    const float near = a + a * Polynomial(a * a, kTail);
    const float far = 1.0f - 2.0f * NormalTail(a * kSqrt2);
    return __builtin_copysignf(a < 1.0f ? near : far, x);
  }
  // (Phi(x) - 1/2) / x for |x| < 1, of u = x^2; Phi the normal distribution function. Fit error
  // 2^-32.
  static FXFUSE_HD float NormalCentre(float u) {
    constexpr float kCentre[] = {0.398942292f,   -0.0664903298f,  0.00997317117f,
                                 -0.0011859847f, 0.000113143644f, -7.53030554e-06f};
    return Polynomial(u, kCentre);
  }
  // x Phi(x)
  static FXFUSE_HD float gelu(float x) {
    const float a = abs(x);
    const float u = x * x;
    const float near = u * NormalCentre(u) + 0.5f * x;
    // x - x (1 - Phi(x)) on the right, where an infinite x must not meet a tail of zero.
    const float tail = NormalTail(a);
    const bool left = x < 0.0f;
    const float far = (left ? x : -AtMost(a, 15.0f)) * tail + (left ? 0.0f : x);
    return __builtin_copysignf(a < 1.0f ? near : far, x);
  }
  // Phi(x) + x phi(x), phi the normal density
  static FXFUSE_HD float gelu_slope(float x) {
    constexpr float kDensityAtZero = 0.398942280f;
    const float a = abs(x);
    const float u = x * x;
    const float tail = NormalTail(a);
    const float near = x * NormalCentre(u) + 0.5f;
    const float far = x < 0.0f ? tail : 1.0f - tail;
    return (a < 1.0f ? near : far) + x * (kDensityAtZero * exp(-0.5f * u));
  }
  // log(1 + exp(x))
  static FXFUSE_HD float softplus(float x) { return AtLeast(x, 0.0f) + Log1pFinite(exp(-abs(x))); }
  // x tanh(log(1 + e)) = x n / (n + 2), n = e^2 + 2e, e = exp(x); on the right the quotient nears
  // 1, and x - x * 2 / (n + 2) rounds less.
  static FXFUSE_HD float mish(float x) {
    const float bounded = AtMost(x, 40.0f);
    const float e = exp(bounded);
    const float n = e * e + 2.0f * e;
    const bool left = x <= 0.0f;
    const float quotient = (left ? n : 2.0f) / (n + 2.0f);
    return (left ? x : -bounded) * quotient + (left ? -0.0f : x);
  }
};

}  // namespace FXFUSE_ISA
}  // namespace fxfuse

#endif  // FXFUSE_MATH_HOST_H_
