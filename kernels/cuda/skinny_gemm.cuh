// D = epilogue(A @ B^T + bias), A [M, K] of few rows, B [N, K], both fp32 with adjacent K; products
// and sums in fp32.
//
// All there is to do is to read B once, at the rate of the memory: sm_80 and up. A block has all
// rows of A and a tile of B's rows (columns of the result). Its warps divide the tile's columns, or
// K, or both; the lanes of a warp divide both. So a lane has kRows x kColumns sums, over its part
// of K. A ring of cp.async stages keeps reads under way. Where there are few tiles, the blocks of a
// cluster (sm_90) divide K further. All sums are added up in a fixed order.
//
// Phases: setup, loads, mainloop, epilogue (lanes, groups of warps, cluster; program, store).

#ifndef FXFUSE_CUDA_SKINNY_GEMM_CUH_
#define FXFUSE_CUDA_SKINNY_GEMM_CUH_

#include "fragment.cuh"
#include "interpreter.cuh"
#include "ptx_hopper.cuh"
#include "skinny_kernels.h"

// The blocks of a tile are more than one only where the library says so: on sm_90.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FXFUSE_SKINNY_CLUSTERS
#endif

namespace fxfuse {

template <int kRows_, int kColumns_, class Math_>
struct SkinnyConfig {
  using Math = Math_;
  static constexpr int kRows = kRows_;        // of A
  static constexpr int kColumns = kColumns_;  // of a lane

  // Where registers allow, every so many stages the sums are added to others and begin anew: the
  // rounding error of a sum grows with the square root of its length.
  static constexpr bool kPromotes = kRows * kColumns <= 64;
  static constexpr int kPromoteStages = 8;

  static constexpr int kTileColumns = kSkinnyWarps * kSkinnyLanesN * kColumns;  // or a part of it

  // A stage: for each column of a lane four elements of B for each thread, which are that thread's
  // own; then, for each group of warps, 32 elements of each row of A.
  static constexpr int kLineBytes = kSkinnyThreads * 16;
  static constexpr int kStageBytesB = kColumns * kLineBytes;
  static constexpr int kRowBytes = kSkinnyStep * 4;

  // What a thread runs the program over.
  using Fragment = RowFragment<4, (kRows < 4 ? kRows : 4)>;

  // In the end the ring holds the sums of all groups of warps, in rows with four floats of padding
  // (lanes write several rows at a time).
  static constexpr int kSums = kRows * kColumns / kSkinnyLanesK;  // that a lane is left with
  static constexpr int kPadding = 4;
  static constexpr int kPartBytes = (kTileColumns + kPadding * kSkinnyWarps) * kRows * 4;

  static_assert(kRows * kColumns % kSkinnyLanesK == 0, "lanes share the sums evenly");
  static_assert(kRows * kColumns <= 128, "half of a thread's registers");
  static_assert(kRows % Fragment::kRows == 0, "whole fragments");
  static_assert(kRows * kTileColumns <= kSkinnyThreads * Fragment::kSize,
                "a thread has a fragment at most");
  static_assert(kTileColumns / kSkinnyWarps / 4 * kRows / Fragment::kRows >= kSkinnyMaxSplit,
                "fragments are dealt out evenly");
  static_assert(kPartBytes <= 2 * (kStageBytesB + kRows * kRowBytes),
                "two stages hold what the epilogue passes on");
};

// Which part of the work is this thread's.
struct SkinnyPlace {
  explicit __device__ __forceinline__ SkinnyPlace(const SkinnyArguments& arguments)
      : groups(1 << arguments.log2_groups),
        group(threadIdx.x / 32 & (groups - 1)),
        side(threadIdx.x / 32 >> arguments.log2_groups),
        lane_k(threadIdx.x % kSkinnyLanesK),
        lane_n(threadIdx.x % 32 / kSkinnyLanesK) {}

  // Column `c` of this lane, within the tile.
  template <class Config>
  __device__ __forceinline__ int Column(int c) const {
    return (side * Config::kColumns + c) * kSkinnyLanesN + lane_n;
  }

