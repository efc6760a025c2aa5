// Runs an epilogue program that is a plain chain (see ChainStep) over the accumulators of a warp
// where they are: what Interpreter does for any program, at a fraction of the instructions. A step
// is one branch to code that is unrolled over all accumulators, and operands stay packed until they
// are used.

#ifndef FXFUSE_CUDA_CHAIN_CUH_
#define FXFUSE_CUDA_CHAIN_CUH_

#include "device_program.h"
#include "memory.cuh"
#include "pointwise.h"
#include "ptx.cuh"

namespace fxfuse {

// The accumulator of column `w` of a lane's eight in a block of 32 columns, in row half `h`: two
// columns of one row, two of the other, and on to the next pair.
__host__ __device__ constexpr int AccumulatorIndex(int block, int h, int w) {
  return 4 * (4 * block + w / 2) + 2 * h + w % 2;
}

// A lane's accumulators of kParts times 16 rows, 64 apart, and kBlocks times 32 columns, from
// `column` on. The lane has the rows `row` and `row + 8` of the first part, and so on, and of each
// block eight columns: adjacent ones if `adjacent`, else two of every eight (then nothing is of 32
// bits). Operands and output are all of kDtype. Without kFullOperands every operand is the same for
// all rows.
template <class Math, int kDtype, int kBlocks, bool kFullOperands, int kParts = 1>
class Chain {
 public:
  static constexpr int kSize = 16 * kBlocks * kParts;
  using Values = float[kSize];

  // Fetches what every chain needs, of which chain_count is not 0. To be called well ahead of Run:
  // constant memory that has not been read for a while is slow.
  explicit __device__ __forceinline__ Chain(const DeviceProgram& program)
      : program_(program),
        first_codes_(program.chain_codes[0]),
        more_codes_(program.chain_codes[1]),
        rows_(static_cast<int>(program.rows)),
        columns_(static_cast<int>(program.columns)),
        output_(program.output[program.chain_output[0]].data),
        output_stride_(program.output[program.chain_output[0]].row_stride) {
    // Or the compiler would fetch them again where they are used.
    asm volatile(""
                 : "+r"(first_codes_), "+r"(more_codes_), "+r"(rows_), "+r"(columns_),
                   "+l"(output_), "+l"(output_stride_));
  }

  // Runs the program over accumulators whose first row and column for this lane's warp are `row`
  // and `column`.
  __device__ __forceinline__ void Run(int row, int column, bool adjacent, Values& v) {
    row_ = row + threadIdx.x % 32 / 4;
    column_ = column;
    adjacent_ = adjacent;
    uint32_t codes = first_codes_;
    void* output = output_;
    int64_t output_stride = output_stride_;
    int stores = 0;
#pragma unroll 1
    for (int i = 0;; ++i) {
      const ChainCode code = static_cast<ChainCode>(codes & ((1 << kChainCodeBits) - 1));
      codes = i == kChainCodesPerWord - 1 ? more_codes_ : codes >> kChainCodeBits;
      const ChainStep& step = program_.chain[i];
      switch (code) {
#define FXFUSE_CHAIN(name)            \
  case ChainCode::name:               \
    EachApply<Opcode::name>(step, v); \
    continue;
        FXFUSE_CHAIN_OPS(FXFUSE_CHAIN)
#undef FXFUSE_CHAIN
        case ChainCode::gelu_unit:
          Each(v, [](float x) { return Math::gelu_unit(x); });
          continue;
        case ChainCode::tanh_unit:
          Each(v, [](float x) { return Math::tanh_unit(x); });
          continue;
        case ChainCode::normalize:
          Normalize(step, v);
          continue;
        case ChainCode::add_constant:
          EachApply<Opcode::add>(step, v);
          continue;
        case ChainCode::mul_constant:
          EachApply<Opcode::mul>(step, v);
          continue;
        case ChainCode::add_row:
          Combine<Opcode::add, false>(step, v);
          continue;
        case ChainCode::mul_row:
          Combine<Opcode::mul, false>(step, v);
          continue;
        case ChainCode::add_full:
          if constexpr (kFullOperands) Combine<Opcode::add, true>(step, v);
          continue;
        case ChainCode::mul_full:
          if constexpr (kFullOperands) Combine<Opcode::mul, true>(step, v);
          continue;
        case ChainCode::store:
          if constexpr (kDtype == FXFUSE_F32) {
            StoreWide(output, output_stride, v);
          } else if (adjacent_) {
            Store(output, output_stride, v);
          } else {
            StorePairs(output, output_stride, v);
          }
          if (++stores == program_.chain_stores) return;
          output = program_.output[program_.chain_output[stores]].data;
          output_stride = program_.output[program_.chain_output[stores]].row_stride;
          continue;
      }
    }
  }

