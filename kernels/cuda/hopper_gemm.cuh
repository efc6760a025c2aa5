// D = epilogue(A @ B^T), A [M, K] and B [N, K] (or [K, N]) of 16 bits, on sm_90a; or, of fp32
// matrices that were split into two fp16 planes each (see fxfuse_cuda_split),
// D = epilogue(lo(A) @ hi(B)^T + hi(A) @ lo(B)^T + hi(A) @ hi(B)^T).
//
// Persistent and warp-specialised: four producer warps keep a ring of stages filled by bulk tensor
// copies, also while two consumer warpgroups, each with 64 rows of the tile, run the epilogue.
// Where there are fewer tiles than SMs, the blocks of a cluster divide K among them, and each adds
// up and finishes some rows of the tile; sums are taken in the order of the blocks. And there are
// tiles of 64 rows, to have more of them: of these each warpgroup takes every other stage. Where
// what the L2 gives is the limit, blocks with tiles side by side each bring half of what these have
// in common, for both.
//
// Where K is short warpgroups take turns with whole tiles (ping-pong), which hides the epilogue.
// Why not always: two tiles of 128 x 256 have no room in registers, and tiles of 128 x 128 move a
// fifth more through shared memory and a third more out of the L2. An H200 at its power limit pays
// for that with its clock: with such a schedule add and relu after 1024 x 8192 -> 8192 in bf16 took
// 273k cycles for 277k, but 0.190 ms for 0.180.
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

#include <type_traits>

#include "hopper_epilogue.cuh"
#include "hopper_mainloop.cuh"
#include "hopper_producer.cuh"