  int groups, group;  // groups of warps that divide K, and this warp's
  int side;           // this warp's among those of its group, side by side
  int lane_k, lane_n;
};

// Fills one stage after the other along K. What lies beyond the block's part of K becomes zero in
// both matrices. Rows that do not exist are another row of B and anything at all in A: no sum of
// theirs is stored.
template <class Config>
class SkinnyLoader {
 public:
  __device__ __forceinline__ SkinnyLoader(const SkinnyArguments& arguments,
                                          const SkinnyPlace& place, int column0, int k0, int count)
      : step_(place.groups * kSkinnyStep), step_bytes_(step_ * 4) {
    // B. A lane's elements are at offsets from a base that is the same for all threads and moves
    // along K.
    b_ = reinterpret_cast<const char*>(arguments.b + column0 * arguments.ldb + k0);
    const int own_k = place.group * kSkinnyStep + place.lane_k * 4;
    left_b_ = count - own_k;
#pragma unroll
    for (int c = 0; c < Config::kColumns; ++c) {
      const int column = min(place.Column<Config>(c), arguments.n - 1 - column0);
      offset_[c] = column * static_cast<uint32_t>(arguments.ldb / 4) + own_k / 4;
    }
    to_b_ = threadIdx.x * 16;
    // A. The block's threads take 16 bytes each, along K and then from row to row.
    const int along_k = threadIdx.x & (place.groups * kSkinnyLanesK - 1);
    const int row = threadIdx.x / kSkinnyLanesK >> arguments.log2_groups;
    const int row_step = kSkinnyThreads / kSkinnyLanesK >> arguments.log2_groups;
    a_ = reinterpret_cast<const char*>(arguments.a + row * arguments.lda + k0 + along_k * 4);
    from_step_ = row_step * arguments.lda * 4;
    to_step_ = row_step * Config::kRowBytes;
    left_a_ = count - along_k * 4;
    to_a_ = Config::kStageBytesB + along_k % kSkinnyLanesK * 16 +
            (along_k / kSkinnyLanesK * Config::kRows + row) * Config::kRowBytes;
    end_a_ = to_a_ + (arguments.m - row) * Config::kRowBytes;
    // Or the compiler would make all of this anew for each stage.
#pragma unroll
    for (int c = 0; c < Config::kColumns; ++c) asm volatile("" : "+r"(offset_[c]));
    asm volatile("" : "+r"(to_b_), "+r"(to_a_), "+r"(end_a_), "+r"(to_step_), "+l"(from_step_));
    asm volatile("" : "+r"(step_), "+l"(step_bytes_));
  }

  // Asks for the next stage, to be put at shared-memory address `stage`.
  __device__ __forceinline__ void LoadNext(uint32_t stage) {
#pragma unroll
    for (int c = 0; c < Config::kColumns; ++c) {
      copy_async_16(stage + to_b_ + c * Config::kLineBytes,
                    reinterpret_cast<const float4*>(b_) + offset_[c], left_b_ > 0);
    }
    const char* from = a_;
#pragma unroll 1
    for (int to = to_a_; to < end_a_; to += to_step_) {
      copy_async_16(stage + to, from, left_a_ > 0);
      from += from_step_;
    }
    b_ += step_bytes_;
    a_ += step_bytes_;
    left_b_ -= step_;
    left_a_ -= step_;
  }

 private:
  int step_;  // of K, from stage to stage
  int64_t step_bytes_;
  const char* b_;
  uint32_t offset_[Config::kColumns];  // in 16 bytes
  uint32_t to_b_;                      // where in a stage the thread's part of B begins
  const char* a_;
  int to_a_, end_a_;     // where in a stage the thread's rows of A go
  int to_step_;          // and how far they are apart there
  int64_t from_step_;    // and in memory, in bytes
  int left_b_, left_a_;  // elements of K from this thread's on
};

// Waits for all stages asked for but the last `depth - 2`.
__device__ __forceinline__ void WaitForStage(int depth) {
  if (depth == 6) return copy_async_wait<4>();
  if (depth == 4) return copy_async_wait<2>();
  copy_async_wait<0>();
}

template <class Config>
using SkinnySums = float[Config::kRows][Config::kColumns];

// Adds the products of a stage, at this lane's place in either part of it.
template <class Config>
__device__ __forceinline__ void MultiplyStage(uint32_t a, uint32_t b, SkinnySums<Config>& sum) {
  constexpr int kColumns = Config::kColumns;
  float4 y[kColumns];
#pragma unroll
  for (int c = 0; c < kColumns; ++c) y[c] = load_shared(b + c * Config::kLineBytes);
#pragma unroll
  for (int r = 0; r < Config::kRows; ++r) {
    const float4 x = load_shared(a + r * Config::kRowBytes);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) sum[r][c] = fmaf(x.x, y[c].x, sum[r][c]);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) sum[r][c] = fmaf(x.y, y[c].y, sum[r][c]);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) sum[r][c] = fmaf(x.z, y[c].z, sum[r][c]);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) sum[r][c] = fmaf(x.w, y[c].w, sum[r][c]);
  }
}

