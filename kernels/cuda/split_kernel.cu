// fp32 matrices to fp16 planes under an exact power-of-two scale per row; fxfuse.h has the
// contract.
//
// All of it is bound by memory: a row is read once into registers, its largest element settles the
// scale, and the planes are written from the registers. Only rows beyond any block's registers are
// read twice: where rows are adjacent instead of columns, those of more than 4096 columns.

#include "memory.cuh"
#include "ptx.cuh"
#include "split.h"

namespace fxfuse {
namespace {

// Adjacent elements of a row that a thread takes at a time: two 16-byte loads, a 16-byte store.
constexpr int kWidth = 8;
constexpr int kGroups = kSplitElements / kWidth;
// Of an SM; 64 registers each, and 128 KB of loads under way.
constexpr int kResidentThreads = 1024;
constexpr int kMostStripThreads = 1024;

constexpr uint32_t kInfinity = 0x7f800000u;
constexpr uint32_t kSign = 0x80000000u;
constexpr float kSmallestHalf = 0x1p-24f;

// Non-negative floats order as their bits do, and NaN is above infinity.
__device__ __forceinline__ uint32_t Magnitude(float x) { return __float_as_uint(x) & ~kSign; }

__device__ __forceinline__ float PowerOfTwo(int exponent) {
  return __uint_as_float(static_cast<uint32_t>(exponent + 127) << 23);
}

// Half of the even e for which largest * 2^-e lies in [2^13, 2^15); 0 for a row of zeros. So the
// largest element of a row has room to be rounded up, and e / 2 is in [-81, 57]: both 2^(e/2) and
// its inverse are normal numbers even where 2^-e is none.
__device__ __forceinline__ int HalfExponent(uint32_t largest) {
  if (largest == 0) return 0;
  const int biased = static_cast<int>(largest >> 23);
  const int exponent = biased > 0 ? biased - 127 : -118 - __clz(static_cast<int>(largest));
  return (exponent - 13) >> 1;
}

// The largest finite magnitude among `values`, or 0; sets `special` where one is not finite.
template <int kCount>
__device__ __forceinline__ uint32_t LargestFinite(const float (&values)[kCount], bool* special) {
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) largest = max(largest, Magnitude(values[i]));
  if (largest >= kInfinity) {
    *special = true;
    largest = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const uint32_t magnitude = Magnitude(values[i]);
      if (magnitude < kInfinity) largest = max(largest, magnitude);
    }
  }
  return largest;
}

// Two elements in each plane, packed.
struct Pair {
  uint32_t hi;
  uint32_t lo;
};

// Rounds to the high plane. An element that would vanish becomes the smallest number of its sign:
// an infinity in the other factor must stay one, and 0 would make it a NaN. `x` decides, because
// where e > 0 the scaled value itself may have vanished.
__device__ __forceinline__ float KeepNonZero(float scaled, float x) {
  return fabsf(scaled) < kSmallestHalf && x != 0.0f ? copysignf(kSmallestHalf, x) : scaled;
}

// What hi leaves of a scaled element. Of one that was kept from vanishing that is what keeping it
// added, so that the sum of the planes is as near as for any other, and may be 0 after all. An
// infinity or a NaN leaves nothing.
__device__ __forceinline__ float Rest(float scaled, float hi) {
  const float rest = __fsub_rn(scaled, hi);
  return rest == rest ? rest : 0.0f;
}

