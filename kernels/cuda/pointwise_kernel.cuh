// output = program(acc), acc [M, N] in memory, in place where output and acc are one matrix.
//
// At best every byte is read and written once, and each SM always has reads under way: with 24
// warps of 512 to 2048 bytes it has what its share of an H200's memory needs (about 11 bytes a
// cycle over some 800 cycles of latency). Where a fragment's words leave room for the next one's,
// those are fetched before the present one is computed.

#ifndef FXFUSE_CUDA_POINTWISE_KERNEL_CUH_
#define FXFUSE_CUDA_POINTWISE_KERNEL_CUH_

#include "fragment.cuh"
#include "gradient.cuh"
#include "interpreter.cuh"
#include "memory.cuh"
#include "pointwise_kernel.h"
#include "ptx.cuh"

namespace fxfuse {

// A thread's slots (see LocalSlots) in shared memory: of so many threads they are more than the L1
// holds. [warp][slot][unit][lane] of units of 16 bytes.
template <class Value, int kSize>
class SharedSlots {
 public:
  // From byte `offset` of the block's shared memory on, `count` for each thread.
  __device__ __forceinline__ SharedSlots(int offset, int count) {
    extern __shared__ __align__(16) uint8_t shared[];
    const int unit = threadIdx.x / 32 * count * kUnits * 32 + threadIdx.x % 32;
    first_ = shared_address(shared) + offset + unit * static_cast<int>(sizeof(Unit));
    asm volatile("" : "+r"(first_));  // or it would be computed anew for every step
  }

  template <int kCount>
  __device__ __forceinline__ void Read(int slot, int from, Value (&to)[kCount]) const {
    if constexpr (kCount % kPerUnit == 0) {
#pragma unroll
      for (int j = 0; j < kCount; j += kPerUnit) {
        const Unit unit = ReadUnit(slot, from + j);
#pragma unroll
        for (int i = 0; i < kPerUnit; ++i) to[j + i] = unit.value[i];
      }
    } else {
#pragma unroll
      for (int j = 0; j < kCount; ++j)
        to[j] = ReadUnit(slot, from + j).value[(from + j) % kPerUnit];
    }
  }
  __device__ __forceinline__ void Write(int slot, const Value (&from)[kSize]) {
#pragma unroll
    for (int j = 0; j < kSize; j += kPerUnit) {
      Unit unit;
#pragma unroll
      for (int i = 0; i < kPerUnit; ++i) unit.value[i] = from[j + i];
      WriteUnit(slot, j, unit);
    }
  }
  __device__ __forceinline__ void Fill(int slot, Value value) {
    Unit unit;
#pragma unroll
    for (int i = 0; i < kPerUnit; ++i) unit.value[i] = value;
#pragma unroll
    for (int j = 0; j < kSize; j += kPerUnit) WriteUnit(slot, j, unit);
  }

 private:
  static constexpr int kPerUnit = 16 / sizeof(Value);
  static constexpr int kUnits = kSize / kPerUnit;
  struct __align__(16) Unit {
    Value value[kPerUnit];
  };

  // Where the unit with value `from` of a slot is.
  __device__ __forceinline__ uint32_t At(int slot, int from) const {
    return first_ + (slot * kUnits + from / kPerUnit) * 32 * static_cast<int>(sizeof(Unit));
  }
  __device__ __forceinline__ Unit ReadUnit(int slot, int from) const {
    const float4 bits = load_shared(At(slot, from));
    return *reinterpret_cast<const Unit*>(&bits);
  }
  __device__ __forceinline__ void WriteUnit(int slot, int from, const Unit& unit) {
    store_shared(At(slot, from), *reinterpret_cast<const float4*>(&unit));
  }

  uint32_t first_;  // an address in shared memory
};

// Sums over what the threads of a block compute. Over rows and over all each thread adds up its own
// columns, in shared memory, because registers cannot be indexed by the output; over columns a warp
// writes what its threads have of a row.
template <class Fragment, class Value>
class BlockSums {
 public:
  static constexpr int kWidth = Fragment::kWidth;

  template <class Arguments>
  __device__ __forceinline__ BlockSums(const Arguments& arguments, uint32_t column_block)
      : threads_(arguments.threads),
        lanes_(1u << arguments.log2_lanes),
        segments_(lanes_ > 32 ? lanes_ / 32 : 1),
        parts_(arguments.column_blocks * segments_),
        part_(column_block * segments_ + (threadIdx.x & (lanes_ - 1)) / 32) {}

