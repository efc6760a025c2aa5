// D = epilogue(A @ B^T + bias), A [M, K], B [N, K], both with adjacent K, on sm_90a.
//
// Persistent and warp-specialised: one producer thread keeps a ring of stages filled by bulk tensor
// copies, also while two consumer warpgroups, each with 64 rows of the tile, run the epilogue. In a
// cluster two blocks work on tiles one above the other; each fetches half of their common rows of B
// and sends it to both. No kernel is built with a cluster at present: on an H200 it was no faster
// at any shape tried (0.201 ms against 0.198 for 1024 x 8192 -> 8192, bf16).
//
// Why not one tile for each warpgroup, in turns, which would hide the epilogue: at full rate the
// tensor cores of an SM take 64 x 256 x 16 multiply-adds in 128 cycles, for which they read 2 KB of
// A and 8 KB of B out of shared memory, 80 of its 128 bytes a cycle. What the copies write comes on
// top: 48 KB for 128 x 256 x 64, 48 bytes a cycle, together just what there is; 32 KB for
// 128 x 128 x 64, 64 bytes a cycle, is a quarter more than there is.
//
// Phases: setup, producer, consumer (mainloop, epilogue, store).

#ifndef FXFUSE_CUDA_HOPPER_GEMM_CUH_
#define FXFUSE_CUDA_HOPPER_GEMM_CUH_

#include <type_traits>

#include "hopper_kernels.h"
#include "interpreter.cuh"
#include "ptx_hopper.cuh"
#include "slab.cuh"

namespace fxfuse {

template <class Input_, class Math_, int kN_, int kStages_, int kCluster_>
struct HopperConfig {
  using Input = Input_;
  using Math = Math_;
  static constexpr int kM = 128, kN = kN_, kStages = kStages_, kCluster = kCluster_;

  static constexpr int kStageK = 64;  // elements of K in a stage: 128 bytes, one swizzle row
  static constexpr int kRowBytes = 128;
  static constexpr int kBytesA = kM * kRowBytes;
  static constexpr int kStageBytes = kBytesA + kN * kRowBytes;
  static constexpr int kRingBytes = kStages * kStageBytes;
  static constexpr int kSteps = kStageK / 16;

  // The accumulator passes through shared memory, 16 rows by 64 columns for each warp at a time, so
  // that the program sees adjacent columns.
  // More values at a time would not fit into registers beside the accumulators that still wait.
  using Slab = SlabShape<64, (kN < 256 ? 4 : 2)>;
  static constexpr int kSlabs = kN / Slab::kColumns;  // of a warp, one after the other
  static constexpr int kSlabBytes = Slab::kFloats * static_cast<int>(sizeof(float));
  static constexpr int kWarps = 8;

  static constexpr int kBarrierOffset = kRingBytes + kWarps * kSlabBytes;
  static constexpr int kSharedBytes = 1024 + kBarrierOffset + 16 * kStages;

