// D = epilogue(A @ B^T), A [M, K] and B [N, K] (or [K, N]) of 16 bits, on sm_90a; or, of fp32
// matrices that were split into two fp16 planes each (see fxfuse_cuda_split),
// D = epilogue(lo(A) @ hi(B)^T + hi(A) @ lo(B)^T + hi(A) @ hi(B)^T).
//
// Persistent and warp-specialised: two producer threads keep a ring of stages filled by bulk
// tensor copies, also while two consumer warpgroups, each with 64 rows of the tile, run the
// epilogue. Where there are fewer tiles than SMs, the blocks of a cluster divide K among them, and
// each adds up and finishes some rows of the tile; sums are taken in the order of the blocks.
//
// Why not one tile for each warpgroup, in turns, which would hide the epilogue: two tiles of
// 128 x 256 have no room in registers, and tiles of 128 x 128 move a fifth more through shared
// memory and a third more out of the L2. An H200 at its power limit pays for that with its clock:
// with such a schedule add and relu after 1024 x 8192 -> 8192 in bf16 took 273k cycles for 277k,
// but 0.190 ms for 0.180.
//
// The epilogue works on the accumulators where they are. The tensor cores leave a lane two adjacent
// columns of every eight; rows of B are brought in an order that makes those eight adjacent columns
// of D, so that the lane reads and writes 16 bytes at a time.
//
// Three products of planes are more accurate than a product in fp32 (Ootomo and Yokota, 2022, arXiv
// 2203.03341). The tensor cores truncate what they add up, so every 64 of K it is added to sums
// that are kept beside the accumulator (promotion).
//
// Phases: setup, producer, consumer (mainloop, reduction, epilogue and store).

#ifndef FXFUSE_CUDA_HOPPER_GEMM_CUH_
#define FXFUSE_CUDA_HOPPER_GEMM_CUH_

#include "chain.cuh"
#include "fragment.cuh"
#include "hopper_kernels.h"
#include "interpreter.cuh"
#include "planes.cuh"
#include "ptx_hopper.cuh"

namespace fxfuse {

constexpr int kRowBytes = 128;  // of a stage's rows: 64 elements of K, one swizzle row

template <class Math_, int kChainDtype_, int kPlanes_, int kN_, int kStages_>
struct HopperConfig {
  using Math = Math_;
  static constexpr int kChainDtype = kChainDtype_;  // serves chains of it alone; or kNoChain
  static constexpr int kPlanes = kPlanes_;          // of each matrix: 1, or 2 for three products
  static constexpr int kM = 128, kN = kN_, kStages = kStages_;

  static constexpr int kStageK = kRowBytes / 2;  // elements of K in a stage
  // A stage holds the planes of A and then those of B.
  static constexpr int kBytesA = kM * kRowBytes, kBytesB = kN * kRowBytes;  // of a plane
  static constexpr int kStageBytes = kPlanes * (kBytesA + kBytesB);
  static constexpr int kRingBytes = kStages * kStageBytes;
  static constexpr int kSteps = kStageK / 16;
  static constexpr int kSharedBytes = 1024 + kRingBytes + 16 * kStages;

  // Interpreter takes the accumulators 64 columns at a time.
  static constexpr int kPartColumns = 64;
  static constexpr int kParts = kN / kPartColumns;
  using Fragment = RowFragment<8, 2, 2, 32>;

