// D = epilogue(A @ B^T + bias), A [M, K], B [N, K], both with adjacent K; or, of fp32 matrices that
// were split into two fp16 planes each (see fxfuse_cuda_split),
// D = epilogue(lo(A) @ hi(B)^T + hi(A) @ lo(B)^T + hi(A) @ hi(B)^T + bias).
//
// mma.sync with fp32 accumulation, fed by a ring of cp.async stages; sm_80 and up. One block
// computes one tile. Phases: setup, loads, mainloop, epilogue (staging, program, store).

#ifndef FXFUSE_CUDA_PORTABLE_GEMM_CUH_
#define FXFUSE_CUDA_PORTABLE_GEMM_CUH_

#include "fragment.cuh"
#include "interpreter.cuh"
#include "planes.cuh"
#include "portable_kernels.h"
#include "portable_loader.cuh"
#include "portable_mainloop.cuh"
#include "portable_tiles.h"

namespace fxfuse {

// `Input` is __nv_bfloat16, __half or float (multiplied as TF32), `Tile` a shape of
// portable_tiles.h, `Math` a policy of math_device.cuh, `kPlanes` 2 for three products of planes.
template <class Input_, class Tile_, class Math_, int kVectorWidth, int kPlanes_ = 1>
struct PortableConfig {
  using Input = Input_;
  using Tile = Tile_;
  using Math = Math_;
  static constexpr int kPlanes = kPlanes_;

  static constexpr int kWarpsM = Tile::kM / Tile::kWarpM;
  static constexpr int kWarpsN = Tile::kN / Tile::kWarpN;
  static constexpr int kThreads = kWarpsM * kWarpsN * 32;

  static constexpr int kStageBytesA = Tile::kM * kStageRowBytes;
  static constexpr int kStageBytes = kStageBytesA + Tile::kN * kStageRowBytes;
  static constexpr int kPlaneBytes = kStageRowBytes / kPlanes;  // of a stage row
  static constexpr int kStageK = kPlaneBytes / sizeof(Input);   // elements of K in a stage
  static constexpr int kStepBytes = 32;
  static constexpr int kSteps = kPlaneBytes / kStepBytes;

  static constexpr int kMmasM = Tile::kWarpM / 16;
  static constexpr int kMmasN = Tile::kWarpN / 8;

  // The accumulator passes through shared memory, so that the program sees rows of adjacent
  // columns. Eight floats of padding put the four rows a half-warp writes into different banks.
  static constexpr int kStagingPitch = Tile::kWarpN + 8;
  static constexpr int kStagingBytes = Tile::kWarpM * kStagingPitch * 4;  // of one warp

  static constexpr int kRingBytes = Tile::kStages * kStageBytes;
  static constexpr int kEpilogueBytes = kWarpsM * kWarpsN * kStagingBytes;
  static constexpr int kSharedBytes = kRingBytes > kEpilogueBytes ? kRingBytes : kEpilogueBytes;

  // The fragment the program runs over: up to 32 values of a thread.
  static constexpr int kLanesPerRow = Tile::kWarpN / kVectorWidth;
  static constexpr int kRowsPerWarp = 32 / kLanesPerRow;
  static constexpr int kValuesPerLane = Tile::kWarpM * Tile::kWarpN / 32;
  using Fragment =
      RowFragment<kVectorWidth, (kValuesPerLane < 32 ? kValuesPerLane : 32) / kVectorWidth>;
  static constexpr int kRowsPerFragment = kRowsPerWarp * Fragment::kGroups;

  static_assert(Tile::kM % Tile::kWarpM == 0 && Tile::kN % Tile::kWarpN == 0, "whole warp tiles");
  static_assert(Tile::kWarpM % 16 == 0 && Tile::kWarpN % 16 == 0,
                "one ldmatrix.x4 brings 16 rows of A, or 16 columns of B");
  static_assert(Tile::kStages >= 3, "a stage is read, one is awaited, one is being filled");
  static_assert(kSharedBytes <= 163 * 1024, "what a block may have on sm_80");
  static_assert(Tile::kWarpM % kRowsPerFragment == 0, "the epilogue loop takes whole fragments");
  static_assert(kPlanes == 1 || (sizeof(Input) == 2 && Tile::kAligned),
                "planes are fp16, with rows at multiples of 16 bytes");
};

// Which tile this block computes. Groups of 8 tile rows are walked column by column, so that the
// blocks running at one time share few rows of A and B in L2.
__device__ __forceinline__ void RasterTile(const PortableArguments& arguments, int* tile_m,
                                           int* tile_n) {
  constexpr int kGroup = 8;
  const int blocks_per_group = kGroup * arguments.tiles_n;
  const int group = blockIdx.x / blocks_per_group;
  const int in_group = blockIdx.x - group * blocks_per_group;
  const int rows = min(kGroup, arguments.tiles_m - group * kGroup);
  *tile_n = in_group / rows;
  *tile_m = group * kGroup + in_group - *tile_n * rows;
}

// The row of the program's leading addition (a bias, as a rule), so far as it can be fetched once
// for all of the warp's rows; -0 else, which every value is neutral to.
template <int kWidth>
struct LeadingRow {
  // `inside`: all columns of the warp's tile are.
  __device__ __forceinline__ LeadingRow(const DeviceProgram& program, uint32_t column,
                                        bool inside) {
    found = inside && program.leading_row != kNoOperand;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) value[j] = -0.0f;
    if (found) {
      const DeviceOperand& operand = program.operand[program.leading_row];
      const int64_t offset[1] = {column};
      LoadVectors<kWidth, 1>(operand.data, operand.dtype, offset, value);
    }
  }

