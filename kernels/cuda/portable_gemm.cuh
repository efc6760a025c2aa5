// D = epilogue(A @ B^T + bias), A [M, K], B [N, K], both with adjacent K.
//
// mma.sync with fp32 accumulation, fed by a ring of cp.async stages; sm_80 and up. One block
// computes one tile. Phases: setup, loads, mainloop, epilogue (staging, program, store).

#ifndef FXFUSE_CUDA_PORTABLE_GEMM_CUH_
#define FXFUSE_CUDA_PORTABLE_GEMM_CUH_

#include "fragment.cuh"
#include "interpreter.cuh"
#include "portable_kernels.h"
#include "portable_loader.cuh"
#include "portable_tiles.h"
#include "ptx.cuh"

namespace fxfuse {

// `Input` is __nv_bfloat16, __half or float (multiplied as TF32), `Tile` a shape of
// portable_tiles.h, `Math` a policy of math_device.cuh.
template <class Input_, class Tile_, class Math_, int kVectorWidth>
struct PortableConfig {
  using Input = Input_;
  using Tile = Tile_;
  using Math = Math_;

  static constexpr int kWarpsM = Tile::kM / Tile::kWarpM;
  static constexpr int kWarpsN = Tile::kN / Tile::kWarpN;
  static constexpr int kThreads = kWarpsM * kWarpsN * 32;

