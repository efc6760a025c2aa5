// The Hopper GEMM's mainloops: a warpgroup's multiply-adds over the stages of a tile.

#ifndef FXFUSE_CUDA_HOPPER_MAINLOOP_CUH_
#define FXFUSE_CUDA_HOPPER_MAINLOOP_CUH_

#include "chain.cuh"
#include "hopper_config.cuh"
#include "planes.cuh"

namespace fxfuse {

constexpr int kRowUnits = kRowBytes / 16;

// Issues this warpgroup's multiply-adds of one stage, of one plane of each matrix.
template <class Config, class Input, Major kMajorB>
__device__ __forceinline__ void MultiplyStage(Accumulator<Config>& accumulator, uint32_t stage,
                                              int group, int accumulate) {
  const int row = Config::kSameRows ? 0 : group * 64;
  const uint64_t a = describe<Major::kK>(stage + row * kRowUnits);
  const uint64_t b = describe<kMajorB>(stage + Config::kPlanes * Config::kBytesA / 16);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < Config::kSteps; ++step) {
    Wgmma<Input, kMajorB>::Multiply(accumulator, a + step * kDescriptorStep<Major::kK>,
                                    b + step * kDescriptorStep<kMajorB>, step > 0 || accumulate);
  }
  wgmma_commit();
}

// The same for all 128 rows of a tile, 64 in each of `half`; `group` is moot.
template <class Config, class Input, Major kMajorB>
__device__ __forceinline__ void MultiplyStage(Accumulator<Config> (&half)[2], uint32_t stage, int,
                                              int accumulate) {
  const uint64_t upper = describe<Major::kK>(stage);
  const uint64_t lower = describe<Major::kK>(stage + 64 * kRowUnits);
  const uint64_t b = describe<kMajorB>(stage + Config::kBytesA / 16);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < Config::kSteps; ++step) {
    const uint64_t offset_a = step * kDescriptorStep<Major::kK>;
    const uint64_t part_b = b + step * kDescriptorStep<kMajorB>;
    Wgmma<Input, kMajorB>::Multiply(half[0], upper + offset_a, part_b, step > 0 || accumulate);
    Wgmma<Input, kMajorB>::Multiply(half[1], lower + offset_a, part_b, step > 0 || accumulate);
  }
  wgmma_commit();
}

// Of two planes each, from zero. What is small comes first, so that less is truncated.
template <class Config, Major kMajorB>
__device__ __forceinline__ void MultiplyStagePlanes(Accumulator<Config>& part, uint32_t stage,
                                                    int group) {
  using Product = Wgmma<__half, kMajorB>;
  constexpr uint64_t kStepA = kDescriptorStep<Major::kK>, kStepB = kDescriptorStep<kMajorB>;
  const uint64_t hi_a = describe<Major::kK>(stage + group * 64 * kRowUnits);
  const uint64_t lo_a = hi_a + Config::kBytesA / 16;
  const uint64_t hi_b = describe<kMajorB>(stage + 2 * Config::kBytesA / 16);
  const uint64_t lo_b = hi_b + Config::kBytesB / 16;
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < Config::kSteps; ++step) {
    Product::Multiply(part, lo_a + step * kStepA, hi_b + step * kStepB, step > 0);
    Product::Multiply(part, hi_a + step * kStepA, lo_b + step * kStepB, 1);
  }
#pragma unroll
  for (int step = 0; step < Config::kSteps; ++step) {
    Product::Multiply(part, hi_a + step * kStepA, hi_b + step * kStepB, 1);
  }
  wgmma_commit();
}

// Where a slot begins, in units of 16 bytes. Uniform, for then the compiler makes the descriptors
// in uniform registers: some 40 instructions less in a stage, between multiply-adds.
template <class Config>
__device__ __forceinline__ uint32_t SlotUnits(uint32_t ring, int slot) {
  const uint32_t inside = ring & 0x3ffff;  // what is above says which block of the cluster
  return Uniform(inside / 16 + slot * (Config::kStageBytes / 16));
}

// Tells the producers that this warpgroup is done with a slot.
template <class Config>
__device__ __forceinline__ void ReleaseStage(const HopperArguments& arguments,
                                             const Barriers<Config>& barriers, int slot) {
  const bool tells = threadIdx.x % 128 == 0;
  barrier_arrive(barriers.Empty(slot), tells);
  if (arguments.pairs == Pairs::kNone) return;
  barrier_arrive_remote(remote_address(barriers.Empty(slot), Partner(arguments)), tells);
}