  // Column `w` of the lane's eight in a block.
  __device__ __forceinline__ int Column(int block, int w) const {
    const int quad = threadIdx.x % 4;
    return column_ + block * kBlockStep +
           (adjacent_ ? 8 * quad + w : 8 * (w / 2) + 2 * quad + w % 2);
  }

  // The accumulator of column `w` of the eight in a block, in row half `h` of a part.
  static __host__ __device__ constexpr int Index(int part, int block, int h, int w) {
    return part * 16 * kBlocks + AccumulatorIndex(block, h, w);
  }
  // The lane's rows, two of each part, of which the first is given.
  static constexpr int kRows = 2 * kParts;
  static __host__ __device__ constexpr int RowAt(int first, int r) {
    return first + r / 2 * 64 + r % 2 * 8;
  }

 private:
  static constexpr int kWidth = 8;
  static constexpr int kBlockStep = 32;
  static constexpr int kBytes = DtypeSize(kDtype);
  static constexpr int kWords = kWidth * kBytes / 4;  // of a vector
  // Blocks whose vectors are fetched at a time, in so many registers.
  static constexpr int kBatchWords = kParts > 1 ? 16 : 32;
  static constexpr int kBatch = kBlocks * kWords > kBatchWords ? kBatchWords / kWords : kBlocks;

  // Element `w` of a packed vector.
  static __device__ __forceinline__ float Unpack(const uint32_t (&word)[kWords], int w) {
    if constexpr (kDtype == FXFUSE_F32) return __uint_as_float(word[w]);
    if constexpr (kDtype == FXFUSE_F16) {
      const float2 pair = UnpackF16(word[w / 2]);
      return w % 2 ? pair.y : pair.x;
    }
    const float2 pair = UnpackBf16(word[w / 2]);
    return w % 2 ? pair.y : pair.x;
  }

