// The tile shapes of the portable GEMM and what each costs. Everything is counted in bytes of K, so
// that 16-bit and 32-bit inputs share one geometry: a k-step of 32 bytes is 16 elements or 8.
//
// Per k-step of 32 bytes a warp tile of m x n reads (m + n) * 32 bytes out of shared memory for
// m * n * 16 multiply-adds. On an H200 mma.sync sustains about 1280 of them per cycle and SM where
// shared memory delivers 128 bytes: a 64 x 64 warp tile needs 32 cycles of shared memory for 51 of
// tensor core, 32 x 32 needs 16 for 13. So large tiles are made of 64 x 64 warp tiles (128
// accumulators a thread, the most that still leaves room for two sets of fragments), and the small
// ones are for problems that could not fill the device otherwise.

#ifndef FXFUSE_CUDA_PORTABLE_TILES_H_
#define FXFUSE_CUDA_PORTABLE_TILES_H_

namespace fxfuse {

// A stage row: 128 bytes of K, one swizzle period of eight 16-byte chunks over eight rows.
constexpr int kStageRowBytes = 128;

// Offsets within a tile are counted by 32-bit integers, so rows of aligned tiles are no further
// apart than 2^32 bytes divided by this.
constexpr int kMaxTileRows = 256;

// 48 KB a stage, 144 KB in all, about 250 registers a thread, eight warps: one block fills an SM
// of 64 K registers. The epilogue's 8 x 18 KB of staging are exactly the three stages.
struct LargeTile {
  static constexpr int kM = 128, kN = 256, kWarpM = 64, kWarpN = 64;
  static constexpr int kStages = 3, kBlocksPerSm = 1;
  static constexpr bool kAligned = true;
};

// 32 KB a stage, 96 KB in all, about 250 registers a thread, four warps. Two blocks to an SM (where
// it has 200 KB): one's epilogue runs under the other's mainloop, at the price of a third more
// traffic into shared memory than the large tile.
struct MediumTile {
  static constexpr int kM = 128, kN = 128, kWarpM = 64, kWarpN = 64;
  static constexpr int kStages = 3, kBlocksPerSm = 2;
  static constexpr bool kAligned = true;
};

// 16 KB a stage, 64 KB in all, about 150 registers a thread: three blocks to an SM.
struct SmallTile {
  static constexpr int kM = 64, kN = 64, kWarpM = 32, kWarpN = 32;
  static constexpr int kStages = 4, kBlocksPerSm = 3;
  static constexpr bool kAligned = true;
};

// For a handful of rows, where reading B is all there is to do: 4 KB of B a stage, seven of eight
// stages under way, two or more blocks to an SM, and tiles so narrow that N = 4096 still makes 128
// of them. Two warps: there is next to nothing to compute.
struct SkinnyTile {
  static constexpr int kM = 16, kN = 32, kWarpM = 16, kWarpN = 16;
  static constexpr int kStages = 8, kBlocksPerSm = 4;
  static constexpr bool kAligned = true;
};

// Any alignment, any stride, in 4-byte or 2-byte steps: right, not fast.
struct RaggedTile {
  static constexpr int kM = 64, kN = 64, kWarpM = 32, kWarpN = 32;
  static constexpr int kStages = 3, kBlocksPerSm = 3;
  static constexpr bool kAligned = false;
};

// Tiles of two planes each. A stage row holds both: 64 bytes of K of the high plane, then the same
// of the low one. Sums and what is added up beside them (see planes.cuh) are both live, so that a
// warp tile of 64 x 32 takes as many registers as one of 64 x 64 does elsewhere; but three products
// to four fragments make up for that: it needs 48 cycles of shared memory for 77 of tensor core.

// 32 KB a stage, 96 KB in all, which an sm_86 has as well; about 250 registers a thread, eight
// warps: one block to an SM.
struct PlanesLargeTile {
  static constexpr int kM = 128, kN = 128, kWarpM = 64, kWarpN = 32;
  static constexpr int kStages = 3, kBlocksPerSm = 1;
  static constexpr bool kAligned = true;
};

// 16 KB a stage, 48 KB in all: three blocks to an SM, two on an sm_86.
struct PlanesSmallTile {
  static constexpr int kM = 64, kN = 64, kWarpM = 32, kWarpN = 32;
  static constexpr int kStages = 3, kBlocksPerSm = 3;
  static constexpr bool kAligned = true;
};

// 12 KB a stage, 48 KB in all, for few rows: three blocks to an SM, two on an sm_86.
struct PlanesSkinnyTile {
  static constexpr int kM = 32, kN = 64, kWarpM = 32, kWarpN = 16;
  static constexpr int kStages = 4, kBlocksPerSm = 3;
  static constexpr bool kAligned = true;
};

}  // namespace fxfuse

#endif  // FXFUSE_CUDA_PORTABLE_TILES_H_