  static constexpr int kStageBytesA = Tile::kM * kStageRowBytes;
  static constexpr int kStageBytes = kStageBytesA + Tile::kN * kStageRowBytes;
  static constexpr int kStageK = kStageRowBytes / sizeof(Input);  // elements of K in a stage
  static constexpr int kStepBytes = 32;
  static constexpr int kSteps = kStageRowBytes / kStepBytes;

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

// The fragments of one k-step.
template <class Config>
struct Operands {
  uint32_t a[Config::kMmasM][4];
  uint32_t b[Config::kMmasN / 2][4];  // two adjacent 8-column tiles each
};

// `a` and `b` are this lane's ldmatrix addresses in the stage, for k-step 0. Stage rows are 128
// bytes and stages start at multiples of 1024, so a k-step only changes address bits 5 and 6, and
// the swizzle (chunk ^ row % 8) commutes with changing them by XOR.
template <class Config>
__device__ __forceinline__ void LoadOperands(uint32_t a, uint32_t b, int step,
                                             Operands<Config>& operands) {
  const uint32_t flip = step * Config::kStepBytes;
#pragma unroll
  for (int i = 0; i < Config::kMmasM; ++i) {
    load_matrix_x4(operands.a[i], (a ^ flip) + i * 16 * kStageRowBytes);
  }
#pragma unroll
  for (int j = 0; j < Config::kMmasN / 2; ++j) {
    load_matrix_x4(operands.b[j], (b ^ flip) + j * 16 * kStageRowBytes);
  }
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
__device__ __forceinline__ void Multiply(const Operands<Config>& operands,
                                         float (&accumulator)[Config::kMmasM][Config::kMmasN][4]) {
#pragma unroll
  for (int i = 0; i < Config::kMmasM; ++i) {
#pragma unroll
    for (int jj = 0; jj < Config::kMmasN; ++jj) {
      const int j = i % 2 == 0 ? jj : Config::kMmasN - 1 - jj;  // serpentine: B stays in reach
      mma<typename Config::Input>(accumulator[i][j], operands.a[i], operands.b[j / 2][j % 2 * 2],
                                  operands.b[j / 2][j % 2 * 2 + 1]);
    }
  }
}

// The row of the program's leading addition (a bias, as a rule), so far as it can be fetched once
// for all of the warp's rows; -0 else, which every value is neutral to.
template <int kWidth>
struct LeadingRow {
  // `inside`: all columns of the warp's tile are.
  __device__ __forceinline__ LeadingRow(const DeviceProgram& program, uint32_t column,
                                        bool inside) {
    const fxfuse_instruction& add = program.instruction[0];
    const DeviceOperand& operand = program.operand[add.index[1]];
    found = inside && program.instruction_count > 0 &&
            add.opcode == static_cast<uint16_t>(Opcode::add) &&
            add.source[0] == FXFUSE_FROM_PREVIOUS && add.source[1] == FXFUSE_FROM_OPERAND &&
            add.save < 0 && add.store < 0 && operand.access == Access::kVector &&
            operand.row_stride == 0;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) value[j] = -0.0f;
    if (found) {
      const int64_t offset[1] = {column};
      LoadVectors<kWidth, 1>(operand.data, operand.dtype, offset, value);
    }
  }

  bool found;
  float value[kWidth];
};

// Runs the program over this warp's tile, staged through `staging`, and stores.
template <class Config>
__device__ __forceinline__ void Epilogue(
    const DeviceProgram& program, const float (&accumulator)[Config::kMmasM][Config::kMmasN][4],
    float* staging, uint32_t row0, uint32_t column0) {
  using Tile = typename Config::Tile;
  using Fragment = typename Config::Fragment;
  const int lane = threadIdx.x % 32;

  // Staging. Lane l holds columns 2 * (l % 4) and the next, of rows l / 4 and l / 4 + 8.
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
#pragma unroll 1
  for (int row = lane_row; row < Tile::kWarpM; row += Config::kRowsPerFragment) {
    if (row0 + row - lane_row >= program.rows) break;
    float values[Fragment::kSize];
    const float* from = staging + row * Config::kStagingPitch + lane_column;
#pragma unroll
    for (int g = 0; g < Fragment::kGroups; ++g) {
#pragma unroll
      for (int j = 0; j < Fragment::kWidth; j += 4) {
        const float4 four = *reinterpret_cast<const float4*>(
            from + g * Config::kRowsPerWarp * Config::kStagingPitch + j);
        float* to = values + g * Fragment::kWidth + j;
        to[0] = four.x + leading.value[j], to[1] = four.y + leading.value[j + 1];
        to[2] = four.z + leading.value[j + 2], to[3] = four.w + leading.value[j + 3];
      }
    }
    const Fragment at(row0 + row, Config::kRowsPerWarp, column0 + lane_column);
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
  const int lane = threadIdx.x % 32;
  const int warp_row = warp % Config::kWarpsM * Tile::kWarpM;
  const int warp_column = warp / Config::kWarpsM * Tile::kWarpN;
  const int stages = (arguments.k + Config::kStageK - 1) / Config::kStageK;

  const uint32_t ring = shared_address(shared);
  // Lanes 0 to 15 address the rows of a 16-row block's first chunk, 16 to 31 its second (A); B
  // comes as two 8-row blocks, each with both chunks.
  const int row_a = warp_row + lane % 16;
  const int row_b = warp_column + lane % 8 + lane / 16 * 8;
  const uint32_t lane_a = row_a * kStageRowBytes + ((lane / 16) ^ (lane % 8)) * 16;
  const uint32_t lane_b =
      Config::kStageBytesA + row_b * kStageRowBytes + ((lane / 8 % 2) ^ (lane % 8)) * 16;

  float accumulator[Config::kMmasM][Config::kMmasN][4] = {};

  // Loads: fill all stages but one.
  StageLoader<Config> loader(arguments, row0, column0);
#pragma unroll
  for (int s = 0; s < Tile::kStages - 1; ++s) {
    loader.LoadPart(ring + s * Config::kStageBytes, 0, 1);
    loader.NextStage();
    copy_async_commit();
  }
  copy_async_wait<Tile::kStages - 2>();
  __syncthreads();

  // Mainloop. While k-step s is multiplied, s + 1 is read into the other set of fragments, first of
  // all, as nothing must delay it; and a third of the stage after next is asked for, in all steps
  // but the last. It goes where the stage before this one was, which every warp has left since the
  // last barrier.
  uint32_t read = ring;
  uint32_t write = ring + (Tile::kStages - 1) * Config::kStageBytes;
  const uint32_t end = ring + Config::kRingBytes;
  Operands<Config> operands[2];
  LoadOperands<Config>(read + lane_a, read + lane_b, 0, operands[0]);
  Round<Config>(operands[0]);
#pragma unroll 1
  for (int stage = 0; stage < stages; ++stage) {
#pragma unroll
    for (int step = 0; step < Config::kSteps; ++step) {
      if (step == Config::kSteps - 1) {
        loader.NextStage();
        copy_async_commit();
        copy_async_wait<Tile::kStages - 2>();
        __syncthreads();
        write = read;
        read += Config::kStageBytes;
        if (read == end) read = ring;
      }
      LoadOperands<Config>(read + lane_a, read + lane_b, (step + 1) % Config::kSteps,
                           operands[(step + 1) % 2]);
      if (step < Config::kSteps - 1) loader.LoadPart(write, step, Config::kSteps - 1);
      Multiply<Config>(operands[step % 2], accumulator);
      Round<Config>(operands[(step + 1) % 2]);
    }
  }
  copy_async_wait<0>();
  __syncthreads();  // the ring becomes the epilogue's staging

  // Epilogue.
  float* staging = reinterpret_cast<float*>(shared + warp * Config::kStagingBytes);
  Epilogue<Config>(arguments.program, accumulator, staging, row0 + warp_row, column0 + warp_column);
}

}  // namespace fxfuse

#endif  // FXFUSE_CUDA_PORTABLE_GEMM_CUH_
