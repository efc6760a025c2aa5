// What the phases of the Hopper GEMM share (see hopper_gemm.cuh): the shape of a kernel, the ring
// of stages and its barriers, and which tile and part of K are a block's.

#ifndef FXFUSE_CUDA_HOPPER_CONFIG_CUH_
#define FXFUSE_CUDA_HOPPER_CONFIG_CUH_

#include "fragment.cuh"
#include "hopper_kernels.h"
#include "ptx_hopper.cuh"

namespace fxfuse {

// The block's barriers, by what they wait for. 0 is __syncthreads's.
enum BlockBarrier {
  kSums = 1,     // both warpgroups' sums
  kSkipped = 2,  // and 3: a warpgroup has passed over its stages
};

constexpr int kRowBytes = 128;  // of a stage's rows: 64 elements of K, one swizzle row

// A value of lane 0, which the compiler then knows to be uniform.
template <class T>
__device__ __forceinline__ T Uniform(T value) {
  return __shfl_sync(~0u, value, 0);
}

template <class Math_, int kChainDtype_, int kPlanes_, int kN_, int kStages_,
          bool kFullOperands_ = true, bool kPingPong_ = false, int kM_ = 128>
struct HopperConfig {
  using Math = Math_;
  static constexpr int kChainDtype = kChainDtype_;       // serves chains of it alone; or kNoChain
  static constexpr bool kFullOperands = kFullOperands_;  // of chains: may have rows of their own
  static constexpr int kPlanes = kPlanes_;  // of each matrix: 1, or 2 for three products
  static constexpr int kM = kM_, kN = kN_, kStages = kStages_;
  // Each warpgroup takes whole tiles, in turns, and its epilogue runs under the other's mainloop.
  static constexpr bool kPingPong = kPingPong_;
  // Both take all 64 rows of every tile and every other stage. Else, 64 of its 128 rows.
  static constexpr bool kSameRows = kM == 64;
  static constexpr int kReaders = kPingPong || kSameRows ? 1 : 2;  // warpgroups that read a stage

  static constexpr int kStageK = kRowBytes / 2;  // elements of K in a stage
  // A stage holds the planes of A and then those of B.
  static constexpr int kBytesA = kM * kRowBytes, kBytesB = kN * kRowBytes;  // of a plane
  static constexpr int kStageBytes = kPlanes * (kBytesA + kBytesB);
  static constexpr int kRingBytes = kStages * kStageBytes;
  static constexpr int kSteps = kStageK / 16;
  static constexpr int kRowWarps = kM / 16;  // that finish rows
  static constexpr int kBarriers = 2 * kStages + (kPingPong ? 2 : 1 + kRowWarps);
  static constexpr int kSumsBytes = kSameRows ? kM * kN * 4 : 0;  // of the second warpgroup
  static constexpr int kSharedBytes = 1024 + kRingBytes + kSumsBytes + 8 * kBarriers;

  // Interpreter takes the accumulators 64 columns at a time.
  static constexpr int kPartColumns = 64;
  static constexpr int kParts = kN / kPartColumns;
  using Fragment = RowFragment<8, 2, 2, 32>;