  static_assert(kN == 64 || kN == 128 || kN == 256, "there is a wgmma for it");
  static_assert(kN / kCluster % 8 == 0, "a swizzle period of eight rows is never divided");
  static_assert(sizeof(Input) == 2, "a step of 32 bytes is 16 elements");
  static_assert(kSharedBytes <= 227 * 1024, "what a block may have on sm_90");
};

// Addresses of the barriers in shared memory.
template <class Config>
struct Barriers {
  uint32_t base;
  // Stage s has been filled.
  __device__ __forceinline__ uint32_t Full(int s) const { return base + 8 * s; }
  // Stage s has been read by both warpgroups of all blocks in the cluster.
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

// Tile coordinates of the block's cluster. Groups of 8 cluster rows are walked column by column, so
// that the blocks running at one time share few rows of A and B in L2.
__device__ __forceinline__ void RasterCluster(const HopperArguments& arguments, int index,
                                              int* tile_m, int* tile_n) {
  constexpr int kGroup = 8;
  const int per_group = kGroup * arguments.tiles_n;
  const int group = index / per_group;
  const int in_group = index - group * per_group;
  const int rows = min(kGroup, arguments.tiles_m - group * kGroup);
  *tile_n = in_group / rows;
  *tile_m = group * kGroup + in_group - *tile_n * rows;
}

// The tiles of this block's cluster: every `step`-th from `first` on.
struct TileRange {
  int first, step, end;
};

template <class Config>
__device__ __forceinline__ void Produce(const HopperArguments& arguments, uint32_t ring,
                                        const Barriers<Config>& barriers, const TileRange& tiles,
                                        uint32_t rank) {
  constexpr int kShareB = Config::kN / Config::kCluster;
  RingPosition<Config> at;
  for (int tile = tiles.first; tile < tiles.end; tile += tiles.step) {
    int tile_m, tile_n;
    RasterCluster(arguments, tile, &tile_m, &tile_n);
    const int row_a = (tile_m * Config::kCluster + static_cast<int>(rank)) * Config::kM;
    const int row_b = tile_n * Config::kN + static_cast<int>(rank) * kShareB;
    for (int stage = 0; stage < arguments.stages; ++stage) {
      barrier_wait(barriers.Empty(at.slot), at.parity ^ 1);
      const uint32_t full = barriers.Full(at.slot);
      const uint32_t to = ring + at.slot * Config::kStageBytes;
      const int k = stage * Config::kStageK;
      barrier_arrive_expect(full, Config::kStageBytes);
      copy_box(to, &arguments.a, full, k, row_a);
      const uint32_t to_b = to + Config::kBytesA + rank * kShareB * Config::kRowBytes;
      if constexpr (Config::kCluster == 1) {
        copy_box(to_b, &arguments.b, full, k, row_b);
      } else {
        copy_box_multicast(to_b, &arguments.b, full, k, row_b, (1 << Config::kCluster) - 1);
      }
      at.Advance();
    }
  }
}

template <class Config>
using Accumulator = float[Config::kN / 2];

// Issues this warpgroup's multiply-adds of one stage.
template <class Config>
__device__ __forceinline__ void MultiplyStage(Accumulator<Config>& accumulator, uint32_t stage,
                                              int group, int accumulate) {
  const uint64_t a = describe_rows(stage + group * 64 * Config::kRowBytes);
  const uint64_t b = describe_rows(stage + Config::kBytesA);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < Config::kSteps; ++step) {
    Wgmma<typename Config::Input>::Multiply(accumulator, a + step * kDescriptorStep,
                                            b + step * kDescriptorStep, step > 0 || accumulate);
  }
  wgmma_commit();
}

// Starts the accumulator with the bias, and returns whether there is one to start with. Lane l
// holds columns 2 * (l % 4) and the next of every eight, of two rows.
template <class Config>
__device__ __forceinline__ bool LoadBias(const HopperArguments& arguments, int column0,
                                         Accumulator<Config>& accumulator) {
  if (arguments.bias == nullptr) return false;
  const int columns = static_cast<int>(arguments.program.columns);
  const int column = column0 + threadIdx.x % 4 * 2;
#pragma unroll
  for (int j = 0; j < Config::kN / 8; ++j) {
    uint32_t pair = 0;
    if (column + 8 * j < columns) {  // columns are even, so the next one exists as well
      pair = __ldg(reinterpret_cast<const uint32_t*>(arguments.bias) + (column + 8 * j) / 2);
    }
    constexpr bool kHalf = std::is_same<typename Config::Input, __half>::value;
    const float2 values = kHalf ? UnpackF16(pair) : UnpackBf16(pair);
    accumulator[4 * j] = accumulator[4 * j + 2] = values.x;
    accumulator[4 * j + 1] = accumulator[4 * j + 3] = values.y;
  }
  return true;
}

// Tells every producer that fills slot `slot` here that this warpgroup is done with it.
template <class Config>
__device__ __forceinline__ void ReleaseStage(const Barriers<Config>& barriers, int slot) {
  const int thread = threadIdx.x % 128;
  if constexpr (Config::kCluster == 1) {
    if (thread == 0) barrier_arrive(barriers.Empty(slot));
  } else {
    if (thread % 32 == 0 && thread / 32 < Config::kCluster) {
      barrier_arrive_at(barriers.Empty(slot), thread / 32);
    }
  }
}

// Runs the program over this warp's 16 rows of the tile, one slab at a time, and stores.
template <class Config>
__device__ __forceinline__ void RunEpilogue(const HopperArguments& arguments,
                                            const Accumulator<Config>& accumulator, float* slab,
                                            int row, int column0) {
  const DeviceProgram& program = arguments.program;
  using Slab = typename Config::Slab;
  const int lane = threadIdx.x % 32;
  if (row >= static_cast<int>(program.rows)) return;
  // One copy of the interpreter serves all slabs; which accumulators a slab takes is a uniform
  // branch, for registers cannot be indexed.
#pragma unroll 1
  for (int part = 0; part < Config::kSlabs; ++part) {
    const int column = column0 + part * Slab::kColumns;
    if (column >= static_cast<int>(program.columns)) return;
    __syncwarp();  // the slab before has been read
#pragma unroll
    for (int i = 0; i < Config::kSlabs; ++i) {
      if (i != part) continue;
      // Lane l holds columns 2 * (l % 4) and the next, of rows l / 4 and l / 4 + 8, of every eight.
#pragma unroll
      for (int j = 0; j < Slab::kColumns / 8; ++j) {
        const float* d = &accumulator[i * (Slab::kColumns / 2) + 4 * j];
        const int chunk = 2 * j + lane % 4 / 2;
        float* const upper = slab + Slab::Offset(lane / 4, chunk) + lane % 2 * 2;
        *reinterpret_cast<float2*>(upper) = make_float2(d[0], d[1]);
        *reinterpret_cast<float2*>(upper + 8 * Slab::kColumns) = make_float2(d[2], d[3]);
      }
    }
    __syncwarp();
#pragma unroll 1
    for (int turn = 0; turn < Slab::kTurns; ++turn) {
      float values[Slab::Fragment::kSize];
      const typename Slab::Fragment at = Slab::Read(slab, turn, row, column, values);
      Interpreter<typename Slab::Fragment, typename Config::Math>::Run(program, at, values,
                                                                       arguments.first);
    }
  }
}

template <class Config>
__device__ __forceinline__ void Consume(const HopperArguments& arguments, uint32_t ring,
                                        const Barriers<Config>& barriers, float* slabs,
                                        const TileRange& tiles, uint32_t rank) {
  const int group = threadIdx.x / 128 - 1;
  const int warp = threadIdx.x / 32 - 4;  // 0 to 7
  float* const slab = slabs + warp * Config::Slab::kFloats;
  RingPosition<Config> at;
  for (int tile = tiles.first; tile < tiles.end; tile += tiles.step) {
    int tile_m, tile_n;
    RasterCluster(arguments, tile, &tile_m, &tile_n);

    // Mainloop. One batch of multiply-adds is always queued behind the one that runs.
    Accumulator<Config> accumulator;
    const bool biased = LoadBias<Config>(arguments, tile_n * Config::kN, accumulator);
    barrier_wait(barriers.Full(at.slot), at.parity);
    MultiplyStage<Config>(accumulator, ring + at.slot * Config::kStageBytes, group, biased);
    int previous = at.slot;
    at.Advance();
#pragma unroll 1
    for (int stage = 1; stage < arguments.stages; ++stage) {
      barrier_wait(barriers.Full(at.slot), at.parity);
      MultiplyStage<Config>(accumulator, ring + at.slot * Config::kStageBytes, group, 1);
      wgmma_wait<1>();
      ReleaseStage(barriers, previous);
      previous = at.slot;
      at.Advance();
    }
    wgmma_wait<0>();

    ReleaseStage(barriers, previous);

    // Epilogue and store.
    const int row = (tile_m * Config::kCluster + static_cast<int>(rank)) * Config::kM + warp * 16;
    RunEpilogue<Config>(arguments, accumulator, slab, row, tile_n * Config::kN);
  }
}

template <class Config>
__global__ void __launch_bounds__(kHopperThreads, 1)
    HopperGemm(const __grid_constant__ HopperArguments arguments) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ uint8_t shared[];