template <class Config>
__device__ __forceinline__ void MoveSums(SkinnySums<Config>& from, SkinnySums<Config>& to) {
#pragma unroll
  for (int r = 0; r < Config::kRows; ++r) {
#pragma unroll
    for (int c = 0; c < Config::kColumns; ++c) {
      to[r][c] += from[r][c];
      from[r][c] = 0.0f;
    }
  }
}

// Adds up `kCount` sums over the lanes that differ in the bits of lane_k below 2 * kBit, and leaves
// each with its share: lane_k / kBit % 2 says which half of them, and so on.
template <int kCount, int kBit>
__device__ __forceinline__ void AddLanes(float* sum) {
  const bool upper = (threadIdx.x & kBit) != 0;
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) {
    const float sent = upper ? sum[i] : sum[i + kCount / 2];
    const float kept = upper ? sum[i + kCount / 2] : sum[i];
    sum[i] = kept + __shfl_xor_sync(0xffffffffu, sent, kBit);
  }
  if constexpr (kBit > 1) AddLanes<kCount / 2, kBit / 2>(sum);
}

// Fragment `index` of the tile: a thread's share of the program.
template <class Config>
struct SkinnyPatch {
  using Fragment = typename Config::Fragment;

  __device__ __forceinline__ SkinnyPatch(int tile_columns, int index)
      : row(index / (tile_columns / 4) * Fragment::kRows), column(index % (tile_columns / 4) * 4) {}

  // How many there are.
  static __device__ __forceinline__ int Count(int tile_columns) {
    return Config::kRows / Fragment::kRows * (tile_columns / 4);
  }

  int row, column;
};

// Adds `count` fragments whose rows are `row_step` apart and which follow each other at `step`, in
// elements of four floats.
template <class Fragment>
__device__ __forceinline__ void AddFragments(const float4* from, int row_step, int step, int count,
                                             float (&values)[Fragment::kSize]) {
#pragma unroll
  for (int i = 0; i < Fragment::kSize; ++i) values[i] = 0.0f;
#pragma unroll 1
  for (int part = 0; part < count; ++part) {
#pragma unroll
    for (int g = 0; g < Fragment::kGroups; ++g) {
      const float4 four = from[g * row_step];
      float* const to = values + g * 4;
      to[0] += four.x, to[1] += four.y, to[2] += four.z, to[3] += four.w;
    }
    from += step;
  }
}

// Adds up what lanes, groups of warps and blocks have got from their parts of K, runs the program
// and stores. No copy is under way. `inbox` is where other blocks send what they have got: memory
// of its own, for racecheck takes no barrier of a cluster to end what copies have written.
template <class Config>
__device__ __forceinline__ void SkinnyEpilogue(const SkinnyArguments& arguments,
                                               const SkinnyPlace& place, uint8_t* ring,
                                               uint8_t* inbox, int column0, int rank,
                                               SkinnySums<Config>& sum) {
  using Fragment = typename Config::Fragment;
  using Patch = SkinnyPatch<Config>;
  const int tile_columns = Config::kTileColumns >> arguments.log2_groups;
  const int pitch = tile_columns + Config::kPadding;
  const int patches = Patch::Count(tile_columns);
  float* const parts = reinterpret_cast<float*>(ring);

  // Lanes.
  AddLanes<Config::kRows * Config::kColumns, kSkinnyLanesK / 2>(&sum[0][0]);
#pragma unroll
  for (int i = 0; i < Config::kSums; ++i) {
    const int index = place.lane_k * Config::kSums + i;
    const int row = place.group * Config::kRows + index / Config::kColumns;
    parts[row * pitch + place.Column<Config>(index % Config::kColumns)] = (&sum[0][0])[i];
  }
  __syncthreads();

  // Groups of warps.
  int index = threadIdx.x;
  bool exists = index < patches;
  float values[Fragment::kSize];
  if (exists) {
    const Patch patch(tile_columns, index);
    AddFragments<Fragment>(reinterpret_cast<float4*>(parts + patch.row * pitch + patch.column),
                           pitch / 4, Config::kRows * pitch / 4, place.groups, values);
  }

  // Cluster. The fragments are dealt out to its blocks, and each gets its own from all others.
#ifdef FXFUSE_SKINNY_CLUSTERS
  if (const int split = arguments.split; split > 1) {
    const int share = patches / split * Fragment::kRows;  // in elements of four floats
    if (exists) {
      const int to = rank * share + index / split * Fragment::kRows;
#pragma unroll
      for (int g = 0; g < Fragment::kRows; ++g) {
        const float* from = values + g * 4;
        store_remote(shared_address(inbox) + (to + g) * 16, index % split,
                     make_float4(from[0], from[1], from[2], from[3]));
      }
    }
    __syncwarp();
    cluster_sync();
    index = threadIdx.x * split + rank;
    exists = index < patches;
    if (exists) {
      AddFragments<Fragment>(reinterpret_cast<const float4*>(inbox) + threadIdx.x * Fragment::kRows,
                             1, share, split, values);
    }
  }
#endif
  if (!exists) return;

  // Program and store.
  const Patch patch(tile_columns, index);
  const Fragment at(patch.row, 1, column0 + patch.column);
  if (at.Row(0) >= arguments.program.rows || at.Column(0) >= arguments.program.columns) return;
  Interpreter<Fragment, typename Config::Math>::Run(arguments.program, at, values);
}