__device__ __forceinline__ uint32_t Pack(float first, float second) {
  const __half2 pair = __floats2half2_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// `factor` is 2^(-e/2). Multiplying by it twice is exact, except far below what fp16 tells from 0.
__device__ __forceinline__ Pair SplitPair(float first, float second, float factor, bool two) {
  const float a = __fmul_rn(__fmul_rn(first, factor), factor);
  const float b = __fmul_rn(__fmul_rn(second, factor), factor);
  Pair pair;
  pair.hi = Pack(KeepNonZero(a, first), KeepNonZero(b, second));
  pair.lo = 0;
  if (two) {
    const float2 hi = UnpackF16(pair.hi);
    pair.lo = Pack(Rest(a, hi.x), Rest(b, hi.y));
  }
  return pair;
}

__device__ __forceinline__ bool Aligned16(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % 16 == 0;
}

// kCount adjacent elements, of which `valid` exist (it may be negative); the others are 0.
template <int kCount>
__device__ __forceinline__ void LoadSome(const float* from, int valid, float (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = i < valid ? from[i] : 0.0f;
}

template <int kCount>
__device__ __forceinline__ void LoadAll(const float* from, float (&values)[kCount]) {
  uint32_t word[kCount];
  LoadWords(from, word);
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = __uint_as_float(word[i]);
}

// Stores adjacent elements of a row, from `column` on, in each plane.
__device__ __forceinline__ void StoreEight(const SplitMatrix& matrix, int64_t row, int column,
                                           const float (&values)[kWidth], float factor) {
  uint16_t* const hi = matrix.plane + row * matrix.plane_stride + column;
  const bool two = matrix.planes == 2;
  uint32_t high[kWidth / 2], low[kWidth / 2];
#pragma unroll
  for (int i = 0; i < kWidth / 2; ++i) {
    const Pair pair = SplitPair(values[2 * i], values[2 * i + 1], factor, two);
    high[i] = pair.hi, low[i] = pair.lo;
  }
  StoreWords(hi, high);
  if (two) StoreWords(hi + matrix.plane_size, low);
}

// What one thread holds of a row: kGroups times kWidth adjacent columns, `lanes` threads apart.
class RowPiece {
 public:
  // Columns of the row from `first` on; zeros from `valid` on. The 16-byte loads are all issued
  // before anything else is looked at.
  __device__ __forceinline__ void Load(const float* row, int first, int step, int valid) {
    const bool aligned = Aligned16(row);
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const int column = first + g * step;
      if (aligned && column + kWidth <= valid) {
        LoadAll(row + column, values_[g]);
      } else {
        LoadSome(row, 0, values_[g]);
      }
    }
    if (aligned && valid % kWidth == 0) return;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const int column = first + g * step;
      if (!aligned || column + kWidth > valid) LoadSome(row + column, valid - column, values_[g]);
    }
  }

  // Multiplies columns by the squares of the factors there: twice by each, for a square may be no
  // fp32 number. Sets `special` where a factor is negative.
  __device__ __forceinline__ void Scale(const float* factors, int first, int step, int valid,
                                        bool* special) {
    uint32_t signs = 0;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const int column = first + g * step;
      float factor[kWidth];
      if (column + kWidth <= valid) {
        LoadAll(factors + column, factor);
      } else {
        LoadSome(factors + column, valid - column, factor);
      }
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        values_[g][i] = __fmul_rn(__fmul_rn(values_[g][i], factor[i]), factor[i]);
        signs |= __float_as_uint(factor[i]);
      }
    }
    if ((signs & kSign) != 0) *special = true;
  }

  __device__ __forceinline__ uint32_t Largest(bool* special) const {
    uint32_t largest = 0;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) largest = max(largest, LargestFinite(values_[g], special));
    return largest;
  }

  __device__ __forceinline__ void Store(const SplitMatrix& matrix, int64_t row, int first, int step,
                                        float factor) const {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const int column = first + g * step;
      if (column >= matrix.plane_stride) break;
      StoreEight(matrix, row, column, values_[g], factor);
    }
  }

 private:
  float values_[kGroups][kWidth];
};

// The maximum of `largest`, and whether any is `special`, among each `width` neighbouring lanes.
__device__ __forceinline__ void ReduceLanes(int width, uint32_t* largest, uint32_t* special) {
  for (int offset = width / 2; offset > 0; offset /= 2) {
    *largest = max(*largest, __shfl_xor_sync(0xffffffffu, *largest, offset));
    *special |= __shfl_xor_sync(0xffffffffu, *special, offset);
  }
}

// The matrix of this block, and which of that matrix's blocks it is.
__device__ __forceinline__ const SplitMatrix& FindMatrix(const SplitArguments& arguments,
                                                         int* block) {
  const int first_blocks = arguments.matrix[0].blocks;
  const int which = static_cast<int>(blockIdx.x) >= first_blocks;
  *block = static_cast<int>(blockIdx.x) - (which ? first_blocks : 0);
  return arguments.matrix[which];
}