namespace fxfuse {

// By one thread: addresses of barriers that differ from lane to lane would take a loop over lanes.
template <class Config>
__device__ __forceinline__ void InitBarriers(const HopperArguments& arguments,
                                             const Barriers<Config>& barriers) {
  const int readers = arguments.pairs == Pairs::kNone ? Config::kReaders : 2 * Config::kReaders;
#pragma unroll
  for (int s = 0; s < Config::kStages; ++s) {
    barrier_init(barriers.Full(s), 2);
    barrier_init(barriers.Empty(s), readers);
  }
  if constexpr (Config::kPingPong) {
    for (int group = 0; group < 2; ++group) barrier_init(barriers.Turn(group), 1);
  } else if (arguments.split > 1) {
    barrier_init(barriers.Free(), 2 * (arguments.split - 1));
    for (int warp = 0; warp < Config::kRowWarps; ++warp) barrier_init(barriers.Parts(warp), 1);
  }
  barrier_init_fence();
}

// Maps that are there: of a B of fewer than 32 rows there may be that of its tail alone.
template <class Config>
__device__ __forceinline__ void PrefetchMaps(const HopperArguments& arguments) {
  const int columns = static_cast<int>(arguments.program.columns);
  const bool whole_a = arguments.program.rows >= Config::kM;
  prefetch_tensor_map(whole_a ? &arguments.a : &arguments.a_edge);
  if (columns >= 32) prefetch_tensor_map(columns >= Config::kN ? &arguments.b : &arguments.b_edge);
}

template <class Config>
__device__ __forceinline__ void Consume(const HopperArguments& arguments, uint32_t ring,
                                        const Barriers<Config>& barriers, const BlockWork& work,
                                        TileOrigin origin) {
  // Uniform, for then the compiler keeps descriptors in uniform registers.
  const int group = Uniform(static_cast<int>(threadIdx.x) / 128 - 1);
  const int group_row = Config::kSameRows ? 0 : group * 64;
  const int warp_row = group_row + threadIdx.x / 32 % 4 * 16;
  const int rows = static_cast<int>(arguments.program.rows);
  ChainOf<Config> chain(arguments.program);
  const bool adjacent = Interleaved(arguments) || arguments.root_a != nullptr;
  RingPosition<Config> at;
  bool special = false;
  await_turn();
  // Not found ahead of its turn, which would take registers from the chain.
  for (int round = 1; origin.row >= 0; origin = FindTile<Config>(arguments, round++)) {
    const int row0 = origin.row + warp_row;
    const auto meanwhile = [&] {
      PrefetchOperands<Config>(arguments, row0, origin.column);
      if constexpr (Config::kPlanes == 2) special = HasSpecial<Config>(arguments, origin);
    };
    Accumulator<Config> accumulator;
    RingPosition<Config> own = at;
    int stages = work.stages;
    if constexpr (Config::kSameRows) {
      if (group == 1) own.Advance();
      stages = (stages + 1 - group) / 2;
    }
    if (origin.row + group_row >= rows) {
      meanwhile();
      SkipStages<Config>(arguments, barriers, special ? 2 * stages : stages, group, own);
    } else if constexpr (Config::kPlanes == 2) {
      const auto multiply = [&](auto major) {
        MultiplyPlanes<Config, major.value>(arguments, ring, barriers, stages, group, accumulator,
                                            own, meanwhile);
        if (special) {
          MultiplySpecial<Config, major.value>(arguments, ring, barriers, stages, group, row0,
                                               origin.column, accumulator, own);
        }
      };
      if (arguments.layout_b == LayoutB::kColumns) {
        multiply(std::integral_constant<Major, Major::kMN>());
      } else {
        multiply(std::integral_constant<Major, Major::kK>());
      }
    } else {
#define FXFUSE_MULTIPLY(Input, major)                                                          \
  Multiply<Config, Input, Major::major>(arguments, ring, barriers, stages, group, accumulator, \
                                        own, meanwhile, [] {})
      if (arguments.layout_b == LayoutB::kColumns) {
        arguments.half ? FXFUSE_MULTIPLY(__half, kMN) : FXFUSE_MULTIPLY(__nv_bfloat16, kMN);
      } else {
        arguments.half ? FXFUSE_MULTIPLY(__half, kK) : FXFUSE_MULTIPLY(__nv_bfloat16, kK);
      }
#undef FXFUSE_MULTIPLY
    }
    if constexpr (Config::kSameRows) {
      at.Skip(work.stages);
    } else {
      at = own;
    }

    bool inside = row0 < rows;
    if constexpr (Config::kSameRows) {
      AddGroups<Config>(ring + Config::kRingBytes, group, accumulator);
      inside &= group == 0;
    }
    if (arguments.split > 1) {
      if (!ReduceCluster<Config>(arguments, ring, barriers, work, inside, accumulator)) continue;
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

// The same where each warpgroup has every other tile of the block's, of which the ring brings one
// after the other.
template <class Config>
__device__ __forceinline__ void ConsumeInTurns(const HopperArguments& arguments, uint32_t ring,
                                               const Barriers<Config>& barriers,
                                               const BlockWork& work) {
  const int group = Uniform(static_cast<int>(threadIdx.x) / 128 - 1);
  const int warp_row = threadIdx.x / 32 % 4 * 16;
  const int rows = static_cast<int>(arguments.program.rows);
  ChainOf<Config> chain(arguments.program);
  const bool adjacent = Interleaved(arguments) || arguments.root_a != nullptr;
  RingPosition<Config> at;
  if (group == 1) at.Skip(work.stages);
  int round = group;
  TileOrigin origin = FindTile<Config>(arguments, round);
  await_turn();
  for (; origin.row >= 0; origin = FindTile<Config>(arguments, round += 2)) {
    const auto meanwhile = [&] {
      PrefetchOperands<Config>(arguments, origin.row + warp_row, origin.column);
      PrefetchOperands<Config>(arguments, origin.row + 64 + warp_row, origin.column);
    };
    const auto asked = [&] {
      if (threadIdx.x % 128 == 0) barrier_arrive(barriers.Turn(1 - group));
    };
    Accumulator<Config> half[2];
    // The first warpgroup's first turn is at once.
    barrier_wait(barriers.Turn(group), (round / 2 + 1 - group) % 2);
#define FXFUSE_MULTIPLY(Input, major)                                                            \
  Multiply<Config, Input, Major::major>(arguments, ring, barriers, work.stages, group, half, at, \
                                        meanwhile, asked)
    if (arguments.layout_b == LayoutB::kColumns) {
      arguments.half ? FXFUSE_MULTIPLY(__half, kMN) : FXFUSE_MULTIPLY(__nv_bfloat16, kMN);
    } else {
      arguments.half ? FXFUSE_MULTIPLY(__half, kK) : FXFUSE_MULTIPLY(__nv_bfloat16, kK);
    }
#undef FXFUSE_MULTIPLY
    at.Skip(work.stages);

    const int row = origin.row + warp_row;
    if (row >= rows) continue;
    auto& values = reinterpret_cast<typename ChainOf<Config>::Values&>(half);
    if (arguments.root_a != nullptr) {
      UndoScaling<Config>(arguments, values, row, origin.column);
    }
    chain.Run(row, origin.column, adjacent, values);
  }
}

template <class Config>
__global__ void __launch_bounds__(kHopperThreads, 1)
    HopperGemm(const __grid_constant__ HopperArguments arguments) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ uint8_t shared[];
  // Setup. The ring begins at a multiple of 1024, as the swizzle wants.
  const uint32_t ring = (shared_address(shared) + 1023) & ~1023u;
  const Barriers<Config> barriers{ring + Config::kRingBytes + Config::kSumsBytes};
  const int warp = Uniform(static_cast<int>(threadIdx.x) / 32);
  if (warp == 0 && elect_thread()) InitBarriers(arguments, barriers);
  if (warp == 1 && elect_thread()) PrefetchMaps<Config>(arguments);
  const BlockWork work = DescribeWork(arguments);
  const TileOrigin first = FindTile<Config>(arguments, 0);
  __syncthreads();
  if (arguments.pairs != Pairs::kNone || arguments.split > 1) cluster_meet();

  if (warp < 4) {
    give_registers<40>();
    Produce(arguments, ring, barriers, work, first, warp);
  } else {
    take_registers<232>();
    if constexpr (Config::kPingPong) {
      ConsumeInTurns(arguments, ring, barriers, work);
    } else {
      Consume(arguments, ring, barriers, work, first);
    }
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
          Config::kFullOperands,
          Config::kPingPong,
          Config::kSharedBytes};
}

}  // namespace fxfuse

#endif  // FXFUSE_CUDA_HOPPER_GEMM_CUH_
