// One instruction set's table of inner loops; the build defines FXFUSE_ISA as its name.
//
// No standard header with inline functions may be included here: the linker would be free to keep
// this file's AVX-512 copy of one for everybody.

#include "include/fxfuse.h"
#include "isa.h"
#include "math_host.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

// The loops carry nothing from one element to the next, whichever pointers coincide.
#if defined(__clang__)
#define FXFUSE_SIMD _Pragma("clang loop vectorize(assume_safety)")
#else
#define FXFUSE_SIMD _Pragma("GCC ivdep")
#endif

#define FXFUSE_STRING_OF(x) #x
#define FXFUSE_STRING(x) FXFUSE_STRING_OF(x)

namespace fxfuse {
namespace FXFUSE_ISA {
namespace {

// sin or cos of a fragment some of whose elements are beyond the fast reduction.
template <Opcode op>
__attribute__((noinline)) void LargeAngles(float* out, const float* a, int count) {
  for (int i = 0; i < count; ++i) {
    const double x = a[i];
    out[i] = static_cast<float>(op == Opcode::sin ? __builtin_sin(x) : __builtin_cos(x));
  }
}

template <Opcode op>
void Loop(float* out, const float* a, const float* b, const float* c, float p0, float p1,
          int count) {
  count &= ~(kLane - 1);  // tells the compiler that no remainder is left over
  if constexpr (op == Opcode::sin || op == Opcode::cos) {
    int large = 0;
    for (int i = 0; i < count; ++i) large |= HostMath::abs(a[i]) > kSinLimit;
    if (large != 0) return LargeAngles<op>(out, a, count);
  }
  if constexpr (kArity[static_cast<int>(op)] == 1) {
    FXFUSE_SIMD
    for (int i = 0; i < count; ++i) out[i] = Apply<HostMath, op>(a[i], 0.0f, 0.0f, p0, p1);
  } else if constexpr (kArity[static_cast<int>(op)] == 2) {
    FXFUSE_SIMD
    for (int i = 0; i < count; ++i) out[i] = Apply<HostMath, op>(a[i], b[i], 0.0f, p0, p1);
  } else {
    FXFUSE_SIMD
    for (int i = 0; i < count; ++i) out[i] = Apply<HostMath, op>(a[i], b[i], c[i], p0, p1);
  }
}

// Groups of adjacent columns ----------------------------------------------------------------------

// One group at a time, element by element.
struct ScalarGroups {
  using Value = float;
  static constexpr int kStep = 1;
  static FXFUSE_HD Value Load(const float* from) { return *from; }
  static FXFUSE_HD void Store(float* to, Value x) { *to = x; }
  static FXFUSE_HD Value InverseRoot(Value x) { return 1.0f / __builtin_sqrtf(x); }

  // The sum of term(i) for i < width, in the order of VectorGroups.
  template <class Term>
  static FXFUSE_HD Value Total(int width, const Term& term) {
    float lane[kLane] = {};
    for (int i = 0; i < width; ++i) lane[i % kLane] += term(i);
    for (int half = kLane / 2; half > 0; half /= 2) {
      for (int j = 0; j < half; ++j) lane[j] += lane[j + half];
    }
    return lane[0];
  }
};

// Groups of whole vectors one at a time; of 8, 4, 2 or 1 elements, as many as fill a vector.
struct VectorGroups {
  typedef float Value __attribute__((vector_size(kLane * sizeof(float))));
  static constexpr int kStep = kLane;
  static FXFUSE_HD Value Load(const float* from) {
    Value x;
    memcpy(&x, from, sizeof(x));
    return x;
  }
  static FXFUSE_HD void Store(float* to, Value x) { memcpy(to, &x, sizeof(x)); }
  static FXFUSE_HD Value InverseRoot(Value x) {
    for (int j = 0; j < kLane; ++j) x[j] = 1.0f / __builtin_sqrtf(x[j]);
    return x;
  }

  static bool Serve(int width) {
    return width % kLane == 0 || (width < kLane && (width & (width - 1)) == 0);
  }

