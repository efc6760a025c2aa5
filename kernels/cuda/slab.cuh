// A slab: 16 rows by some columns of accumulators that one warp passes through shared memory, from
// the layout of the tensor cores to rows of adjacent columns.

#ifndef FXFUSE_CUDA_SLAB_CUH_
#define FXFUSE_CUDA_SLAB_CUH_

#include <stdint.h>

#include "fragment.cuh"

namespace fxfuse {

// Rows are divided into chunks of four floats. Chunk c of row r lies at c ^ 2 (r % 4) ^ (c / 8 %
// 2): the first term keeps apart the four rows whose accumulators a half-warp writes at a time, the
// second the even chunks that eight lanes read at a time.
template <int kColumns_, int kGroups_>
struct SlabShape {
  static constexpr int kRows = 16;
  static constexpr int kColumns = kColumns_;
  static constexpr int kFloats = kRows * kColumns;

  // A lane takes eight adjacent columns of every kRowStep-th row, kGroups rows in a turn.
  static constexpr int kWidth = 8;
  static constexpr int kLanesPerRow = kColumns / kWidth;
  static constexpr int kRowStep = 32 / kLanesPerRow;
  static constexpr int kGroups = kGroups_;
  static constexpr int kTurns = kRows / (kRowStep * kGroups);
  using Fragment = RowFragment<kWidth, kGroups>;

  static_assert(kColumns % 64 == 0, "whole swizzle periods");

  static __device__ __forceinline__ int Offset(int row, int chunk) {
    return row * kColumns + (chunk ^ (row % 4 * 2) ^ (chunk / 8 % 2)) * 4;
  }

  // This lane's fragment, in turn `turn`, of the slab whose first element is (row, column) of the
  // matrix.
  static __device__ __forceinline__ Fragment Read(const float* slab, int turn, int row, int column,
                                                  float (&values)[Fragment::kSize]) {
    const int lane = threadIdx.x % 32;
    const int lane_row = lane / kLanesPerRow + turn * (kRowStep * kGroups);
    const int lane_column = lane % kLanesPerRow * kWidth;
#pragma unroll
    for (int g = 0; g < Fragment::kGroups; ++g) {
#pragma unroll
      for (int j = 0; j < kWidth; j += 4) {
        const float4 four = *reinterpret_cast<const float4*>(
            slab + Offset(lane_row + g * kRowStep, (lane_column + j) / 4));
        float* to = values + g * kWidth + j;
        to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
      }
    }
    return Fragment(row + lane_row, kRowStep, column + lane_column);
  }
};

}  // namespace fxfuse

#endif  // FXFUSE_CUDA_SLAB_CUH_