// Waits for all threads of all blocks that share a tile.
__device__ __forceinline__ void Everyone(int split) {
#ifdef FXFUSE_SKINNY_CLUSTERS
  if (split > 1) return cluster_sync();
#endif
  __syncthreads();
}

template <class Config>
__global__ void __launch_bounds__(kSkinnyThreads, 1)
    SkinnyGemm(const __grid_constant__ SkinnyArguments arguments) {
  extern __shared__ __align__(1024) uint8_t shared[];

  // Setup. The blocks of a cluster have one tile.
  const int split = arguments.split;
  const int tile = blockIdx.x / split;
  const int rank = blockIdx.x % split;
  const SkinnyPlace place(arguments);
  const int column0 = tile * (Config::kTileColumns >> arguments.log2_groups);
  const int k0 = rank * arguments.range;
  const int count = min(arguments.k - k0, arguments.range);  // of K; none is left, perhaps
  const int step = place.groups * kSkinnyStep;
  const int stages = count > 0 ? (count + step - 1) / step : 0;
  uint32_t stage_bytes = Config::kStageBytesB + place.groups * Config::kRows * Config::kRowBytes;
  uint32_t ring_bytes = arguments.depth * stage_bytes;
  uint32_t ring = shared_address(shared);
  await_turn();

  // Loads: fill all stages but one.
  SkinnyLoader<Config> loader(arguments, place, column0, k0, count);
  for (int s = 0; s < arguments.depth - 1; ++s) {
    loader.LoadNext(ring + s * stage_bytes);
    copy_async_commit();
  }

  // Mainloop. The barrier is for A alone: B's part of a stage is read by those who asked for it.
  SkinnySums<Config> sum = {}, total = {};
  uint32_t own_a = ring + Config::kStageBytesB + place.lane_k * 16 +
                   place.group * Config::kRows * Config::kRowBytes;
  uint32_t own_b = ring + threadIdx.x * 16;
  int depth = arguments.depth;
  uint32_t read = 0;
  uint32_t write = ring_bytes - stage_bytes;
  asm volatile("" : "+r"(own_a), "+r"(own_b), "+r"(ring), "+r"(stage_bytes), "+r"(ring_bytes));
  asm volatile("" : "+r"(depth));
#pragma unroll 1
  for (int stage = 0; stage < stages; ++stage) {
    WaitForStage(depth);
    __syncthreads();
    loader.LoadNext(ring + write);
    copy_async_commit();
    MultiplyStage<Config>(own_a + read, own_b + read, sum);
    write = read;
    read += stage_bytes;
    if (read == ring_bytes) read = 0;
    if constexpr (Config::kPromotes) {
      if (stage % Config::kPromoteStages == Config::kPromoteStages - 1) {
        MoveSums<Config>(sum, total);
      }
    }
  }
  if constexpr (Config::kPromotes) MoveSums<Config>(total, sum);

  // Epilogue.
  copy_async_wait<0>();
  Everyone(split);  // the rings become the epilogue's
  SkinnyEpilogue<Config>(arguments, place, shared, shared + ring_bytes, column0, rank, sum);
}

}  // namespace fxfuse

#endif  // FXFUSE_CUDA_SKINNY_GEMM_CUH_