  // Eight elements as a packed vector of 16 bits each.
  static __device__ __forceinline__ void Pack(const float (&eight)[kWidth],
                                              uint32_t (&word)[kWords]) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) word[i] = PackHalves(kDtype, eight[2 * i], eight[2 * i + 1]);
  }

  // A number that the compiler is told nothing about, or it would compute all that follows from it
  // ahead of the loop over steps, and spill.
  static __device__ __forceinline__ int Unknown(int number) {
    asm volatile("" : "+r"(number));
    return number;
  }

  // How many columns there are from the lane's first on.
  __device__ __forceinline__ int ColumnsLeft() const { return Unknown(columns_ - Column(0, 0)); }

  __device__ __forceinline__ int Row(int r) const { return Unknown(RowAt(row_, r)); }

  // The lane's columns of `kBatch` blocks from `first` on, of the matrix row that begins at `row`;
  // zeros outside the matrix.
  __device__ __forceinline__ void LoadRow(const void* row, int first,
                                          uint32_t (&word)[kBatch][kWords]) const {
    constexpr int kPairWords = kWords / 4;
    const char* const from = static_cast<const char*>(row) + Column(first, 0) * kBytes;
    const int left = ColumnsLeft() - first * kBlockStep;
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
#pragma unroll
      for (int i = 0; i < kWords; ++i) word[b][i] = 0;
    }
    if (kDtype == FXFUSE_F32 || adjacent_) {
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        if (b * kBlockStep < left) LoadWords(from + b * kBlockStep * kBytes, word[b]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4 * kBatch; ++i) {
        if (i * kWidth >= left) continue;
        uint32_t pair[kPairWords];
        LoadWords(from + i * kWidth * kBytes, pair);
#pragma unroll
        for (int j = 0; j < kPairWords; ++j) word[i / 4][i % 4 * kPairWords + j] = pair[j];
      }
    }
  }

  template <class Function>
  static __device__ __forceinline__ void Each(Values& v, const Function& function) {
#pragma unroll
    for (int j = 0; j < kSize; ++j) v[j] = function(v[j]);
  }

  // One op on every accumulator. Where it takes a second argument that is the constant p0.
  template <Opcode op>
  static __device__ __forceinline__ void EachApply(const ChainStep& step, Values& v) {
    const float p0 = step.p0, p1 = step.p1;
    Each(v, [&](float x) { return Apply<Math, op>(x, p0, 0.0f, p0, p1); });
  }

  // The mean and the sum of squared deviations of two sets of `count` numbers each, together, which
  // both get (Chan, Golub and LeVeque, 1979): nothing cancels.
  static __device__ __forceinline__ void Merge(float count, float other_mean, float other_squares,
                                               float& mean, float& squares) {
    const float apart = other_mean - mean;
    mean = 0.5f * (mean + other_mean);
    squares = fmaf(apart * apart, 0.5f * count, squares + other_squares);
  }

  // (x - mean) / sqrt(variance + eps) over groups of p0 columns, eps being p1. Lanes begin with
  // their own eight columns, and what they have of a constant row is zero.
  static __device__ __forceinline__ void Normalize(const ChainStep& step, Values& v) {
    const int blocks = static_cast<int>(step.p0) / kBlockStep;
    const float each = __frcp_rn(step.p0);  // exact: a power of two
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const int part = row / 2, h = row % 2;
      float own[kBlocks], mean[kBlocks], squares[kBlocks];
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        const auto x = [&](int w) -> float& { return v[Index(part, b, h, w)]; };
        own[b] = ((x(0) + x(1)) + (x(2) + x(3))) + ((x(4) + x(5)) + (x(6) + x(7)));
        mean[b] = own[b] *= 1.0f / kWidth;
        squares[b] = 0.0f;
#pragma unroll
        for (int w = 0; w < kWidth; ++w) {
          x(w) -= own[b];
          squares[b] = fmaf(x(w), x(w), squares[b]);
        }
      }
#pragma unroll
      for (int bit = 1; bit <= 2; bit *= 2) {
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
          Merge(kWidth * bit, __shfl_xor_sync(~0u, mean[b], bit),
                __shfl_xor_sync(~0u, squares[b], bit), mean[b], squares[b]);
        }
      }
#pragma unroll
      for (int apart = 1; apart < kBlocks; apart *= 2) {
        if (apart >= blocks) break;
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
          if (b & apart) continue;
          Merge(kBlockStep * apart, mean[b + apart], squares[b + apart], mean[b], squares[b]);
          mean[b + apart] = mean[b], squares[b + apart] = squares[b];
        }
      }
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        const float rstd = rsqrtf(fmaf(squares[b], each, step.p1));
        const float shift = (own[b] - mean[b]) * rstd;