  __device__ __forceinline__ uint32_t segments() const { return segments_; }
  __device__ __forceinline__ uint32_t parts() const { return parts_; }

  // The block's shared memory: [output][kWidth / 4][thread][4], so that a thread's
  // access is one of 16 bytes, beside its neighbours'.
  struct __align__(16) Quad {
    Value value[4];
  };
  __device__ __forceinline__ Quad& Totals(int output, int quad, uint32_t thread) const {
    extern __shared__ __align__(16) uint8_t shared[];
    return reinterpret_cast<Quad*>(shared)[(output * (kWidth / 4) + quad) * threads_ + thread];
  }
  __device__ __forceinline__ Value& Total(int output, int column, uint32_t thread) const {
    return Totals(output, column / 4, thread).value[column % 4];
  }

  // Called by all threads of a warp at once, those outside the matrix included.
  __device__ __forceinline__ void Add(const DeviceProgram& program, int index, const Fragment& at,
                                      const Value (&v)[Fragment::kSize]) const {
    const DeviceOutput& output = program.output[index];
    if (output.sum == FXFUSE_SUM_COLUMNS) {
#pragma unroll
      for (int g = 0; g < Fragment::kGroups; ++g) {
        Value sum = 0.0f;
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          sum += at.Column(g) + j < program.columns ? v[g * kWidth + j] : 0.0f;
        }
        for (uint32_t other = min(lanes_, 32u) / 2; other > 0; other /= 2) {
          sum += __shfl_xor_sync(0xffffffffu, sum, other);
        }
        const bool writes = (threadIdx.x & (min(lanes_, 32u) - 1)) == 0;
        if (writes && at.Row(g) < program.rows) {
          static_cast<Value*>(output.data)[int64_t{at.Row(g)} * parts_ + part_] = sum;
        }
      }
      return;
    }
    if (at.Column(0) >= program.columns) return;
    const bool whole = at.Column(0) + kWidth <= program.columns;
    Value sum[kWidth] = {};
#pragma unroll
    for (int g = 0; g < Fragment::kGroups; ++g) {
      if (at.Row(g) >= program.rows) continue;
      if (whole) {
#pragma unroll
        for (int j = 0; j < kWidth; ++j) sum[j] += v[g * kWidth + j];
      } else {
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          sum[j] += at.Column(g) + j < program.columns ? v[g * kWidth + j] : 0.0f;
        }
      }
    }
#pragma unroll
    for (int q = 0; q < kWidth / 4; ++q) {
      Quad total = Totals(index, q, threadIdx.x);
#pragma unroll
      for (int j = 0; j < 4; ++j) total.value[j] += sum[4 * q + j];
      Totals(index, q, threadIdx.x) = total;
    }
  }

 private:
  uint32_t threads_;
  uint32_t lanes_;
  uint32_t segments_;  // of a row, one per warp
  uint32_t parts_;     // of a whole row
  uint32_t part_;
};

namespace {

template <class Math_, int kWidth, int kGroups, bool kPrefetch_, int kBlocksPerSm_ = 3>
struct PointwiseConfig {
  using Math = Math_;
  using Value = typename Math::Value;
  using Fragment = RowFragment<kWidth, kGroups>;
  using Arguments = PointwiseArgumentsOf<typename ProgramOver<Value>::Program>;
  using Slots = SharedSlots<Value, Fragment::kSize>;
  static constexpr bool kPrefetch = kPrefetch_;
  // Three blocks leave 80 registers a thread: 16 fragment values twice over (argument and result),
  // words of the next fragment where they are of 16 bits, and addresses. Sums are of long programs,
  // whose time goes into instructions: of 16 bits they fetch nothing ahead, of 32 two blocks do.
  // Gradients of chains, which hold two fragments from step to step, are two blocks that do.
  static constexpr int kBlocksPerSm = kBlocksPerSm_;
};

// A fragment of the accumulator as it lies in memory: 16-bit elements fill half of the words.
template <class Fragment, class Value>
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

// In double precision nothing is fetched ahead, so its values are unpacked at once.
template <class Fragment>
class RawFragment<Fragment, double> {
 public:
  __device__ __forceinline__ void Load(const DoubleArguments& from, const Fragment& at) {
    constexpr int kWidth = Fragment::kWidth;
    int64_t offset[Fragment::kGroups];
#pragma unroll
    for (int g = 0; g < Fragment::kGroups; ++g) {
      // Rows and columns past the end are read as the last ones and never stored.
      offset[g] = min(at.Row(g), from.program.rows - 1) * from.row_stride;
    }
    if (from.vector && at.Column(0) + kWidth <= from.program.columns) {
#pragma unroll
      for (int g = 0; g < Fragment::kGroups; ++g) offset[g] += at.Column(0);
      LoadVectors<kWidth, Fragment::kGroups>(from.accumulator, from.dtype, offset, value_);
      return;
    }
    int64_t each[Fragment::kSize];
#pragma unroll
    for (int i = 0; i < Fragment::kSize; ++i) {
      each[i] = offset[i / kWidth] + min(at.Column(0) + i % kWidth, from.program.columns - 1);
    }
    LoadElements<Fragment::kSize>(from.accumulator, from.dtype, each, value_);
  }