  // Setup. The ring begins at a multiple of 1024, as the swizzle wants.
  const uint32_t start = shared_address(shared);
  const uint32_t ring = (start + 1023) & ~1023u;
  const Barriers<Config> barriers{ring + Config::kBarrierOffset};
  const uint32_t rank = Config::kCluster == 1 ? 0 : cluster_rank();
  if (threadIdx.x == 0) {
    prefetch_tensor_map(&arguments.a);
    prefetch_tensor_map(&arguments.b);
    for (int s = 0; s < Config::kStages; ++s) {
      barrier_init(barriers.Full(s), 1);
      barrier_init(barriers.Empty(s), 2 * Config::kCluster);
    }
    barrier_init_fence();
  }
  if constexpr (Config::kCluster == 1) {
    __syncthreads();
  } else {
    cluster_sync();
  }
  const TileRange tiles{static_cast<int>(blockIdx.x) / Config::kCluster,
                        static_cast<int>(gridDim.x) / Config::kCluster,
                        arguments.tiles_m * arguments.tiles_n};

  if (threadIdx.x < 128) {
    give_registers<40>();
    if (threadIdx.x == 0) Produce(arguments, ring, barriers, tiles, rank);
  } else {
    take_registers<232>();
    uint8_t* const slabs = shared + (ring - start) + Config::kRingBytes;
    Consume(arguments, ring, barriers, reinterpret_cast<float*>(slabs), tiles, rank);
  }
  // A block's memory must outlive what the other one sends to it.
  if constexpr (Config::kCluster > 1) cluster_sync();
#else
  __trap();  // the host chooses this kernel on sm_90 alone
#endif
}

template <class Config>
HopperKernel DescribeHopper(const char* name, int32_t dtype, MathLevel math) {
  return {name,
          reinterpret_cast<const void*>(&HopperGemm<Config>),
          dtype,
          math,
          Config::kM,
          Config::kN,
          Config::kCluster,
          Config::kSharedBytes};
}

}  // namespace fxfuse

#endif  // FXFUSE_CUDA_HOPPER_GEMM_CUH_