  static_assert(kN == 64 || kN == 128 || kN == 256, "there is a wgmma for it");
  static_assert(kPlanes == 1 || kN <= 128, "two sets of accumulators fit the registers");
  static_assert(kSharedBytes <= 227 * 1024, "what a block may have on sm_90");
  static_assert((kMaxSplit - 1) * kM * kN * 4 / kMaxSplit <= kRingBytes,
                "the ring holds what other blocks of a cluster send");
};

// Lane l holds, of each 8 x 8 block of a warp's 16 rows, the columns of pair l % 4 and the rows
// l / 4 and l / 4 + 8: accumulator[4 * j + 2 * h + e] is element e of the pair in block column j,
// row half h.
template <class Config>
using Accumulator = float[Config::kN / 2];

// Addresses of the barriers in shared memory.
template <class Config>
struct Barriers {
  uint32_t base;
  // Stage s has been filled.
  __device__ __forceinline__ uint32_t Full(int s) const { return base + 8 * s; }
  // Stage s has been read by both warpgroups.
  __device__ __forceinline__ uint32_t Empty(int s) const {
    return base + 8 * (Config::kStages + s);
  }
};

// A place in the ring, and how often the ring has been round.
template <class Config>
struct RingPosition {
  int slot = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void Advance() {
    if (++slot == Config::kStages) {
      slot = 0;
      parity ^= 1;
    }
  }
};

// This block's part of K.
struct BlockWork {
  int rank;  // in the cluster that shares a tile
  int first_stage, stages;
};

__device__ __forceinline__ BlockWork DescribeWork(const HopperArguments& arguments) {
  const int split = arguments.split;
  if (split == 1) return {0, 0, arguments.stages};
  const int rank = static_cast<int>(cluster_rank());
  const int first = arguments.stages * rank / split;
  return {rank, first, arguments.stages * (rank + 1) / split - first};
}

// Where a tile begins; at row -1 if there is no such tile.
struct TileOrigin {
  int row, column;
};

// The `round`-th tile of this block. Clusters take tiles in turns. Groups of 8 tile rows are walked
// column by column, so that the blocks running at one time share few rows of A and B in L2.
//
// Everything is asked of the hardware anew, so that nothing is kept in registers from tile to tile.
template <class Config>
__device__ __forceinline__ TileOrigin FindTile(const HopperArguments& arguments, int round) {
  constexpr int kGroup = 8;
  const int index = cluster_index() + round * cluster_count();
  if (index >= arguments.tiles_m * arguments.tiles_n) return {-1, 0};
  const int per_group = kGroup * arguments.tiles_n;
  const int group = index / per_group;
  const int in_group = index - group * per_group;
  const int rows = min(kGroup, arguments.tiles_m - group * kGroup);
  const int tile_n = in_group / rows;
  const int tile_m = group * kGroup + in_group - tile_n * rows;
  return {tile_m * Config::kM, tile_n * Config::kN};
}

// Producer ----------------------------------------------------------------------------------------

__device__ __forceinline__ int RoundUp(int n, int unit) { return (n + unit - 1) / unit * unit; }

// Brings `rows` rows of B, from `n` on, or as many columns, at `k`, in boxes of `box`.
__device__ __forceinline__ void CopyB(const CUtensorMap& map, LayoutB layout, int box, uint32_t to,
                                      uint32_t full, int n, int rows, int k) {
  for (int i = 0; i < rows; i += box) {
    if (layout == LayoutB::kInterleaved) {
      copy_box(to + i * kRowBytes, &map, full, k, 0, 0, 0, (n + i) / 32);
    } else if (layout == LayoutB::kRows) {
      copy_box(to + i * kRowBytes, &map, full, k, n + i);
    } else {
      copy_box(to + i * kRowBytes, &map, full, n + i, k);
    }
  }
}

// Whether a row of A or B in the tile is special. To be called by a whole warp.
template <class Config>
__device__ __forceinline__ bool HasSpecial(const HopperArguments& arguments,
                                           const TileOrigin& tile) {
  const int lane = threadIdx.x % 32;
  int special = 0;
#pragma unroll
  for (int i = 0; i < Config::kM; i += 32) {
    const int row = tile.row + i + lane;
    if (row < static_cast<int>(arguments.program.rows)) special |= __ldg(arguments.special_a + row);
  }
#pragma unroll
  for (int i = 0; i < Config::kN; i += 32) {
    const int row = tile.column + i + lane;
    if (row < static_cast<int>(arguments.program.columns)) {
      special |= __ldg(arguments.special_b + row);
    }
  }
  return __any_sync(~0u, special);
}

// Two warps produce, a thread of each: one brings A and announces the bytes of a stage, the other
// (`brings_b`) brings B. One alone is too slow for the narrowest tile.
//
// Boxes that lie outside the matrices are left out: bringing zeros takes longer than bringing data
// (an H200 took 79 us for 1 x 8192 -> 8192 where it took 42 for 128 rows). What the tile holds in
// their place reaches no result that is stored.
template <class Config>
__device__ __forceinline__ void Produce(const HopperArguments& arguments, uint32_t ring,
                                        const Barriers<Config>& barriers, const BlockWork& work,
                                        bool brings_b) {
  RingPosition<Config> at;
  const bool issues = threadIdx.x % 32 == 0;
  for (int round = 0;; ++round) {
    const TileOrigin tile = FindTile<Config>(arguments, round);
    if (tile.row < 0) return;
    int stages = work.stages;
    if constexpr (Config::kPlanes == 2) {
      if (HasSpecial<Config>(arguments, tile)) stages *= 2;
    }
    if (!issues) continue;
    const int left_m = static_cast<int>(arguments.program.rows) - tile.row;
    const int left_n = static_cast<int>(arguments.program.columns) - tile.column;
    const bool whole_a = left_m >= Config::kM, whole_b = left_n >= Config::kN;
    const int rows_a = whole_a ? Config::kM : RoundUp(left_m, arguments.edge_a);
    const int rows_b = whole_b ? Config::kN : RoundUp(left_n, arguments.edge_b);
    const int box_a = whole_a ? Config::kM : arguments.edge_a;
    const int box_b =
        whole_b && arguments.layout_b != LayoutB::kColumns ? Config::kN : arguments.edge_b;
    const CUtensorMap& a = whole_a ? arguments.a : arguments.a_edge;
    const CUtensorMap& b = whole_b ? arguments.b : arguments.b_edge;
    for (int stage = 0; stage < stages; ++stage) {
      barrier_wait(barriers.Empty(at.slot), at.parity ^ 1);
      const uint32_t full = barriers.Full(at.slot);
      const uint32_t to_a = ring + at.slot * Config::kStageBytes;
      const uint32_t to_b = to_a + Config::kPlanes * Config::kBytesA;
      const int again = Config::kPlanes == 2 && stage >= work.stages ? work.stages : 0;
      const int k = (work.first_stage + stage - again) * Config::kStageK;
      if (!brings_b) barrier_arrive_expect(full, Config::kPlanes * (rows_a + rows_b) * kRowBytes);
#pragma unroll
      for (int p = 0; p < Config::kPlanes; ++p) {
        if (brings_b) {
          CopyB(b, arguments.layout_b, box_b, to_b + p * Config::kBytesB, full,
                tile.column + p * arguments.plane_rows_b, rows_b, k);
        } else {
          for (int i = 0; i < rows_a; i += box_a) {
            copy_box(to_a + p * Config::kBytesA + i * kRowBytes, &a, full, k,
                     tile.row + p * arguments.plane_rows_a + i);
          }
        }
      }
      at.Advance();
    }
  }
}

// Consumer: mainloop ------------------------------------------------------------------------------

// Issues this warpgroup's multiply-adds of one stage, of one plane of each matrix.
template <class Config, class Input, Major kMajorB>
__device__ __forceinline__ void MultiplyStage(Accumulator<Config>& accumulator, uint32_t stage,
                                              int group, int accumulate) {
  const uint64_t a = describe<Major::kK>(stage + group * 64 * kRowBytes);
  const uint64_t b = describe<kMajorB>(stage + Config::kPlanes * Config::kBytesA);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < Config::kSteps; ++step) {
    Wgmma<Input, kMajorB>::Multiply(accumulator, a + step * kDescriptorStep<Major::kK>,
                                    b + step * kDescriptorStep<kMajorB>, step > 0 || accumulate);
  }
  wgmma_commit();
}