// A row per 2^log2_lanes threads. kWhole: the threads hold all of it; else they read it twice, and
// take no factor.
template <int kThreads, bool kWhole>
__global__ void __launch_bounds__(kThreads, kResidentThreads / kThreads)
    SplitRows(const __grid_constant__ SplitArguments arguments) {
  // Setup.
  int block;
  const SplitMatrix& matrix = FindMatrix(arguments, &block);
  const int lanes = 1 << matrix.log2_lanes;
  const int lane = static_cast<int>(threadIdx.x) & (lanes - 1);
  const int64_t row = static_cast<int64_t>(block) * (kThreads >> matrix.log2_lanes) +
                      (static_cast<int>(threadIdx.x) >> matrix.log2_lanes);
  const bool inside = row < matrix.rows;
  const float* const source = matrix.source + (inside ? row * matrix.stride : 0);
  const int valid = inside ? matrix.k : 0;
  await_turn();
  const int first = lane * kWidth, step = lanes * kWidth, stride = lanes * kSplitElements;

  // Load, and the largest element of the row.
  RowPiece piece;
  bool odd = false;
  uint32_t largest = 0;
  if constexpr (kWhole) {
    piece.Load(source, first, step, valid);
    if (matrix.factor != nullptr) piece.Scale(matrix.factor, first, step, valid, &odd);
    largest = piece.Largest(&odd);
  } else {
    for (int column = first; column < valid; column += stride) {
      piece.Load(source, column, step, valid);
      largest = max(largest, piece.Largest(&odd));
    }
  }
  uint32_t special = odd;
  ReduceLanes(min(lanes, 32), &largest, &special);
  if (lanes > 32) {
    __shared__ uint2 of_warp[kThreads / 32];
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = make_uint2(largest, special);
    __syncthreads();
    const int warps = lanes / 32;
    const uint2 other =
        of_warp[(threadIdx.x >> matrix.log2_lanes) * warps + (threadIdx.x & (warps - 1))];
    largest = other.x, special = other.y;
    ReduceLanes(warps, &largest, &special);
  }

  // Scale and store.
  if (!inside) return;
  const int half = HalfExponent(largest);
  if (lane == 0) {
    matrix.root[row] = copysignf(PowerOfTwo(half), special ? -1.0f : 1.0f);
    if (matrix.special != nullptr) matrix.special[row] = static_cast<int32_t>(special);
  }
  if constexpr (kWhole) {
    piece.Store(matrix, row, first, step, PowerOfTwo(-half));
  } else {
    for (int column = first; column < matrix.plane_stride; column += stride) {
      piece.Load(source, column, step, valid);
      piece.Store(matrix, row, column, step, PowerOfTwo(-half));
    }
  }
}

// Matrices with adjacent rows ---------------------------------------------------------------------

// A strip of 4 * kRowLanes rows in the registers of one block: a thread has four rows of eight
// adjacent columns, and so stores 16 bytes of each row.
template <int kRowLanes>
__global__ void __launch_bounds__(kMostStripThreads, kResidentThreads / kMostStripThreads)
    SplitStrips(const __grid_constant__ SplitArguments arguments) {
  // Setup.
  constexpr int kRows = 4 * kRowLanes;
  __shared__ uint32_t largest[kRows], special[kRows];
  int block;
  const SplitMatrix& matrix = FindMatrix(arguments, &block);
  const int first_row = block * kRows;
  const int own = static_cast<int>(threadIdx.x) % kRowLanes * 4;  // of the strip's rows
  const int column = static_cast<int>(threadIdx.x) / kRowLanes * kWidth;
  const int valid = matrix.rows - first_row - own;
  const float* const source = matrix.source + first_row + own;
  const bool whole = valid >= 4 && Aligned16(source) && matrix.stride % 4 == 0;
  if (threadIdx.x < kRows) largest[threadIdx.x] = special[threadIdx.x] = 0;
  await_turn();

  // Load, and the largest element of each row.
  float values[4][kWidth];
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const bool inside = column + i < matrix.k;
    const float* const from = source + (column + i) * matrix.stride;
    float four[4] = {};
    if (whole) {
      if (inside) LoadAll(from, four);
    } else {
      LoadSome(from, inside ? valid : 0, four);
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) values[r][i] = four[r];
  }
  __syncthreads();
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    bool odd = false;
    uint32_t mine = LargestFinite(values[r], &odd);
    if (odd) special[own + r] = 1;