  // For every lane the sum over its group of term(i), of all elements from i on.
  template <class Term>
  static FXFUSE_HD Value Total(int width, const Term& term) {
    Value sum = term(0);
    for (int i = kLane; i < width; i += kLane) sum += term(i);
    if (width > 8) sum += Exchanged<8>(sum);
    if (width > 4) sum += Exchanged<4>(sum);
    if (width > 2) sum += Exchanged<2>(sum);
    return width > 1 ? sum + Exchanged<1>(sum) : sum;
  }

 private:
  // Lane j has what lane j ^ kBit had.
  template <int kBit>
  static FXFUSE_HD Value Exchanged(Value x) {
    static_assert(kLane == 16, "the lanes below");
    return __builtin_shufflevector(x, x, 0 ^ kBit, 1 ^ kBit, 2 ^ kBit, 3 ^ kBit, 4 ^ kBit, 5 ^ kBit,
                                   6 ^ kBit, 7 ^ kBit, 8 ^ kBit, 9 ^ kBit, 10 ^ kBit, 11 ^ kBit,
                                   12 ^ kBit, 13 ^ kBit, 14 ^ kBit, 15 ^ kBit);
  }
};

// The moments of a group. The mean is taken twice: of what the first leaves, the second takes what
// rounding took, or a constant row would not be zero.
template <class Groups>
struct Moments {
  using Value = typename Groups::Value;
  Value mean, rest, rstd;

  FXFUSE_HD Moments(const float* x, int width, float eps) {
    const float each = 1.0f / static_cast<float>(width);
    mean = Groups::Total(width, [&](int i) { return Groups::Load(x + i); }) * each;
    rest = Groups::Total(width, [&](int i) { return Groups::Load(x + i) - mean; }) * each;
    const auto square = [&](int i) {
      const Value centered = Groups::Load(x + i) - mean - rest;
      return centered * centered;
    };
    rstd = Groups::InverseRoot(Groups::Total(width, square) * each + eps);
  }
  FXFUSE_HD Value Normalized(const float* x) const {
    return (Groups::Load(x) - mean - rest) * rstd;
  }
};

// Results of the groups that are taken at a time, from arguments `a` and, where there is one, `b`.
template <Opcode op, class Groups>
FXFUSE_HD void RunGroups(float* out, const float* a, const float* b, int width, float eps) {
  using Value = typename Groups::Value;
  const float each = 1.0f / static_cast<float>(width);
  if constexpr (op == Opcode::normalize) {
    const Moments<Groups> x(a, width, eps);
    for (int i = 0; i < width; i += Groups::kStep) Groups::Store(out + i, x.Normalized(a + i));
    return;
  }
  const auto load = [&](int i) { return Groups::Load(a + i); };
  const Value mean = Groups::Total(width, load) * each;
  if constexpr (op == Opcode::normalize_grad) {
    const Moments<Groups> x(b, width, eps);
    const auto weighted = [&](int i) { return load(i) * x.Normalized(b + i); };
    const Value slope = Groups::Total(width, weighted) * each;
    for (int i = 0; i < width; i += Groups::kStep) {
      Groups::Store(out + i, x.rstd * (load(i) - mean - x.Normalized(b + i) * slope));
    }
  } else if constexpr (op == Opcode::group_mean) {
    for (int i = 0; i < width; i += Groups::kStep) Groups::Store(out + i, mean);
  }
}

template <Opcode op>
void GroupLoop(float* out, const float* a, const float* b, const float*, float p0, float p1,
               int count) {
  const int width = static_cast<int>(p0);
  if (VectorGroups::Serve(width)) {
    const int step = width < kLane ? kLane : width;
    for (int i = 0; i + step <= count; i += step) {
      RunGroups<op, VectorGroups>(out + i, a + i, b + i, width, p1);
    }
    return;
  }
  for (int i = 0; i + width <= count; i += width) {
    RunGroups<op, ScalarGroups>(out + i, a + i, b + i, width, p1);
  }
}

// Conversions -------------------------------------------------------------------------------------

float FromHalf(uint16_t half) {
  const uint32_t magnitude = static_cast<uint32_t>(half & 0x7fffu) << 13;
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  // The exponents differ by 112; infinities and NaN sit at the top of both formats.
  const float scaled = BitCast<float>(magnitude) * 5.192296858534828e33f;
  const uint32_t finite = BitCast<uint32_t>(scaled);
  const uint32_t bits = magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : finite;
  return BitCast<float>(bits | sign);
}

uint16_t ToHalf(float x) {
  const uint32_t bits = BitCast<uint32_t>(HostMath::round_f16(x));
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude >> 13) - (112u << 10);
  // A subnormal half counts steps of 2^-24: above 2^23 they are a float's low bits.
  const float steps = BitCast<float>(magnitude < 0x38800000u ? magnitude : 0u) * 16777216.0f;
  const uint32_t subnormal = BitCast<uint32_t>(steps + 8388608.0f) & 0x7ffu;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude == 0x7f800000u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  return static_cast<uint16_t>(half | (bits >> 16 & 0x8000u));
}

uint16_t ToBfloat(float x) {
  const uint32_t bits = BitCast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return static_cast<uint16_t>(x != x ? bits >> 16 | 0x40u : rounded);
}

void LoadF32(float* out, const void* in, int count) {
  memcpy(out, in, sizeof(float) * static_cast<size_t>(count));
}

void LoadF16(float* out, const void* in, int count) {
  const uint16_t* half = static_cast<const uint16_t*>(in);
  int i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= count; i += 16) {
    const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(half + i));
    _mm512_storeu_ps(out + i, _mm512_cvtph_ps(packed));
  }
#elif defined(__F16C__)
  for (; i + 8 <= count; i += 8) {
    const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(half + i));
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(packed));
  }
