// The portable GEMM's multiplications: accumulator = A @ B^T of a warp's tile, of matrices as they
// are or of two fp16 planes each.

#ifndef FXFUSE_CUDA_PORTABLE_MAINLOOP_CUH_
#define FXFUSE_CUDA_PORTABLE_MAINLOOP_CUH_

#include "planes.cuh"
#include "portable_loader.cuh"
#include "ptx.cuh"

namespace fxfuse {

// Lane l holds columns 2 * (l % 4) and the next, of rows l / 4 and l / 4 + 8, of each 16 x 8 tile.
template <class Config>
using WarpAccumulator = float[Config::kMmasM][Config::kMmasN][4];

// What a k-step multiplies.
template <class Config>
using FragmentsA = uint32_t[Config::kMmasM][4];
template <class Config>
using FragmentsB = uint32_t[Config::kMmasN / 2][4];  // two adjacent 8-column tiles each

template <class Config>
struct Operands {
  FragmentsA<Config> a;
  FragmentsB<Config> b;
};

// This lane's ldmatrix addresses in a stage, for k-step 0. Stage rows are 128 bytes and stages
// start at multiples of 1024, so a k-step (or the low plane) only changes address bits 5 and 6, and
// the swizzle (chunk ^ row % 8) commutes with changing them by XOR.
template <class Config>
struct LaneAddresses {
  // Lanes 0 to 15 address the rows of a 16-row block's first chunk, 16 to 31 its second (A); B
  // comes as two 8-row blocks, each with both chunks.
  __device__ __forceinline__ LaneAddresses(int warp_row, int warp_column) {
    const int lane = threadIdx.x % 32;
    const int row_a = warp_row + lane % 16;
    const int row_b = warp_column + lane % 8 + lane / 16 * 8;
    a = row_a * kStageRowBytes + ((lane / 16) ^ (lane % 8)) * 16;
    b = Config::kStageBytesA + row_b * kStageRowBytes + ((lane / 8 % 2) ^ (lane % 8)) * 16;
  }

  uint32_t a, b;
};

template <int kCount>
__device__ __forceinline__ void LoadFragments(uint32_t address, uint32_t (&fragments)[kCount][4]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    load_matrix_x4(fragments[i], address + i * 16 * kStageRowBytes);
  }
}

// `a` and `b` are this lane's addresses in the stage.
template <class Config>
__device__ __forceinline__ void LoadOperands(uint32_t a, uint32_t b, int step,
                                             Operands<Config>& operands) {
  LoadFragments(a ^ step * Config::kStepBytes, operands.a);
  LoadFragments(b ^ step * Config::kStepBytes, operands.b);
}

// fp32 fragments to TF32; nothing to do for 16-bit inputs.
template <class Config>
__device__ __forceinline__ void Round(Operands<Config>& operands) {
  if constexpr (sizeof(typename Config::Input) == 4) {
#pragma unroll
    for (int i = 0; i < Config::kMmasM; ++i) {
#pragma unroll
      for (int r = 0; r < 4; ++r) operands.a[i][r] = round_to_tf32(operands.a[i][r]);
    }
#pragma unroll
    for (int j = 0; j < Config::kMmasN / 2; ++j) {
#pragma unroll
      for (int r = 0; r < 4; ++r) operands.b[j][r] = round_to_tf32(operands.b[j][r]);
    }
  }
}

template <class Config>
__device__ __forceinline__ void Multiply(const FragmentsA<Config>& a, const FragmentsB<Config>& b,
                                         WarpAccumulator<Config>& accumulator) {
#pragma unroll
  for (int i = 0; i < Config::kMmasM; ++i) {
#pragma unroll
    for (int jj = 0; jj < Config::kMmasN; ++jj) {
      const int j = i % 2 == 0 ? jj : Config::kMmasN - 1 - jj;  // serpentine: B stays in reach
      mma<typename Config::Input>(accumulator[i][j], a[i], b[j / 2][j % 2 * 2],
                                  b[j / 2][j % 2 * 2 + 1]);
    }
  }
}

// While k-step s is multiplied, s + 1 is read into the other set of fragments, first of all, as
// nothing must delay it; and a third of the stage after next is asked for, in all steps but the
// last.
template <class Config>
__device__ __forceinline__ void MultiplyStages(StageRing<Config>& ring,
                                               const LaneAddresses<Config>& lane, int stages,
                                               WarpAccumulator<Config>& accumulator) {
  constexpr int kSteps = Config::kSteps;
  Operands<Config> operands[2];
  LoadOperands<Config>(ring.read() + lane.a, ring.read() + lane.b, 0, operands[0]);
  Round<Config>(operands[0]);
#pragma unroll 1
  for (int stage = 0; stage < stages; ++stage) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (step == kSteps - 1) ring.Advance();
      LoadOperands<Config>(ring.read() + lane.a, ring.read() + lane.b, (step + 1) % kSteps,
                           operands[(step + 1) % 2]);
      if (step < kSteps - 1) ring.Load(step, kSteps - 1);
      Multiply<Config>(operands[step % 2].a, operands[step % 2].b, accumulator);
      Round<Config>(operands[(step + 1) % 2]);
    }
  }
}