#pragma unroll
    for (int offset = kRowLanes; offset < 32; offset *= 2) {
      mine = max(mine, __shfl_xor_sync(~0u, mine, offset));
    }
    if (threadIdx.x % 32 < kRowLanes) atomicMax(&largest[own + r], mine);
  }
  __syncthreads();

  // Scale and store.
  if (column >= matrix.plane_stride) return;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    if (r >= valid) return;
    const int64_t row = first_row + own + r;
    const int half = HalfExponent(largest[own + r]);
    if (column == 0) {
      matrix.root[row] = PowerOfTwo(half);
      if (matrix.special != nullptr) matrix.special[row] = static_cast<int32_t>(special[own + r]);
    }
    StoreEight(matrix, row, column, values[r], PowerOfTwo(-half));
  }
}

// Any number of columns, in two steps.
constexpr int kColumnThreads = 256;

// Four rows of one column; those from `valid` on are 0.
__device__ __forceinline__ void LoadRows(const float* from, int valid, float (&values)[4]) {
  if (valid >= 4 && Aligned16(from)) {
    LoadAll(from, values);
  } else {
    LoadSome(from, valid, values);
  }
}

// The largest finite magnitude of each row goes to root[row], with the sign bit set: SplitTiles
// tells by it that root does not hold the root yet. A maximum does not depend on the order, so
// neither do the bits.
constexpr int kMaximaRows = 128;
constexpr int kMaximaColumns = 128;

__global__ void __launch_bounds__(kColumnThreads)
    SplitMaxima(const __grid_constant__ SplitMatrix matrix) {
  constexpr int kWarps = kColumnThreads / 32;
  constexpr int kBatch = 8;  // loads of a thread under way
  __shared__ uint32_t largest[kMaximaRows];
  const int strips = (matrix.rows + kMaximaRows - 1) / kMaximaRows;
  const int first_row = static_cast<int>(blockIdx.x) % strips * kMaximaRows;
  const int first_column = static_cast<int>(blockIdx.x) / strips * kMaximaColumns;
  const int own = static_cast<int>(threadIdx.x) % 32 * 4;
  const int valid = matrix.rows - first_row - own;
  if (threadIdx.x < kMaximaRows) largest[threadIdx.x] = 0;
  await_turn();
  __syncthreads();

  uint32_t mine[4] = {};
  bool special[4] = {};
#pragma unroll 1
  for (int i = 0; i < kMaximaColumns; i += kBatch * kWarps) {
    float values[kBatch][4];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int column = first_column + i + j * kWarps + static_cast<int>(threadIdx.x) / 32;
      LoadRows(matrix.source + column * matrix.stride + first_row + own,
               column < matrix.k ? valid : 0, values[j]);
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const float one[1] = {values[j][r]};
        mine[r] = max(mine[r], LargestFinite(one, &special[r]));
      }
    }
  }
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    atomicMax(&largest[own + r], mine[r]);
    if (special[r] && matrix.special != nullptr) matrix.special[first_row + own + r] = 1;
  }
  __syncthreads();
  if (threadIdx.x < kMaximaRows && first_row + static_cast<int>(threadIdx.x) < matrix.rows) {
    atomicMax(reinterpret_cast<uint32_t*>(matrix.root) + first_row + threadIdx.x,
              largest[threadIdx.x] | kSign);
  }
}

// Tiles of 64 by 64 are read along the rows, turned in shared memory and written along K.
constexpr int kTile = 64;

// Half of the exponent of a row's scale, from what root[row] holds: the maximum SplitMaxima left
// there or, where another block was quicker, the root.
__device__ __forceinline__ int HalfExponentAt(const float* root) {
  const uint32_t bits = *reinterpret_cast<const volatile uint32_t*>(root);
  return (bits & kSign) != 0 ? HalfExponent(bits & ~kSign) : static_cast<int>(bits >> 23) - 127;
}