// The same of two planes each, from zero. What is small comes first, so that less is truncated.
template <class Config>
__device__ __forceinline__ void MultiplyStagePlanes(Accumulator<Config>& part, uint32_t stage,
                                                    int group) {
  using Product = Wgmma<__half, Major::kK>;
  constexpr uint64_t kStep = kDescriptorStep<Major::kK>;
  const uint64_t hi_a = describe<Major::kK>(stage + group * 64 * kRowBytes);
  const uint64_t lo_a = hi_a + (Config::kBytesA >> 4);
  const uint64_t hi_b = describe<Major::kK>(stage + 2 * Config::kBytesA);
  const uint64_t lo_b = hi_b + (Config::kBytesB >> 4);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < Config::kSteps; ++step) {
    Product::Multiply(part, lo_a + step * kStep, hi_b + step * kStep, step > 0);
    Product::Multiply(part, hi_a + step * kStep, lo_b + step * kStep, 1);
  }
#pragma unroll
  for (int step = 0; step < Config::kSteps; ++step) {
    Product::Multiply(part, hi_a + step * kStep, hi_b + step * kStep, 1);
  }
  wgmma_commit();
}

// Tells the producer that this warpgroup is done with a slot.
template <class Config>
__device__ __forceinline__ void ReleaseStage(const Barriers<Config>& barriers, int slot) {
  if (threadIdx.x % 128 == 0) barrier_arrive(barriers.Empty(slot));
}