// Three products of two planes each, stage by stage from zero, and promoted (see planes.cuh): what
// is small comes first, so that less is truncated. A stage, and so a part, is no more than 32 of K
// because its high fragments stay in registers until the small products are done; half as much is
// truncated of it as of 64, so every other part is promoted with kRegain. Whatever is read next has
// the time of 16 multiplications of the large tile to arrive.
template <class Config>
__device__ __forceinline__ void MultiplyPlanes(StageRing<Config>& ring,
                                               const LaneAddresses<Config>& lane, int stages,
                                               WarpAccumulator<Config>& sum) {
  static_assert(Config::kSteps == 2, "as the loop below has it");
  constexpr uint32_t kStep = Config::kStepBytes;  // to k-step 1
  constexpr uint32_t kLow = Config::kPlaneBytes;  // to the low plane
  FragmentsA<Config> high_a[2], low_a;
  FragmentsB<Config> high_b[2], low_b;
  uint32_t a = ring.read() + lane.a, b = ring.read() + lane.b;
  LoadFragments(a ^ kLow, low_a);
  LoadFragments(b, high_b[0]);
  LoadFragments(a, high_a[0]);
  LoadFragments(b ^ kLow, low_b);
#pragma unroll 1
  for (int stage = 0; stage < stages; ++stage) {
    WarpAccumulator<Config> part = {};
    const float regain = stage % 2 == 0 ? kRegain : 1.0f;
    LoadFragments(b ^ kStep, high_b[1]);
    LoadFragments(a ^ kStep, high_a[1]);
    Multiply<Config>(low_a, high_b[0], part);
    LoadFragments(a ^ (kStep | kLow), low_a);
    ring.Load(0, 2);
    Multiply<Config>(high_a[0], low_b, part);
    LoadFragments(b ^ (kStep | kLow), low_b);
    ring.Load(1, 2);
    Multiply<Config>(low_a, high_b[1], part);
    ring.Advance();
    a = ring.read() + lane.a, b = ring.read() + lane.b;
    LoadFragments(a ^ kLow, low_a);
    Multiply<Config>(high_a[1], low_b, part);
    LoadFragments(b ^ kLow, low_b);
    Multiply<Config>(high_a[0], high_b[0], part);
    LoadFragments(b, high_b[0]);
    LoadFragments(a, high_a[0]);
    Multiply<Config>(high_a[1], high_b[1], part);
#pragma unroll
    for (int i = 0; i < Config::kMmasM; ++i) {
#pragma unroll
      for (int j = 0; j < Config::kMmasN; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[i][j][e] = fmaf(part[i][j][e], regain, sum[i][j][e]);
      }
    }
  }
}

// Whether a row of A or B in the tile is special, of as many as there are threads: the caller asks
// all of the block.
template <class Config>
__device__ __forceinline__ int IsSpecial(const PortableArguments& arguments, int row0,
                                         int column0) {
  using Tile = typename Config::Tile;
  static_assert(Config::kThreads >= Tile::kM + Tile::kN, "a thread for each row");
  const int i = threadIdx.x;
  const int row = row0 + i, column = column0 + i - Tile::kM;
  if (i < Tile::kM) return row < arguments.m ? arguments.special_a[row] : 0;
  return i < Tile::kM + Tile::kN && column < arguments.n ? arguments.special_b[column] : 0;
}

// Of a tile of two planes each with special rows: multiplies the high planes alone, which gives
// their infinities and NaNs as fp32 would. Planes of low parts hold zeros and either sign. `row0`
// and `column0` are the warp's.
template <class Config>
__device__ __forceinline__ void MultiplySpecial(const PortableArguments& arguments,
                                                StageRing<Config> ring,
                                                const LaneAddresses<Config>& lane, int stages,
                                                int row0, int column0,
                                                WarpAccumulator<Config>& sum) {
  WarpAccumulator<Config> high = {};
#pragma unroll 1
  for (int stage = 0; stage < stages; ++stage) {
    ring.Load(0, 1);
#pragma unroll
    for (int step = 0; step < Config::kSteps; ++step) {
      Operands<Config> operands;
      LoadOperands<Config>(ring.read() + lane.a, ring.read() + lane.b, step, operands);
      Multiply<Config>(operands.a, operands.b, high);
    }
    ring.Advance();
  }
  ring.Leave();
  const int row = row0 + threadIdx.x % 32 / 4;
  const int column = column0 + threadIdx.x % 4 * 2;
#pragma unroll
  for (int j = 0; j < Config::kMmasN; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int n = min(column + j * 8 + e % 2, arguments.n - 1);
      const bool special_column = arguments.special_b[n] != 0;
#pragma unroll
      for (int i = 0; i < Config::kMmasM; ++i) {
        const int m = min(row + i * 16 + e / 2 * 8, arguments.m - 1);
        if (special_column || arguments.special_a[m] != 0) sum[i][j][e] = high[i][j][e];
      }
    }
  }
}

}  // namespace fxfuse

#endif  // FXFUSE_CUDA_PORTABLE_MAINLOOP_CUH_