__global__ void __launch_bounds__(kColumnThreads)
    SplitTiles(const __grid_constant__ SplitMatrix matrix) {
  constexpr int kRowLanes = kTile / 4;  // threads side by side along the rows
  constexpr int kPairs = kTile * kRowLanes / kColumnThreads / 2;  // pairs of columns of a thread
  constexpr int kUnits = kTile / 8;                               // 16-byte units of a tile's row
  // Unit u of row r lies at u ^ (r / 4 % 8): threads that write one column of different rows then
  // meet different banks.
  __shared__ uint4 tile[2][kTile][kUnits];

  // Setup.
  const int tiles = (matrix.rows + kTile - 1) / kTile;
  const int first_row = static_cast<int>(blockIdx.x) % tiles * kTile;
  const int first_column = static_cast<int>(blockIdx.x) / tiles * kTile;
  const int lane = static_cast<int>(threadIdx.x) % kRowLanes;
  const int first_pair = static_cast<int>(threadIdx.x) / kRowLanes;
  const int own = lane * 4;
  const int valid = matrix.rows - first_row - own;
  const bool two = matrix.planes == 2;
  await_turn();

  // Load.
  float values[kPairs][2][4];
#pragma unroll
  for (int p = 0; p < kPairs; ++p) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int column = first_column + 2 * (first_pair + p * (kColumnThreads / kRowLanes)) + i;
      LoadRows(matrix.source + column * matrix.stride + first_row + own,
               column < matrix.k ? valid : 0, values[p][i]);
    }
  }

  // Scale and turn.
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    if (r >= valid) break;
    float* const root = matrix.root + first_row + own + r;
    const int half = HalfExponentAt(root);
    const float factor = PowerOfTwo(-half);
    if (first_column == 0 && first_pair == 0) *root = PowerOfTwo(half);
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
      const Pair pair = SplitPair(values[p][0][r], values[p][1][r], factor, two);
      const int at = first_pair + p * (kColumnThreads / kRowLanes);
      const int word = (at / 4 ^ lane % kUnits) * 4 + at % 4;
      reinterpret_cast<uint32_t*>(tile[0][own + r])[word] = pair.hi;
      if (two) reinterpret_cast<uint32_t*>(tile[1][own + r])[word] = pair.lo;
    }
  }
  __syncthreads();

  // Store.
  const int unit = static_cast<int>(threadIdx.x) % kUnits;
  const int column = first_column + unit * 8;
  if (column >= matrix.plane_stride) return;
  for (int plane = 0; plane < matrix.planes; ++plane) {
#pragma unroll
    for (int r = static_cast<int>(threadIdx.x) / kUnits; r < kTile; r += kColumnThreads / kUnits) {
      const int64_t row = first_row + r;
      if (row >= matrix.rows) break;
      uint16_t* const to = matrix.plane + plane * matrix.plane_size + row * matrix.plane_stride;
      *reinterpret_cast<uint4*>(to + column) = tile[plane][r][unit ^ r / 4 % kUnits];
    }
  }
}

template <int kThreads, bool kWhole>
SplitRowsKernel DescribeRows(const char* name) {
  return {{name, reinterpret_cast<const void*>(&SplitRows<kThreads, kWhole>), kThreads},
          kWhole ? kThreads * kSplitElements : INT32_MAX};
}

template <int kRowLanes>
SplitStripsKernel DescribeStrips(const char* name) {
  return {{name, reinterpret_cast<const void*>(&SplitStrips<kRowLanes>), kMostStripThreads},
          kMostStripThreads / kRowLanes * kWidth,
          4 * kRowLanes};
}

}  // namespace

static_assert(FXFUSE_MAX_FACTOR_COLUMNS <= 1024 * kSplitElements, "a kernel that takes factors");

const SplitRowsKernel& SplitRowsKernelAt(int i) {
  static const SplitRowsKernel kernels[kSplitRowsKernels] = {
      DescribeRows<256, true>("split_rows_256"),
      DescribeRows<512, true>("split_rows_512"),
      DescribeRows<1024, true>("split_rows_1024"),
      // One row on an SM at a time: the second reading of all of them together is served by the L2.
      DescribeRows<1024, false>("split_rows_twice"),
  };
  return kernels[i];
}

const SplitStripsKernel& SplitStripsKernelAt(int i) {
  static const SplitStripsKernel kernels[kSplitStripsKernels] = {
      DescribeStrips<4>("split_strips_16"),
      DescribeStrips<2>("split_strips_8"),
  };
  return kernels[i];
}

const SplitColumnsKernel& SplitMaximaKernel() {
  static const SplitColumnsKernel kernel = {
      {"split_maxima", reinterpret_cast<const void*>(&SplitMaxima), kColumnThreads},
      kMaximaRows,
      kMaximaColumns};
  return kernel;
}

const SplitColumnsKernel& SplitTilesKernel() {
  static const SplitColumnsKernel kernel = {
      {"split_tiles", reinterpret_cast<const void*>(&SplitTiles), kColumnThreads}, kTile, kTile};
  return kernel;
}

}  // namespace fxfuse