// One batch of multiply-adds is always queued behind the one that runs. `meanwhile` is called when
// there is something for the tensor cores to do.
template <class Config, class Input, Major kMajorB, class Meanwhile>
__device__ __forceinline__ void Multiply(uint32_t ring, const Barriers<Config>& barriers,
                                         int stages, int group, Accumulator<Config>& accumulator,
                                         RingPosition<Config>& at, const Meanwhile& meanwhile) {
  barrier_wait(barriers.Full(at.slot), at.parity);
  MultiplyStage<Config, Input, kMajorB>(accumulator, ring + at.slot * Config::kStageBytes, group,
                                        0);
  int previous = at.slot;
  at.Advance();
  meanwhile();
#pragma unroll 1
  for (int stage = 1; stage < stages; ++stage) {
    barrier_wait(barriers.Full(at.slot), at.parity);
    MultiplyStage<Config, Input, kMajorB>(accumulator, ring + at.slot * Config::kStageBytes, group,
                                          1);
    wgmma_wait<1>();
    ReleaseStage(barriers, previous);
    previous = at.slot;
    at.Advance();
  }
  wgmma_wait<0>();
  ReleaseStage(barriers, previous);
}

// Of two planes each. The other warpgroup's multiply-adds run while this one promotes its own.
template <class Config, class Meanwhile>
__device__ __forceinline__ void MultiplyPlanes(uint32_t ring, const Barriers<Config>& barriers,
                                               int stages, int group, Accumulator<Config>& sum,
                                               RingPosition<Config>& at,
                                               const Meanwhile& meanwhile) {
#pragma unroll
  for (int i = 0; i < Config::kN / 2; ++i) sum[i] = 0.0f;
#pragma unroll 1
  for (int stage = 0; stage < stages; ++stage) {
    Accumulator<Config> part;
    barrier_wait(barriers.Full(at.slot), at.parity);
    MultiplyStagePlanes<Config>(part, ring + at.slot * Config::kStageBytes, group);
    if (stage == 0) meanwhile();
    wgmma_wait<0>();
    ReleaseStage(barriers, at.slot);
    at.Advance();
#pragma unroll
    for (int i = 0; i < Config::kN / 2; ++i) sum[i] = fmaf(part[i], kRegain, sum[i]);
  }
}

// Passes over a tile's stages: all of this warpgroup's rows lie below the matrix.
template <class Config>
__device__ __forceinline__ void SkipStages(const Barriers<Config>& barriers, int stages,
                                           RingPosition<Config>& at) {
  for (int stage = 0; stage < stages; ++stage) {
    barrier_wait(barriers.Full(at.slot), at.parity);
    ReleaseStage(barriers, at.slot);
    at.Advance();
  }
}

