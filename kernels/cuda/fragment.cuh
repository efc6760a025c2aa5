// Which elements of the output matrix a thread's registers hold.

#ifndef FXFUSE_CUDA_FRAGMENT_CUH_
#define FXFUSE_CUDA_FRAGMENT_CUH_

#include <stdint.h>

namespace fxfuse {

// `kRows` rows, `row_step` apart, of `kBlocks` blocks of `kWidth` adjacent columns, the blocks
// kBlockStep columns apart: values[g * kWidth + j] is element (Row(g), Column(g) + j), and the
// groups g of a block follow one another. Widths are chosen so that a thread's access to the widest
// output is 16 bytes: 8 columns where all outputs have 16 bits, 4 where one has 32.
template <int kWidth_, int kRows_, int kBlocks_ = 1, int kBlockStep_ = 0>
class RowFragment {
 public:
  static constexpr int kWidth = kWidth_;
  static constexpr int kRows = kRows_;
  static constexpr int kBlocks = kBlocks_;
  static constexpr int kBlockStep = kBlockStep_;
  static constexpr int kGroups = kRows * kBlocks;
  static constexpr int kSize = kWidth * kGroups;
  static_assert(kWidth == 4 || kWidth == 8, "a vector of 16 bytes of the widest output");
  static_assert(kRows >= 1 && kBlocks >= 1, "a fragment has a row");

  __device__ __forceinline__ RowFragment(uint32_t row, uint32_t row_step, uint32_t column)
      : row_(row), row_step_(row_step), column_(column) {}

  __device__ __forceinline__ uint32_t Row(int g) const { return row_ + g % kRows * row_step_; }
  __device__ __forceinline__ uint32_t Column(int g) const {
    return column_ + g / kRows * kBlockStep;
  }

 private:
  uint32_t row_;
  uint32_t row_step_;
  uint32_t column_;
};

// Turns a fragment's values past a window at its front: the first kStep go to the end. Registers
// cannot be indexed, so a loop over parts of a fragment works on its front; after a full turn every
// value is back in its place.
template <int kStep, class Value, int kSize>
__device__ __forceinline__ void Turn(Value (&x)[kSize]) {
  Value head[kStep];
#pragma unroll
  for (int j = 0; j < kStep; ++j) head[j] = x[j];
#pragma unroll
  for (int j = 0; j < kSize - kStep; ++j) x[j] = x[j + kStep];
#pragma unroll
  for (int j = 0; j < kStep; ++j) x[kSize - kStep + j] = head[j];
}

}  // namespace fxfuse

#endif  // FXFUSE_CUDA_FRAGMENT_CUH_