#endif
  for (; i < count; ++i) out[i] = FromHalf(half[i]);
}

void LoadBf16(float* out, const void* in, int count) {
  const uint16_t* bits = static_cast<const uint16_t*>(in);
  for (int i = 0; i < count; ++i) out[i] = BitCast<float>(static_cast<uint32_t>(bits[i]) << 16);
}

void LoadBool(float* out, const void* in, int count) {
  const uint8_t* flag = static_cast<const uint8_t*>(in);
  for (int i = 0; i < count; ++i) out[i] = flag[i] != 0 ? 1.0f : 0.0f;
}

void StoreF32(void* out, const float* in, int count) {
  memcpy(out, in, sizeof(float) * static_cast<size_t>(count));
}

void StoreF16(void* out, const float* in, int count) {
  uint16_t* half = static_cast<uint16_t*>(out);
  int i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= count; i += 16) {
    const __m256i packed = _mm512_cvtps_ph(_mm512_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(half + i), packed);
  }
#elif defined(__F16C__)
  for (; i + 8 <= count; i += 8) {
    const __m128i packed = _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(half + i), packed);
  }
#endif
  for (; i < count; ++i) half[i] = ToHalf(in[i]);
}

void StoreBf16(void* out, const float* in, int count) {
  uint16_t* bits = static_cast<uint16_t*>(out);
  FXFUSE_SIMD
  for (int i = 0; i < count; ++i) bits[i] = ToBfloat(in[i]);
}

float Sum(const float* in, int count) {
  double lane[kLane] = {};
  int i = 0;
  for (; i + kLane <= count; i += kLane) {
    for (int j = 0; j < kLane; ++j) lane[j] += in[i + j];
  }
  for (int j = 0; i + j < count; ++j) lane[j] += in[i + j];
  for (int half = kLane / 2; half > 0; half /= 2) {
    for (int j = 0; j < half; ++j) lane[j] += lane[j + half];
  }
  return static_cast<float>(lane[0]);
}

void AddTo(double* total, const float* in, int count) {
  FXFUSE_SIMD
  for (int i = 0; i < count; ++i) total[i] += static_cast<double>(in[i]);
}

}  // namespace

extern const IsaKernels kKernels = {FXFUSE_STRING(FXFUSE_ISA),
                                    {
#define FXFUSE_OP(name, arity, params) Loop<Opcode::name>,
#define FXFUSE_GROUP_OP(name, arity, params) GroupLoop<Opcode::name>,
#include "opcodes.def"
#undef FXFUSE_GROUP_OP
#undef FXFUSE_OP
                                    },
                                    {LoadF32, LoadF16, LoadBf16, LoadBool},
                                    {StoreF32, StoreF16, StoreBf16},
                                    Sum,
                                    AddTo};

}  // namespace FXFUSE_ISA
}  // namespace fxfuse