// Of a tile of two planes each with special rows: multiplies the high planes alone, which gives
// their infinities and NaNs as fp32 would. Planes of low parts hold zeros and either sign.
template <class Config>
__device__ __forceinline__ void MultiplySpecial(const HopperArguments& arguments, uint32_t ring,
                                                const Barriers<Config>& barriers, int stages,
                                                int group, int row0, int column0,
                                                Accumulator<Config>& sum,
                                                RingPosition<Config>& at) {
  Accumulator<Config> high;
  Multiply<Config, __half, Major::kK>(ring, barriers, stages, group, high, at, [] {});
  const int rows = static_cast<int>(arguments.program.rows);
  const int columns = static_cast<int>(arguments.program.columns);
  const int row = row0 + threadIdx.x % 32 / 4;
  const int column = column0 + threadIdx.x % 4 * 8;
  const bool special_row[] = {__ldg(arguments.special_a + min(row, rows - 1)) != 0,
                              __ldg(arguments.special_a + min(row + 8, rows - 1)) != 0};
#pragma unroll
  for (int i = 0; i < Config::kN / 4; ++i) {
    const int n = min(column + i / 8 * 32 + i % 8, columns - 1);
    const bool special_column = __ldg(arguments.special_b + n) != 0;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int v = AccumulatorIndex(i / 8, h, i % 8);
      if (special_row[h] || special_column) sum[v] = high[v];
    }
  }
}

// Consumer: reduction -----------------------------------------------------------------------------

// Adds up what the blocks of a cluster have each got from their part of K. The 16 rows of warp w
// are finished by block w % split; returns whether this is the block for this warp's rows.
template <class Config>
__device__ __forceinline__ bool ReduceCluster(const HopperArguments& arguments, uint32_t ring,
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
    return ring + (index * (8 / split) + warp / split) * kSlotBytes + lane * 16;
  };
  cluster_sync();  // every ring is free
  if (work.rank != owner && rows_inside) {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const float* d = &accumulator[4 * i];
      store_remote(slot(work.rank) + i * 512, owner, make_float4(d[0], d[1], d[2], d[3]));
    }
  }
  cluster_sync();
  if (work.rank != owner || !rows_inside) return false;
#pragma unroll 1
  for (int sender = 0; sender < split; ++sender) {
    if (sender == owner) continue;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const float4 part = load_shared(slot(sender) + i * 512);
      float* const d = &accumulator[4 * i];
      d[0] += part.x, d[1] += part.y, d[2] += part.z, d[3] += part.w;
    }
  }
  return true;
}

// Consumer: epilogue and store --------------------------------------------------------------------

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
  return __ldg(arguments.root_b + min(column, arguments.program.columns - 1));
}

template <class Config>
using ChainOf = Chain<typename Config::Math, Config::kChainDtype, Config::kN / 32>;

