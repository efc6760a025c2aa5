// What both routes have in common of products of scaled fp16 planes (see fxfuse_cuda_split).

#ifndef FXFUSE_CUDA_PLANES_CUH_
#define FXFUSE_CUDA_PLANES_CUH_

namespace fxfuse {

// The tensor cores truncate what they add up, so every 64 of K or less it is added to sums that are
// kept beside the accumulator (promotion): sum = fmaf(part, kRegain, sum).
//
// What is truncated of the sum of 64 is 2^-23 of it on average where all terms are of one sign, and
// less where they are not; kRegain makes up for that. Measured on an H200 against float64, it
// halves the error of positive matrices and takes a fifth from that of random ones.
constexpr float kRegain = 1.0f + 0x1p-23f;

// What brings accumulators of scaled planes back: (root_a[m] * root_b[n])^2, of which no part
// overflows where the result does not.
__device__ __forceinline__ float Unscaled(float value, float root_a, float root_b) {
  const float factor = root_a * root_b;
  return value * factor * factor;
}

}  // namespace fxfuse

#endif  // FXFUSE_CUDA_PLANES_CUH_