  __device__ __forceinline__ void Unpack(int, double (&values)[Fragment::kSize]) const {
#pragma unroll
    for (int i = 0; i < Fragment::kSize; ++i) values[i] = value_[i];
  }

 private:
  double value_[Fragment::kSize];
};

template <class Config>
__global__ void __launch_bounds__(kMostPointwiseThreads, Config::kBlocksPerSm)
    PointwiseProgram(const __grid_constant__ typename Config::Arguments arguments) {
  using Fragment = typename Config::Fragment;
  using Slots = typename Config::Slots;

  // Setup. Blocks are numbered along the rows; each takes every gridDim.x-th, and its position
  // moves by a fixed step of rows and columns, so that nothing is divided in the loop.
  const uint32_t lanes = 1u << arguments.log2_lanes;
  const uint32_t lane = threadIdx.x & (lanes - 1);
  const uint32_t line = threadIdx.x >> arguments.log2_lanes;
  const uint32_t lines = arguments.threads >> arguments.log2_lanes;
  uint32_t row_block = blockIdx.x / arguments.column_blocks;
  uint32_t column_block = blockIdx.x % arguments.column_blocks;
  const uint32_t row_step = gridDim.x / arguments.column_blocks;
  const uint32_t column_step = gridDim.x % arguments.column_blocks;
  const Slots slots(0, arguments.program.slot_count);
  const auto position = [&] {
    return Fragment(row_block * lines * Fragment::kGroups + line, lines,
                    (column_block * lanes + lane) * Fragment::kWidth);
  };

  await_turn();

  // Loads of one fragment (or the next), program and store.
  Fragment at = position();
  RawFragment<Fragment, typename Config::Value> raw;
  if constexpr (Config::kPrefetch) raw.Load(arguments, at);
#pragma unroll 1
  while (row_block < arguments.row_blocks) {
    typename Config::Value values[Fragment::kSize];
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
    // Where lanes add up, those beyond the last column take part: they store nothing.
    if (arguments.groups || here.Column(0) < arguments.program.columns) {
      Interpreter<Fragment, typename Config::Math, NoSums, true, Slots>::Run(
          arguments.program, here, values, 0, {}, slots);
    }
  }
}

// Whether an output is added up from top to bottom.
__device__ __forceinline__ bool AddsRows(const DeviceProgram& program, int output) {
  const uint8_t sum = program.output[output].sum;
  return sum == FXFUSE_SUM_ROWS || sum == FXFUSE_SUM_ALL;
}

// As PointwiseProgram, for problems with summed outputs and gradients of chains. A block goes down
// a strip of blocks of rows, so that it can add up columns.
template <class Config, bool kGradient>
__global__ void __launch_bounds__(kMostPointwiseThreads, Config::kBlocksPerSm)
    PointwiseSums(const __grid_constant__ typename Config::Arguments arguments) {
  using Fragment = typename Config::Fragment;
  using Value = typename Config::Value;
  using Sums = BlockSums<Fragment, Value>;
  using Slots = typename Config::Slots;
  constexpr int kWidth = Fragment::kWidth;
  const auto& program = arguments.program;

  // Setup.
  const uint32_t lanes = 1u << arguments.log2_lanes;
  const uint32_t lane = threadIdx.x & (lanes - 1);
  const uint32_t line = threadIdx.x >> arguments.log2_lanes;
  const uint32_t lines = arguments.threads >> arguments.log2_lanes;
  const uint32_t strip = blockIdx.x / arguments.column_blocks;
  const uint32_t column_block = blockIdx.x % arguments.column_blocks;
  const auto border = [&](uint32_t i) {
    return static_cast<uint32_t>(uint64_t{arguments.row_blocks} * i / arguments.strips);
  };
  const uint32_t last = border(strip + 1);
  const Sums sums(arguments, column_block);
  const int sum_bytes = program.output_count * arguments.threads * kWidth * sizeof(Value);
  const Slots slots(sum_bytes, program.slot_count);
#pragma unroll 1
  for (int o = 0; o < program.output_count; ++o) {
    if (!AddsRows(program, o)) continue;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) sums.Total(o, j, threadIdx.x) = 0.0f;
  }
  await_turn();