// Brings accumulators of scaled planes back, of a chain: the number of columns is a multiple of 8.
template <class Config>
__device__ __forceinline__ void UndoScaling(const HopperArguments& arguments,
                                            Accumulator<Config>& accumulator, int row0,
                                            int column0) {
  const int row = row0 + threadIdx.x % 32 / 4;
  const int column = column0 + threadIdx.x % 4 * 8;  // planes are always interleaved
  const float root_a[] = {RootA(arguments, row), RootA(arguments, row + 8)};
#pragma unroll
  for (int block = 0; block < Config::kN / 32; ++block) {
    uint32_t root_b[8] = {};
    const int n = column + block * 32;
    if (n < static_cast<int>(arguments.program.columns)) LoadWords(arguments.root_b + n, root_b);
#pragma unroll
    for (int w = 0; w < 8; ++w) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float& value = accumulator[AccumulatorIndex(block, h, w)];
        value = Unscaled(value, root_a[h], __uint_as_float(root_b[w]));
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

template <class Config>
__device__ __forceinline__ void Consume(const HopperArguments& arguments, uint32_t ring,
                                        const Barriers<Config>& barriers, const BlockWork& work) {
  // From lane 0, and so uniform to the compiler, which then keeps descriptors in uniform registers.
  const int group = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 128 - 1, 0);
  const int warp_row = group * 64 + threadIdx.x / 32 % 4 * 16;
  const int rows = static_cast<int>(arguments.program.rows);
  ChainOf<Config> chain(arguments.program);
  const bool adjacent = Interleaved(arguments);
  RingPosition<Config> at;
  bool special = false;
  int round = 0;
  TileOrigin next = FindTile<Config>(arguments, round);
  while (next.row >= 0) {
    const TileOrigin origin = next;
    const int row0 = origin.row + warp_row;
    ++round;
    const auto meanwhile = [&] {
      PrefetchOperands<Config>(arguments, row0, origin.column);
      next = FindTile<Config>(arguments, round);
      if constexpr (Config::kPlanes == 2) special = HasSpecial<Config>(arguments, origin);
    };
    Accumulator<Config> accumulator;
    if (origin.row + group * 64 >= rows) {
      meanwhile();
      SkipStages<Config>(barriers, special ? 2 * work.stages : work.stages, at);
    } else if constexpr (Config::kPlanes == 2) {
      MultiplyPlanes<Config>(ring, barriers, work.stages, group, accumulator, at, meanwhile);
      if (special) {
        MultiplySpecial<Config>(arguments, ring, barriers, work.stages, group, row0, origin.column,
                                accumulator, at);
      }
    } else {
#define FXFUSE_MULTIPLY(Input, major)                                                        \
  Multiply<Config, Input, Major::major>(ring, barriers, work.stages, group, accumulator, at, \
                                        meanwhile)
      if (arguments.layout_b == LayoutB::kColumns) {
        arguments.half ? FXFUSE_MULTIPLY(__half, kMN) : FXFUSE_MULTIPLY(__nv_bfloat16, kMN);
      } else {
        arguments.half ? FXFUSE_MULTIPLY(__half, kK) : FXFUSE_MULTIPLY(__nv_bfloat16, kK);
      }
#undef FXFUSE_MULTIPLY
    }

    const bool inside = row0 < rows;
    if (arguments.split > 1) {
      if (!ReduceCluster<Config>(arguments, ring, work, inside, accumulator)) continue;
    }
    if (!inside) continue;
    if constexpr (Config::kChainDtype != kNoChain) {
      if (arguments.root_a != nullptr) {
        UndoScaling<Config>(arguments, accumulator, row0, origin.column);
      }
      chain.Run(row0, origin.column, adjacent, accumulator);
    } else {
      Interpret<Config>(arguments, accumulator, row0, origin.column);
    }
  }
}

template <class Config>
__global__ void __launch_bounds__(kHopperThreads, 1)
    HopperGemm(const __grid_constant__ HopperArguments arguments) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ uint8_t shared[];

  // Setup. The ring begins at a multiple of 1024, as the swizzle wants.
  const uint32_t ring = (shared_address(shared) + 1023) & ~1023u;
  const Barriers<Config> barriers{ring + Config::kRingBytes};
  if (threadIdx.x == 0) {
    const bool whole_a = arguments.program.rows >= Config::kM;
    const bool whole_b = arguments.program.columns >= Config::kN;
    prefetch_tensor_map(whole_a ? &arguments.a : &arguments.a_edge);
    prefetch_tensor_map(whole_b ? &arguments.b : &arguments.b_edge);
    for (int s = 0; s < Config::kStages; ++s) {
      barrier_init(barriers.Full(s), 1);
      barrier_init(barriers.Empty(s), 2);
    }
    barrier_init_fence();
  }
  __syncthreads();
  const BlockWork work = DescribeWork(arguments);

  if (threadIdx.x < 128) {
    give_registers<40>();
    const int warp = threadIdx.x / 32;
    const bool needed = Config::kPlanes == 2 || threadIdx.x % 32 == 0;
    if (warp == 0 && needed) Produce(arguments, ring, barriers, work, false);
    if (warp == 1 && needed) Produce(arguments, ring, barriers, work, true);
  } else {
    take_registers<232>();
    Consume(arguments, ring, barriers, work);
  }
#else
  __trap();  // the host chooses this kernel on sm_90 alone
#endif
}

template <class Config>
HopperKernel DescribeHopper(const char* name) {
  return {name,
          reinterpret_cast<const void*>(&HopperGemm<Config>),
          Config::Math::kLevel,
          Config::kPlanes,
          Config::kM,
          Config::kN,
          Config::kChainDtype,
          Config::kSharedBytes};
}

}  // namespace fxfuse

#endif  // FXFUSE_CUDA_HOPPER_GEMM_CUH_