#pragma unroll
        for (int w = 0; w < kWidth; ++w) {
          float& x = v[Index(part, b, h, w)];
          x = fmaf(x, rstd, shift);
        }
      }
    }
  }

  // Combines with an operand, which has rows of its own if kFull, else the same for all rows.
  template <Opcode op, bool kFull>
  __device__ __forceinline__ void Combine(const ChainStep& step, Values& v) const {
    constexpr int kMeets = kFull ? 1 : kRows;  // of the lane's, that a row of the operand meets
#pragma unroll
    for (int first_row = 0; first_row < kRows; first_row += kMeets) {
      const char* from = static_cast<const char*>(step.data);
      if constexpr (kFull) {
        const int64_t row = min(Row(first_row), rows_ - 1);
        from += row * step.row_stride * kBytes;
      }
#pragma unroll
      for (int first = 0; first < kBlocks; first += kBatch) {
        uint32_t word[kBatch][kWords];
        LoadRow(from, first, word);
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
#pragma unroll
          for (int w = 0; w < kWidth; ++w) {
            const float other = Unpack(word[b], w);
#pragma unroll
            for (int r = first_row; r < first_row + kMeets; ++r) {
              float& value = v[Index(r / 2, first + b, r % 2, w)];
              value = Apply<Math, op>(value, other, 0.0f, 0.0f, 0.0f);
            }
          }
        }
      }
    }
  }

  // Calls store(r, to, left) for the lane's rows: where `column` of the `r`-th is in the output,
  // and `columns_left`, or 0 below the matrix.
  template <class Function>
  __device__ __forceinline__ void EachRow(void* output, int64_t output_stride, int column,
                                          int columns_left, const Function& store) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = Row(r);
      store(r, static_cast<char*>(output) + (row * output_stride + column) * kBytes,
            row < rows_ ? columns_left : 0);
    }
  }

  // Stores adjacent columns of 16 bits.
  __device__ __forceinline__ void Store(void* output, int64_t output_stride,
                                        const Values& v) const {
    constexpr int kAtOnce = kBlocks < 4 ? kBlocks : 4;
    constexpr int kStep = kBlockStep * kBytes;
    EachRow(output, output_stride, Column(0, 0), ColumnsLeft(), [&](int r, char* to, int left) {
#pragma unroll
      for (int first = 0; first < kBlocks; first += kAtOnce) {
        uint32_t word[kAtOnce][kWords];
#pragma unroll
        for (int b = 0; b < kAtOnce; ++b) {
          float eight[kWidth];
#pragma unroll
          for (int w = 0; w < kWidth; ++w) eight[w] = v[Index(r / 2, first + b, r % 2, w)];
          Pack(eight, word[b]);
        }
        store_vectors<kStep, 2 * kStep, 3 * kStep>(to + first * kStep,
                                                   left * kBytes - first * kStep, word);
      }
    });
  }

  // Stores two columns of every eight, of 16 bits.
  __device__ __forceinline__ void StorePairs(void* output, int64_t output_stride,
                                             const Values& v) const {
    EachRow(output, output_stride, Column(0, 0), ColumnsLeft(), [&](int r, char* to, int left) {
#pragma unroll
      for (int i = 0; i < 4 * kBlocks; ++i) {
        const int w = i % 4 * 2;
        const float pair[] = {v[Index(r / 2, i / 4, r % 2, w)],
                              v[Index(r / 2, i / 4, r % 2, w + 1)]};
        if (i * kWidth >= left) continue;
        StoreVector<2>(to + i * kWidth * kBytes, kDtype, 0, pair);
      }
    });
  }

  // Of 32 bits a lane's eight columns are two stores, each of half a sector of 32 bytes. So lanes
  // side by side exchange halves: together they store all eight columns of one, then of the other.
  __device__ __forceinline__ void StoreWide(void* output, int64_t output_stride,
                                            const Values& v) const {
    constexpr int kAtOnce = 2;
    constexpr int kStep = kBlockStep * kBytes, kSecond = kWidth * kBytes;
    const bool odd = threadIdx.x % 2 != 0;
    const int first_column = Column(0, 0) - (odd ? kWidth : 0);  // of the pair
    const int column = first_column + (odd ? kWidth / 2 : 0);
    const int columns_left = Unknown(columns_ - first_column);
    EachRow(output, output_stride, column, columns_left, [&](int r, char* to, int left) {
#pragma unroll
      for (int first = 0; first < kBlocks; first += kAtOnce) {
        uint32_t word[2 * kAtOnce][kWidth / 2];
#pragma unroll
        for (int b = 0; b < kAtOnce; ++b) {
#pragma unroll
          for (int w = 0; w < kWidth / 2; ++w) {
            const float low = v[Index(r / 2, first + b, r % 2, w)];
            const float high = v[Index(r / 2, first + b, r % 2, w + kWidth / 2)];
            const float received = __shfl_xor_sync(~0u, odd ? low : high, 1);
            word[2 * b][w] = __float_as_uint(odd ? received : low);
            word[2 * b + 1][w] = __float_as_uint(odd ? high : received);
          }
        }
        store_vectors<kSecond, kStep, kStep + kSecond>(to + first * kStep,
                                                       left * kBytes - first * kStep, word);
      }
    });
  }

  const DeviceProgram& program_;
  uint32_t first_codes_, more_codes_;
  int rows_, columns_;
  void* output_;
  int64_t output_stride_;
  int row_ = 0, column_ = 0;
  bool adjacent_ = true;
};

}  // namespace fxfuse

#endif  // FXFUSE_CUDA_CHAIN_CUH_