// One batch of multiply-adds is always queued behind the one that runs. `meanwhile` is called when
// there is something for the tensor cores to do, `asked` when all that there will be is queued.
// sums: the accumulator of this warpgroup's rows, or both of a tile that is its own. stages: of
// this warpgroup; none where it is the second for the only one.
template <class Config, class Input, Major kMajorB, class Sums, class Meanwhile, class Asked>
__device__ __forceinline__ void Multiply(const HopperArguments& arguments, uint32_t ring,
                                         const Barriers<Config>& barriers, int stages, int group,
                                         Sums& sums, RingPosition<Config>& at,
                                         const Meanwhile& meanwhile, const Asked& asked) {
  if constexpr (Config::kSameRows) {
    if (stages == 0) {
#pragma unroll
      for (float& sum : sums) sum = 0.0f;
      return meanwhile();
    }
  }
  const uint32_t first = SlotUnits<Config>(ring, at.slot);
  barrier_wait(barriers.Full(at.slot), at.parity);
  MultiplyStage<Config, Input, kMajorB>(sums, first, group, 0);
  int previous = at.slot;
  at.AdvanceToOwn();
  meanwhile();
#pragma unroll 1
  for (int stage = 1; stage < stages; ++stage) {
    const uint32_t next = SlotUnits<Config>(ring, at.slot);
    barrier_wait(barriers.Full(at.slot), at.parity);
    MultiplyStage<Config, Input, kMajorB>(sums, next, group, 1);
    wgmma_wait<1>();
    ReleaseStage(arguments, barriers, previous);
    previous = at.slot;
    at.AdvanceToOwn();
  }
  asked();
  wgmma_wait<0>();
  ReleaseStage(arguments, barriers, previous);
}

// Of two planes each. The other warpgroup's multiply-adds run while this one promotes its own.
template <class Config, Major kMajorB, class Meanwhile>
__device__ __forceinline__ void MultiplyPlanes(const HopperArguments& arguments, uint32_t ring,
                                               const Barriers<Config>& barriers, int stages,
                                               int group, Accumulator<Config>& sum,
                                               RingPosition<Config>& at,
                                               const Meanwhile& meanwhile) {
#pragma unroll
  for (int i = 0; i < Config::kN / 2; ++i) sum[i] = 0.0f;
#pragma unroll 1
  for (int stage = 0; stage < stages; ++stage) {
    Accumulator<Config> part;
    const uint32_t next = SlotUnits<Config>(ring, at.slot);
    barrier_wait(barriers.Full(at.slot), at.parity);
    MultiplyStagePlanes<Config, kMajorB>(part, next, group);
    if (stage == 0) meanwhile();
    wgmma_wait<0>();
    ReleaseStage(arguments, barriers, at.slot);
    at.Advance();
#pragma unroll
    for (int i = 0; i < Config::kN / 2; ++i) sum[i] = fmaf(part[i], kRegain, sum[i]);
  }
}

// Passes over as many of this warpgroup's stages: all of its rows lie below the matrix. One thread
// does, for what keeps the others together elsewhere is that they multiply together: a warp left
// behind would take a later pass through the ring for the one it waits for.
template <class Config>
__device__ __forceinline__ void SkipStages(const HopperArguments& arguments,
                                           const Barriers<Config>& barriers, int stages, int group,
                                           RingPosition<Config>& at) {
  for (int stage = 0; stage < stages; ++stage) {
    if (threadIdx.x % 128 == 0) barrier_wait(barriers.Full(at.slot), at.parity);
    ReleaseStage(arguments, barriers, at.slot);
    at.AdvanceToOwn();
  }
  __syncwarp();
  barrier_sync<128>(group == 0 ? kSkipped : kSkipped + 1);
}

// Of a tile of two planes each with special rows: multiplies the high planes alone, which gives
// their infinities and NaNs as fp32 would. Planes of low parts hold zeros and either sign.
template <class Config, Major kMajorB>
__device__ __forceinline__ void MultiplySpecial(const HopperArguments& arguments, uint32_t ring,
                                                const Barriers<Config>& barriers, int stages,
                                                int group, int row0, int column0,
                                                Accumulator<Config>& sum,
                                                RingPosition<Config>& at) {
  Accumulator<Config> high;
  Multiply<Config, __half, kMajorB>(
      arguments, ring, barriers, stages, group, high, at, [] {}, [] {});
  const int rows = static_cast<int>(arguments.program.rows);
  const int columns = static_cast<int>(arguments.program.columns);
  const int row = row0 + threadIdx.x % 32 / 4;
  // Of a B [K, N] no column is special, but, where a row is, every row of A.
  const bool columns_matter = kMajorB == Major::kK;
  const int column = column0 + threadIdx.x % 4 * 8;
  const bool special_row[] = {__ldg(arguments.special_a + min(row, rows - 1)) != 0,
                              __ldg(arguments.special_a + min(row + 8, rows - 1)) != 0};
#pragma unroll
  for (int i = 0; i < Config::kN / 4; ++i) {
    const int n = min(column + i / 8 * 32 + i % 8, columns - 1);
    const bool special_column = columns_matter && __ldg(arguments.special_b + n) != 0;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int v = AccumulatorIndex(i / 8, h, i % 8);
      if (special_row[h] || special_column) sum[v] = high[v];
    }
  }
}

}  // namespace fxfuse

#endif  // FXFUSE_CUDA_HOPPER_MAINLOOP_CUH_