  static_assert(kN == 64 || kN == 128 || kN == 256, "there is a wgmma for it");
  static_assert(kM == 128 || (kM == 64 && kPlanes == 1 && !kPingPong), "as Consume wants");
  static_assert(!kSameRows || kStages % 2 == 0, "a slot is one warpgroup's for all of a tile");
  static_assert((kPlanes == 1 && !kPingPong) || kN <= 128,
                "two sets of accumulators fit the registers");
  static_assert(!kPingPong || (kPlanes == 1 && kChainDtype != kNoChain), "as ConsumeInTurns wants");
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
  // Stage s has been filled, with A and with B.
  __device__ __forceinline__ uint32_t Full(int s) const { return base + 8 * s; }
  // Stage s has been read by all its readers, those of the other block of a pair included: what one
  // of them brings goes to both.
  __device__ __forceinline__ uint32_t Empty(int s) const {
    return base + 8 * (Config::kStages + s);
  }
  // It is the turn of a warpgroup: the other has asked for all of its tile's multiply-adds. A
  // barrier of a stage tells passes through the ring apart by their parity alone, so nobody may
  // wait for a pass beyond the next.
  __device__ __forceinline__ uint32_t Turn(int group) const {
    return base + 8 * (2 * Config::kStages + group);
  }
  // Where K is divided: all other blocks that do have read their stages to the end; a warp
  // has got all parts of its rows' sums.
  __device__ __forceinline__ uint32_t Free() const { return base + 8 * (2 * Config::kStages); }
  __device__ __forceinline__ uint32_t Parts(int warp) const { return Free() + 8 * (1 + warp); }
};

// A place in the ring, and how often the ring has been round.
template <class Config>
struct RingPosition {
  int slot = 0;
  uint32_t parity = 0;
  // Fewer stages than the ring has.
  __device__ __forceinline__ void Advance(int stages = 1) {
    slot += stages;
    if (slot >= Config::kStages) {
      slot -= Config::kStages;
      parity ^= 1;
    }
  }
  // To the next of a warpgroup's stages.
  __device__ __forceinline__ void AdvanceToOwn() { Advance(Config::kSameRows ? 2 : 1); }
  __device__ __forceinline__ void Skip(int stages) {
    const int to = slot + stages;
    parity ^= to / Config::kStages & 1;
    slot = to % Config::kStages;
  }
};

// This block's part of K.
struct BlockWork {
  int rank;  // among those that divide K of its tile
  int first_stage, stages;
};

// The cluster's first block of those that divide K of this block's tile: pairs have two such sets.
__device__ __forceinline__ int FirstRank(const HopperArguments& arguments) {
  return static_cast<int>(cluster_rank()) & arguments.split;
}

// The block of the cluster that has the same part of K of the other tile of a pair.
__device__ __forceinline__ int Partner(const HopperArguments& arguments) {
  return static_cast<int>(cluster_rank()) ^ arguments.split;
}

__device__ __forceinline__ BlockWork DescribeWork(const HopperArguments& arguments) {
  const int split = arguments.split;
  if (split == 1) return {0, 0, arguments.stages};
  const int rank = static_cast<int>(cluster_rank()) & (split - 1);
  const int halvings = __ffs(split) - 1;
  const int first = arguments.stages * rank >> halvings;
  return {rank, first, (arguments.stages * (rank + 1) >> halvings) - first};
}

// n / d, for n below 2^24: half the instructions of a division.
__device__ __forceinline__ int Quotient(int n, int d) {
  const int quotient = static_cast<int>(__fdividef(static_cast<float>(n), static_cast<float>(d)));
  const int rest = n - quotient * d;  // off by one at most
  return quotient + (rest >= d ? 1 : 0) - (rest < 0 ? 1 : 0);
}

// Where a tile begins; at row -1 if there is no such tile.
struct TileOrigin {
  int row, column;
};

// The `round`-th tile of this block. Clusters take tiles, or pairs of them, in turns. Groups of 8
// tile rows are walked column by column, so that the blocks running at one time share few rows of A
// and B in L2. Of a pair the second may lie outside the matrix.
//
// Everything is asked of the hardware anew, so that nothing is kept in registers from tile to tile.
template <class Config>
__device__ __forceinline__ TileOrigin FindTile(const HopperArguments& arguments, int round) {
  const int index = cluster_index() + round * cluster_count();
  if (index >= arguments.tiles_m * arguments.tiles_n) return {-1, 0};
  const int most = arguments.pairs == Pairs::kShareB ? 4 : 8;
  const int per_group = most * arguments.tiles_n;
  const int group = Quotient(index, per_group);
  const int in_group = index - group * per_group;
  const int rows = min(most, arguments.tiles_m - group * most);
  int tile_n = Quotient(in_group, rows);
  int tile_m = group * most + in_group - tile_n * rows;
  const int second = FirstRank(arguments) != 0 ? 1 : 0;
  if (arguments.pairs == Pairs::kShareA) tile_n = 2 * tile_n + second;
  if (arguments.pairs == Pairs::kShareB) tile_m = 2 * tile_m + second;
  return {tile_m * Config::kM, tile_n * Config::kN};
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
    if (arguments.special_b != nullptr && row < static_cast<int>(arguments.program.columns)) {
      special |= __ldg(arguments.special_b + row);
    }
  }
  return __any_sync(~0u, special);
}

}  // namespace fxfuse

#endif  // FXFUSE_CUDA_HOPPER_CONFIG_CUH_
