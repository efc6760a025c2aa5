// What the Hopper GEMM's consumers do with a tile's sums: add up those of a cluster, undo scales,
// run the program and store.

#ifndef FXFUSE_CUDA_HOPPER_EPILOGUE_CUH_
#define FXFUSE_CUDA_HOPPER_EPILOGUE_CUH_

#include "chain.cuh"
#include "hopper_config.cuh"
#include "interpreter.cuh"
#include "planes.cuh"

namespace fxfuse {

// Reduction ---------------------------------------------------------------------------------------

// Adds sums that lie in shared memory, four of this lane's in each `step` bytes from `at` on.
template <class Config>
__device__ __forceinline__ void AddSums(uint32_t at, int step, Accumulator<Config>& accumulator) {
#pragma unroll
  for (int i = 0; i < Config::kN / 8; ++i) {
    const float4 other = load_shared(at + i * step);
    float* const d = &accumulator[4 * i];
    d[0] += other.x, d[1] += other.y, d[2] += other.z, d[3] += other.w;
  }
}

// Adds the second warpgroup's sums of the same rows to the first's, through shared memory at
// `sums`.
template <class Config>
__device__ __forceinline__ void AddGroups(uint32_t sums, int group,
                                          Accumulator<Config>& accumulator) {
  const uint32_t at = sums + threadIdx.x % 128 * 16;
#pragma unroll
  for (int i = 0; i < Config::kN / 8; ++i) {
    const float* d = &accumulator[4 * i];
    if (group == 1) store_shared(at + i * 2048, make_float4(d[0], d[1], d[2], d[3]));
  }
  barrier_sync<256>(kSums);
  if (group == 0) AddSums<Config>(at, 2048, accumulator);
  barrier_sync<256>(kSums);
}

// Adds up what the blocks that divide K have each got from their part. The 16 rows of warp w are
// finished by block w % split; returns whether this is the block for this warp's rows. Of warps
// beyond the tile's rows none are inside.
//
// Parts travel by stores that count their bytes at a barrier of the receiver. A barrier of all
// threads of the cluster took half a microsecond more: its release waits for all of the GPU to see
// what was written or prefetched, and its acquire empties the L1.
template <class Config>
__device__ __forceinline__ bool ReduceCluster(const HopperArguments& arguments, uint32_t ring,
                                              const Barriers<Config>& barriers,
                                              const BlockWork& work, bool rows_inside,
                                              Accumulator<Config>& accumulator) {
  constexpr int kSlotBytes = 16 * Config::kN * static_cast<int>(sizeof(float));
  constexpr int kChunks = Config::kN / 8;  // of four floats a lane
  const int split = arguments.split;
  const int warp = threadIdx.x / 32 - 4;
  const int lane = threadIdx.x % 32;
  const int owner = warp % split;
  // In the owner's ring: first by sender, then by those of its warps that finish rows.
  const auto slot = [&](int sender) {
    const int index = sender - (sender > owner ? 1 : 0);
    return ring + (index * (Config::kRowWarps / split) + warp / split) * kSlotBytes + lane * 16;
  };
  const int in_group = threadIdx.x % 128;
  if (in_group < split && in_group != work.rank) {
    barrier_arrive_remote(remote_address(barriers.Free(), FirstRank(arguments) + in_group));
  }
  if (work.rank == owner && rows_inside && lane == 0) {
    barrier_arrive_expect(barriers.Parts(warp), (split - 1) * kSlotBytes);
  }
  // Also where nothing is to be sent: a block must be there for whatever arrives.
  barrier_wait(barriers.Free(), 0);
  if (!rows_inside) return false;
  if (work.rank != owner) {
    const uint32_t to = remote_address(slot(work.rank), FirstRank(arguments) + owner);
    const uint32_t counts = remote_address(barriers.Parts(warp), FirstRank(arguments) + owner);
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const float* d = &accumulator[4 * i];
      send(to + i * 512, counts, make_float4(d[0], d[1], d[2], d[3]));
    }
    return false;
  }
  barrier_wait(barriers.Parts(warp), 0);
#pragma unroll 1
  for (int sender = 0; sender < split; ++sender) {
    if (sender != owner) AddSums<Config>(slot(sender), 512, accumulator);
  }
  return true;
}

// Epilogue and store ------------------------------------------------------------------------------

// Gives lane q of each quad the q-th pair of all four lanes: out of two of every eight columns,
// eight adjacent ones.
__device__ __forceinline__ void TransposeQuad(float* x) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool upper = (threadIdx.x & bit) != 0;
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      if (pair & bit) continue;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& low = x[2 * pair + e];
        float& high = x[2 * (pair + bit) + e];
        const float received = __shfl_xor_sync(~0u, upper ? low : high, bit);
        (upper ? low : high) = received;
      }
    }
  }
}

// Whether a lane's accumulators belong to adjacent columns as they are.
__device__ __forceinline__ bool Interleaved(const HopperArguments& arguments) {
  return arguments.layout_b == LayoutB::kInterleaved;
}

__device__ __forceinline__ float RootA(const HopperArguments& arguments, uint32_t row) {
  return __ldg(arguments.root_a + min(row, arguments.program.rows - 1));
}

__device__ __forceinline__ float RootB(const HopperArguments& arguments, uint32_t column) {
  if (arguments.root_b == nullptr) return 1.0f;
  return __ldg(arguments.root_b + min(column, arguments.program.columns - 1));
}

template <class Config>
using ChainOf = Chain<typename Config::Math, Config::kChainDtype, Config::kN / 32,
                      Config::kFullOperands, Config::kPingPong ? 2 : 1>;

