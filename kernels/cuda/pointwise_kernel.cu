// output = program(acc), acc [M, N] in memory, in place where output and acc are one matrix.
//
// At best every byte is read and written once, and each SM always has reads under way: with 24
// warps of 512 to 2048 bytes it has what its share of an H200's memory needs (about 11 bytes a
// cycle over some 800 cycles of latency). Where a fragment's words leave room for the next one's,
// those are fetched before the present one is computed.

#include "fragment.cuh"
#include "interpreter.cuh"
#include "kernel_list.h"
#include "math_device.cuh"
#include "memory.cuh"
#include "pointwise_kernel.h"

namespace fxfuse {
namespace {

template <class Math_, int kWidth, int kGroups, bool kPrefetch_>
struct PointwiseConfig {
  using Math = Math_;
  using Fragment = RowFragment<kWidth, kGroups>;
  static constexpr bool kPrefetch = kPrefetch_;
  // 80 registers a thread: 16 fragment values twice over (value and argument), as many words of
  // the next fragment, and addresses.
  static constexpr int kBlocksPerSm = 3;
};

// A fragment of the accumulator as it lies in memory: 16-bit elements fill half of the words.
template <class Fragment>
class RawFragment {
 public:
  __device__ __forceinline__ void Load(const PointwiseArguments& from, const Fragment& at) {
    int64_t offset[Fragment::kGroups];
#pragma unroll
    for (int g = 0; g < Fragment::kGroups; ++g) {
      // Rows and columns past the end are read as the last ones and never stored.
      offset[g] = min(at.Row(g), from.program.rows - 1) * from.row_stride;
    }
    const bool whole = from.vector && at.Column(0) + Fragment::kWidth <= from.program.columns;
    if (from.dtype == FXFUSE_F32) {
      LoadAs<uint32_t>(from, at, offset, whole);
    } else {
      LoadAs<uint16_t>(from, at, offset, whole);
    }
  }

  __device__ __forceinline__ void Unpack(int dtype, float (&values)[Fragment::kSize]) const {
#pragma unroll
    for (int g = 0; g < Fragment::kGroups; ++g) {
      float* to = values + g * Fragment::kWidth;
      if (dtype == FXFUSE_F32) {
#pragma unroll
        for (int j = 0; j < Fragment::kWidth; ++j) to[j] = __uint_as_float(word_[g][j]);
      } else {
        uint32_t half[Fragment::kWidth / 2];
#pragma unroll
        for (int j = 0; j < Fragment::kWidth / 2; ++j) half[j] = word_[g][j];
        UnpackHalves<Fragment::kWidth>(dtype, half, to);
      }
    }
  }

 private:
  template <class Element>
  __device__ __forceinline__ void LoadAs(const PointwiseArguments& from, const Fragment& at,
                                         const int64_t (&offset)[Fragment::kGroups], bool whole) {
    constexpr int kPerWord = 4 / sizeof(Element);
    constexpr int kWords = Fragment::kWidth / kPerWord;
    const Element* data = static_cast<const Element*>(from.accumulator);
#pragma unroll
    for (int g = 0; g < Fragment::kGroups; ++g) {
      uint32_t word[kWords] = {};
      if (whole) {
        LoadWords(data + offset[g] + at.Column(0), word);
      } else {
#pragma unroll
        for (int j = 0; j < Fragment::kWidth; ++j) {
          const uint32_t column = min(at.Column(0) + j, from.program.columns - 1);
          word[j / kPerWord] |= static_cast<uint32_t>(data[offset[g] + column])
                                << (j % kPerWord * 16);
        }
      }
#pragma unroll
      for (int j = 0; j < kWords; ++j) word_[g][j] = word[j];
    }
  }