  bool found;
  float value[kWidth];
};

// Undoes the scaling of planes in a lane's columns; there is nothing to do for other inputs.
template <class Config>
class Unscaling {
 public:
  __device__ __forceinline__ Unscaling(const PortableArguments& arguments, uint32_t column)
      : arguments_(arguments) {
    if constexpr (Config::kPlanes == 2) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        root_b_[j] = arguments.root_b[min(column + j, arguments.program.columns - 1)];
      }
    }
  }

  __device__ __forceinline__ void Run(uint32_t row, float* values) const {
    if constexpr (Config::kPlanes == 2) {
      const float root_a = arguments_.root_a[min(row, arguments_.program.rows - 1)];
#pragma unroll
      for (int j = 0; j < kWidth; ++j) values[j] = Unscaled(values[j], root_a, root_b_[j]);
    }
  }

 private:
  static constexpr int kWidth = Config::Fragment::kWidth;

  const PortableArguments& arguments_;
  float root_b_[kWidth];
};

// Runs the program over this warp's tile, staged through `staging`, and stores.
template <class Config>
__device__ __forceinline__ void Epilogue(const PortableArguments& arguments,
                                         const WarpAccumulator<Config>& accumulator, float* staging,
                                         uint32_t row0, uint32_t column0) {
  using Tile = typename Config::Tile;
  using Fragment = typename Config::Fragment;
  const DeviceProgram& program = arguments.program;
  const int lane = threadIdx.x % 32;

  // Staging.
  float* const corner = staging + lane / 4 * Config::kStagingPitch + lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < Config::kMmasM; ++i) {
#pragma unroll
    for (int j = 0; j < Config::kMmasN; ++j) {
      const float (&d)[4] = accumulator[i][j];
      float* const upper = corner + i * 16 * Config::kStagingPitch + j * 8;
      *reinterpret_cast<float2*>(upper) = make_float2(d[0], d[1]);
      *reinterpret_cast<float2*>(upper + 8 * Config::kStagingPitch) = make_float2(d[2], d[3]);
    }
  }
  __syncwarp();
  if (row0 >= program.rows || column0 >= program.columns) return;

  // Program and store.
  const int lane_row = lane / Config::kLanesPerRow;
  const int lane_column = lane % Config::kLanesPerRow * Fragment::kWidth;
  const LeadingRow<Fragment::kWidth> leading(program, column0 + lane_column,
                                             column0 + Tile::kWarpN <= program.columns);
  const Unscaling<Config> unscaling(arguments, column0 + lane_column);
#pragma unroll 1
  for (int row = lane_row; row < Tile::kWarpM; row += Config::kRowsPerFragment) {
    if (row0 + row - lane_row >= program.rows) break;
    float values[Fragment::kSize];
    const Fragment at(row0 + row, Config::kRowsPerWarp, column0 + lane_column);
    const float* from = staging + row * Config::kStagingPitch + lane_column;
#pragma unroll
    for (int g = 0; g < Fragment::kGroups; ++g) {
      float* const to = values + g * Fragment::kWidth;
#pragma unroll
      for (int j = 0; j < Fragment::kWidth; j += 4) {
        const float4 four = *reinterpret_cast<const float4*>(
            from + g * Config::kRowsPerWarp * Config::kStagingPitch + j);
        to[j] = four.x, to[j + 1] = four.y, to[j + 2] = four.z, to[j + 3] = four.w;
      }
      unscaling.Run(at.Row(g), to);
#pragma unroll
      for (int j = 0; j < Fragment::kWidth; ++j) to[j] += leading.value[j];
    }
    Interpreter<Fragment, typename Config::Math>::Run(program, at, values, leading.found);
  }
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::Tile::kBlocksPerSm)
    PortableGemm(const __grid_constant__ PortableArguments arguments) {
  using Tile = typename Config::Tile;
  extern __shared__ __align__(1024) uint8_t shared[];

  // Setup.
  int tile_m, tile_n;
  RasterTile(arguments, &tile_m, &tile_n);
  const int row0 = tile_m * Tile::kM;
  const int column0 = tile_n * Tile::kN;
  const int warp = threadIdx.x / 32;
  const int warp_row = warp % Config::kWarpsM * Tile::kWarpM;
  const int warp_column = warp / Config::kWarpsM * Tile::kWarpN;
  const int stages = (arguments.k + Config::kStageK - 1) / Config::kStageK;
  const uint32_t base = shared_address(shared);
  const LaneAddresses<Config> lane(warp_row, warp_column);
  WarpAccumulator<Config> accumulator = {};
  await_turn();

  // Loads and mainloop.
  if constexpr (Config::kPlanes == 2) {
    const int special = IsSpecial<Config>(arguments, row0, column0);
    StageRing<Config> ring(arguments, row0, column0, base);
    const bool any_special = __syncthreads_or(special) != 0;
    MultiplyPlanes<Config>(ring, lane, stages, accumulator);
    ring.Leave();
    if (any_special) {
      MultiplySpecial<Config>(arguments, StageRing<Config>(arguments, row0, column0, base), lane,
                              stages, row0 + warp_row, column0 + warp_column, accumulator);
    }
  } else {
    StageRing<Config> ring(arguments, row0, column0, base);
    MultiplyStages<Config>(ring, lane, stages, accumulator);
    ring.Leave();
  }

  // Epilogue, staged where the ring was.
  float* staging = reinterpret_cast<float*>(shared + warp * Config::kStagingBytes);
  Epilogue<Config>(arguments, accumulator, staging, row0 + warp_row, column0 + warp_column);
}

}  // namespace fxfuse

#endif  // FXFUSE_CUDA_PORTABLE_GEMM_CUH_