// Gives lanes adjacent columns of accumulators that have two of every eight.
template <class Config>
__device__ __forceinline__ void MakeAdjacent(typename ChainOf<Config>::Values& accumulator) {
#pragma unroll
  for (int first = 0; first < ChainOf<Config>::kSize; first += 16) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float eight[8];
#pragma unroll
      for (int w = 0; w < 8; ++w) eight[w] = accumulator[first + AccumulatorIndex(0, h, w)];
      TransposeQuad(eight);
#pragma unroll
      for (int w = 0; w < 8; ++w) accumulator[first + AccumulatorIndex(0, h, w)] = eight[w];
    }
  }
}

// Brings accumulators of scaled planes back, of a chain: the number of columns is a multiple of 8.
// Afterwards lanes have adjacent columns, however B lay.
template <class Config>
__device__ __forceinline__ void UndoScaling(const HopperArguments& arguments,
                                            typename ChainOf<Config>::Values& accumulator, int row0,
                                            int column0) {
  constexpr int kRows = ChainOf<Config>::kRows;
  const int row = row0 + threadIdx.x % 32 / 4;
  // Planes that are not interleaved have no scales of columns.
  if (!Interleaved(arguments)) MakeAdjacent<Config>(accumulator);
  const int column = column0 + threadIdx.x % 4 * 8;
  const int scaled =
      arguments.root_b == nullptr ? 0 : static_cast<int>(arguments.program.columns) - column;
  float root_a[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    root_a[r] = RootA(arguments, ChainOf<Config>::RowAt(row, r));
  }
#pragma unroll
  for (int block = 0; block < Config::kN / 32; ++block) {
    uint32_t root_b[8];
#pragma unroll
    for (int w = 0; w < 8; ++w) root_b[w] = __float_as_uint(1.0f);
    if (block * 32 < scaled) LoadWords(arguments.root_b + column + block * 32, root_b);
#pragma unroll
    for (int w = 0; w < 8; ++w) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        float& value = accumulator[ChainOf<Config>::Index(r / 2, block, r % 2, w)];
        value = Unscaled(value, root_a[r], __uint_as_float(root_b[w]));
      }
    }
  }
}

// Runs any program over this warp's rows of the tile, 16 rows and 64 columns at a time.
template <class Config>
__device__ __forceinline__ void Interpret(const HopperArguments& arguments,
                                          const Accumulator<Config>& accumulator, int row0,
                                          int column0) {
  using Fragment = typename Config::Fragment;
  const int lane = threadIdx.x % 32;
  // One copy of the interpreter serves all parts; which accumulators a part takes is a uniform
  // branch, for registers cannot be indexed.
#pragma unroll 1
  for (int part = 0; part < Config::kParts; ++part) {
    const int column = column0 + part * Config::kPartColumns;
    if (column >= static_cast<int>(arguments.program.columns)) return;
    float values[Fragment::kSize];
#pragma unroll
    for (int i = 0; i < Config::kParts; ++i) {
      if (i != part) continue;
      asm volatile("");  // a branch, please: a select would take an instruction for each i
#pragma unroll
      for (int v = 0; v < Fragment::kSize; ++v) {
        const int group = v / 8, block = group / 2, h = group % 2, jj = v % 8 / 2, e = v % 2;
        values[v] = accumulator[i * 32 + 4 * (4 * block + jj) + 2 * h + e];
      }
    }
    if (!Interleaved(arguments)) {
#pragma unroll
      for (int g = 0; g < Fragment::kGroups; ++g) TransposeQuad(&values[8 * g]);
    }
    const Fragment at(row0 + lane / 4, 8, column + lane % 4 * 8);
    if (arguments.root_a != nullptr) {
#pragma unroll
      for (int v = 0; v < Fragment::kSize; ++v) {
        values[v] = Unscaled(values[v], RootA(arguments, at.Row(v / 8)),
                             RootB(arguments, at.Column(v / 8) + v % 8));
      }
    }
    Interpreter<Fragment, typename Config::Math>::Run(arguments.program, at, values);
  }
}

// Asks for what this warp will read of the operands.
template <class Config>
__device__ __forceinline__ void PrefetchOperands(const HopperArguments& arguments, int row0,
                                                 int column0) {
  const DeviceProgram& program = arguments.program;
  const int lane = threadIdx.x % 32;
  const int columns = min(Config::kN, static_cast<int>(program.columns) - column0);
  if (columns <= 0) return;  // the second tile of a pair
  if (arguments.root_b != nullptr && lane * 32 < columns) {
    prefetch_line(arguments.root_b + column0 + lane * 32);
  }
  for (uint32_t rest = program.row_operands; rest != 0; rest &= rest - 1) {
    const DeviceOperand& operand = program.operand[__ffs(rest) - 1];
    const int size = DtypeSize(operand.dtype);
    if (lane * 128 < columns * size) {
      prefetch_line(static_cast<const char*>(operand.data) + column0 * size + lane * 128);
    }
  }
  const int row = row0 + lane;
  if (lane >= 16 || row >= static_cast<int>(program.rows)) return;
  for (uint32_t rest = program.full_operands; rest != 0; rest &= rest - 1) {
    const DeviceOperand& operand = program.operand[__ffs(rest) - 1];
    const int size = DtypeSize(operand.dtype);
    prefetch_bytes(
        static_cast<const char*>(operand.data) + (row * operand.row_stride + column0) * size,
        columns * size);
  }
}

}  // namespace fxfuse

#endif  // FXFUSE_CUDA_HOPPER_EPILOGUE_CUH_