  uint32_t word_[Fragment::kGroups][Fragment::kWidth];
};

template <class Config>
__global__ void __launch_bounds__(kPointwiseThreads, Config::kBlocksPerSm)
    PointwiseProgram(const __grid_constant__ PointwiseArguments arguments) {
  using Fragment = typename Config::Fragment;

  // Setup. Blocks are numbered along the rows; each takes every gridDim.x-th, and its position
  // moves by a fixed step of rows and columns, so that nothing is divided in the loop.
  const uint32_t lanes = 1u << arguments.log2_lanes;
  const uint32_t lane = threadIdx.x & (lanes - 1);
  const uint32_t line = threadIdx.x >> arguments.log2_lanes;
  const uint32_t lines = kPointwiseThreads >> arguments.log2_lanes;
  uint32_t row_block = blockIdx.x / arguments.column_blocks;
  uint32_t column_block = blockIdx.x % arguments.column_blocks;
  const uint32_t row_step = gridDim.x / arguments.column_blocks;
  const uint32_t column_step = gridDim.x % arguments.column_blocks;
  const auto position = [&] {
    return Fragment(row_block * lines * Fragment::kGroups + line, lines,
                    (column_block * lanes + lane) * Fragment::kWidth);
  };

  // Loads of one fragment (or the next), program and store.
  Fragment at = position();
  RawFragment<Fragment> raw;
  if constexpr (Config::kPrefetch) raw.Load(arguments, at);
#pragma unroll 1
  while (row_block < arguments.row_blocks) {
    float values[Fragment::kSize];
    if constexpr (!Config::kPrefetch) raw.Load(arguments, at);
    raw.Unpack(arguments.dtype, values);
    const Fragment here = at;
    row_block += row_step;
    column_block += column_step;
    if (column_block >= arguments.column_blocks) {
      column_block -= arguments.column_blocks;
      ++row_block;
    }
    at = position();
    if (Config::kPrefetch && row_block < arguments.row_blocks) raw.Load(arguments, at);
    if (here.Column(0) < arguments.program.columns) {
      Interpreter<Fragment, typename Config::Math>::Run(arguments.program, here, values);
    }
  }
}

template <class Config>
PointwiseKernel Describe(const char* name, MathLevel math) {
  using Fragment = typename Config::Fragment;
  return {name, reinterpret_cast<const void*>(&PointwiseProgram<Config>), math, Fragment::kWidth,
          Fragment::kGroups};
}

}  // namespace

const PointwiseKernel& PointwiseKernelFor(MathLevel math) {
  static const PointwiseKernel kernels[kPointwiseKernels] = {
      Describe<PointwiseConfig<DeviceFastMath, 8, 2, true>>("pointwise_fast", MathLevel::kFast),
      Describe<PointwiseConfig<DeviceHalfMath, 8, 2, true>>("pointwise_half", MathLevel::kHalf),
      Describe<PointwiseConfig<DeviceMath, 4, 4, false>>("pointwise_exact", MathLevel::kExact),
  };
  return kernels[static_cast<int>(math)];
}

PointwiseGrid DividePointwise(const PointwiseKernel& kernel, int64_t m, int64_t n) {
  const int64_t vectors = CeilDivide(n, kernel.width);
  // As many threads side by side as waste at most an eighth of them at the end of the row, but a
  // warp's worth where the row has it: short segments would not fill memory transactions.
  int log2_lanes = 8;
  static_assert(kPointwiseThreads == 1 << 8, "all of a block's threads in one row");
  while (log2_lanes > 0) {
    const int64_t lanes = int64_t{1} << log2_lanes;
    const int64_t padded = CeilDivide(vectors, lanes) * lanes;
    if (log2_lanes <= 5 && vectors >= lanes) break;
    if (vectors >= lanes && (padded - vectors) * 8 <= padded) break;
    --log2_lanes;
  }
  const int64_t lines = (kPointwiseThreads >> log2_lanes) * int64_t{kernel.groups};
  return {log2_lanes, static_cast<uint32_t>(CeilDivide(vectors, int64_t{1} << log2_lanes)),
          static_cast<uint32_t>(CeilDivide(m, lines))};
}

}  // namespace fxfuse