  // Loads of one fragment, program, stores and sums. Threads beyond the last column take part: they
  // read what is inside and store nothing.
  const auto position = [&](uint32_t block) {
    return Fragment(block * lines * Fragment::kGroups + line, lines,
                    (column_block * lanes + lane) * kWidth);
  };
  uint32_t block = border(strip);
  RawFragment<Fragment, Value> raw;
  if constexpr (Config::kPrefetch) raw.Load(arguments, position(block));
#pragma unroll 1
  for (; block < last; ++block) {
    const Fragment at = position(block);
    if constexpr (!Config::kPrefetch) raw.Load(arguments, at);
    Value values[Fragment::kSize];
    raw.Unpack(arguments.dtype, values);
    // What lies below the last row is read as that.
    if constexpr (Config::kPrefetch) raw.Load(arguments, position(block + 1));
    if constexpr (kGradient) {
      GradientOfChain<Fragment, typename Config::Math, Sums, Slots>::Run(program, at, values, sums,
                                                                         slots);
    } else {
      Interpreter<Fragment, typename Config::Math, Sums, true, Slots>::Run(program, at, values, 0,
                                                                           sums, slots);
    }
  }

  // Sums of the block, in a fixed order: columns by line, or threads by number.
  __syncthreads();
#pragma unroll 1
  for (int o = 0; o < program.output_count; ++o) {
    if (!AddsRows(program, o)) continue;
    Value* to = static_cast<Value*>(program.output[o].data);
    if (program.output[o].sum == FXFUSE_SUM_ROWS) {
      for (uint32_t c = threadIdx.x; c < lanes * kWidth; c += arguments.threads) {
        const uint32_t column = column_block * lanes * kWidth + c;
        if (column >= program.columns) continue;
        double sum = 0.0;  // of up to 256 terms, one after another
        for (uint32_t i = 0; i < lines; ++i) {
          sum += sums.Total(o, c % kWidth, i * lanes + c / kWidth);
        }
        to[int64_t{strip} * program.columns + column] = static_cast<Value>(sum);
      }
      continue;
    }
    if (threadIdx.x >= 32) continue;
    Value sum = 0.0f;
    for (int i = threadIdx.x; i < arguments.threads; i += 32) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) sum += sums.Total(o, j, i);
    }
    for (int other = 16; other > 0; other /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, other);
    if (threadIdx.x < sums.segments()) {
      to[int64_t{strip} * sums.parts() + column_block * sums.segments() + threadIdx.x] =
          threadIdx.x == 0 ? sum : Value(0);
    }
  }
}

template <class Config>
PointwiseKernel Describe(const char* name, MathLevel math) {
  using Fragment = typename Config::Fragment;
  const void* function = reinterpret_cast<const void*>(&PointwiseProgram<Config>);
  return {name, function, math, PointwiseKind::kPlain, Fragment::kWidth, Fragment::kGroups};
}

template <class Config>
PointwiseKernel DescribeSums(const char* name, MathLevel math) {
  using Fragment = typename Config::Fragment;
  const void* function = reinterpret_cast<const void*>(&PointwiseSums<Config, false>);
  return {name, function, math, PointwiseKind::kSums, Fragment::kWidth, Fragment::kGroups};
}

template <class Config>
PointwiseKernel DescribeGradient(const char* name, MathLevel math) {
  using Fragment = typename Config::Fragment;
  const void* function = reinterpret_cast<const void*>(&PointwiseSums<Config, true>);
  return {name, function, math, PointwiseKind::kGradient, Fragment::kWidth, Fragment::kGroups};
}

}  // namespace
}  // namespace fxfuse

#endif  // FXFUSE_CUDA_POINTWISE_KERNEL_CUH_
