// The ops over groups of columns, on a fragment, where lanes side by side have adjacent columns.

#ifndef FXFUSE_CUDA_GROUP_OPS_CUH_
#define FXFUSE_CUDA_GROUP_OPS_CUH_

#include "fragment.cuh"
#include "pointwise.h"

namespace fxfuse {

template <class Fragment, class Math>
class GroupOps {
 public:
  static constexpr int kSize = Fragment::kSize;
  using Value = typename Math::Value;
  using Values = Value[kSize];

  // Leaves the result in `v`, the first argument. second(from, to) fetches values of the second,
  // where there is one. To be called by whole warps.
  template <class Second>
  static __device__ __forceinline__ void Run(Opcode op, Values& v, const Second& second,
                                             Value width, Value eps) {
    const int lanes = static_cast<int>(width) / kWidth;
    const Value each = Math::rcp(width);
    // One vector at a time, the one at the fragment's front, or registers would run out.
#pragma unroll 1
    for (int g = 0; g < kGroups; ++g) {
      Value result[kWidth];
      if (op == Opcode::normalize_grad) {
        Value x[kWidth];
        second(g * kWidth, x);
        const Value rstd = Normalize(lanes, each, eps, x);
        const Value mean = each * Sum(lanes, [&](int j) { return v[j]; });
        const Value slope = each * Sum(lanes, [&](int j) { return v[j] * x[j]; });
#pragma unroll
        for (int j = 0; j < kWidth; ++j) result[j] = rstd * (v[j] - mean - x[j] * slope);
      } else {
        if (op == Opcode::normalize) Normalize(lanes, each, eps, v);
        const Value mean = each * Sum(lanes, [&](int j) { return v[j]; });
#pragma unroll
        for (int j = 0; j < kWidth; ++j) result[j] = op == Opcode::normalize ? v[j] : mean;
      }
      Turn<kWidth>(v);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) v[kSize - kWidth + j] = result[j];
    }
  }

  // v = normalize(v) and s = rstd, of all vectors at once.
  static __device__ __forceinline__ void Normalize(Values& v, Values& s, Value width, Value eps) {
    const int lanes = static_cast<int>(width) / kWidth;
    const Value each = Math::rcp(width);
#pragma unroll 1
    for (int pass = 0; pass < 2; ++pass) {
      Value mean[kGroups];
      SumAll(lanes, [&](int i) { return v[i]; }, mean);
#pragma unroll
      for (int i = 0; i < kSize; ++i) v[i] -= each * mean[i / kWidth];
    }
    Value square[kGroups];
    SumAll(lanes, [&](int i) { return v[i] * v[i]; }, square);
#pragma unroll
    for (int g = 0; g < kGroups; ++g) square[g] = Math::rsqrt(each * square[g] + eps);
#pragma unroll
    for (int i = 0; i < kSize; ++i) s[i] = square[i / kWidth], v[i] *= s[i];
  }

  // The gradient `s` of what was normalized to `x`, brought back; rstd: of each vector.
  static __device__ __forceinline__ void NormalizeBack(Values& s, const Values& x,
                                                       const Value (&rstd)[Fragment::kGroups],
                                                       Value width) {
    const int lanes = static_cast<int>(width) / kWidth;
    const Value each = Math::rcp(width);
    Value mean[kGroups], slope[kGroups];
    SumAll(lanes, [&](int i) { return s[i]; }, mean);
    SumAll(lanes, [&](int i) { return s[i] * x[i]; }, slope);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const int g = i / kWidth;
      s[i] = rstd[g] * (s[i] - each * mean[g] - x[i] * (each * slope[g]));
    }
  }

 private:
  static constexpr int kWidth = Fragment::kWidth;
  static constexpr int kGroups = Fragment::kGroups;  // vectors, each of a row of its own
  static_assert(Fragment::kBlocks == 1, "the lanes of a group have all of its columns");

  // The sum of term(j) over the first vectors of `lanes` lanes.
  template <class Term>
  static __device__ __forceinline__ Value Sum(int lanes, const Term& term) {
    Value sum = 0.0f;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) sum += term(j);
#pragma unroll 1
    for (int other = lanes / 2; other > 0; other /= 2) sum += __shfl_xor_sync(~0u, sum, other);
    return sum;
  }

  // For each vector, the sum of term(i) over the same vectors of `lanes` lanes.
  template <class Term>
  static __device__ __forceinline__ void SumAll(int lanes, const Term& term,
                                                Value (&sum)[kGroups]) {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      sum[g] = term(g * kWidth);
#pragma unroll
      for (int j = 1; j < kWidth; ++j) sum[g] += term(g * kWidth + j);
    }
#pragma unroll 1
    for (int other = lanes / 2; other > 0; other /= 2) {
#pragma unroll
      for (int g = 0; g < kGroups; ++g) sum[g] += __shfl_xor_sync(~0u, sum[g], other);
    }
  }

  // Normalizes the first vector and returns 1 / sqrt(variance + eps). The mean is taken twice: of
  // what the first leaves, the second takes what rounding took, or a constant row would not be
  // zero.
  static __device__ __forceinline__ Value Normalize(int lanes, Value each, Value eps, Value* x) {
#pragma unroll 1
    for (int pass = 0; pass < 2; ++pass) {
      const Value mean = each * Sum(lanes, [&](int j) { return x[j]; });
#pragma unroll
      for (int j = 0; j < kWidth; ++j) x[j] -= mean;
    }
    const Value rstd = Math::rsqrt(each * Sum(lanes, [&](int j) { return x[j] * x[j]; }) + eps);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) x[j] *= rstd;
    return rstd;
  }
};

}  // namespace fxfuse

#endif  // FXFUSE_CUDA_GROUP_OPS_CUH_
