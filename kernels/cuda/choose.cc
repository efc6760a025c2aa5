#include "choose.h"

#include <algorithm>

#include "portable_tiles.h"

namespace fxfuse {
namespace {

// What tiles cost, in cycles: for each stage of 128 bytes of K (64 bytes of two planes), `lone`
// where a tile is at the mercy of latencies and `busy` where the SM is kept busy by `together` of
// them, which share it; `once` for a prologue and an epilogue of a few operations.
struct TileCost {
  TileKind tile;
  int together;
  int lone;
  int busy;
  int once;
};

// Fitted to times measured on an H200 with bf16 inputs. TF32 takes a fifth more per stage, alike
// for all tiles. Those of planes are estimates: 1280 multiply-adds a cycle, of which the narrower
// tiles reach less for what they read of shared memory.
constexpr TileCost kTileCosts[] = {
    {TileKind::kLarge, 1, 1850, 1850, 10000},    {TileKind::kMedium, 2, 1170, 975, 4000},
    {TileKind::kSmall, 3, 690, 410, 1500},       {TileKind::kSkinny, 4, 490, 125, 500},
    {TileKind::kRagged, 3, 2000, 2000, 4000},    {TileKind::kPlanesLarge, 1, 1450, 1450, 6000},
    {TileKind::kPlanesSmall, 3, 700, 430, 1500}, {TileKind::kPlanesSkinny, 3, 500, 250, 800},
};
static_assert(kTileCosts[static_cast<int>(TileKind::kPlanesSkinny)].tile == TileKind::kPlanesSkinny,
              "a row for every tile, in their order");

int64_t ElementBytes(const fxfuse_problem& problem) {
  return problem.input_dtype == FXFUSE_F32 ? 4 : 2;
}

// Whether the aligned tiles can serve the problem. What is beyond K in a row of a plane is zeros.
bool FitsAlignedTiles(const fxfuse_problem& problem, bool aligned) {
  const int64_t element_bytes = ElementBytes(problem);
  constexpr int64_t kMaxPitch = (int64_t{1} << 32) / kMaxTileRows;
  return aligned && (problem.planes > 0 || problem.k * element_bytes % 16 == 0) &&
         problem.lda * element_bytes < kMaxPitch && problem.ldb * element_bytes < kMaxPitch;
}

int64_t Cost(const PortableKernel& kernel, const fxfuse_problem& problem,
             const DeviceLimits& device) {
  const int64_t row_bytes = problem.k * ElementBytes(problem) * std::max(problem.planes, 1);
  const int64_t stages = CeilDivide(row_bytes, kStageRowBytes);
  const int64_t tiles = CeilDivide(problem.m, kernel.tile_m) * CeilDivide(problem.n, kernel.tile_n);
  const int64_t tiles_per_sm = CeilDivide(tiles, device.sm_count);
  const TileCost& cost = kTileCosts[static_cast<int>(kernel.tile)];
  const int64_t latency = CeilDivide(tiles_per_sm, cost.together) * cost.lone;
  const int64_t throughput = tiles_per_sm * cost.busy;
  return stages * std::max(latency, throughput) + tiles_per_sm * cost.once;
}

}  // namespace

PortableKernels AllPortableKernels() {
  static const KernelTable<PortableKernel, kMaxPortableKernels> table = {
      PortableBf16Fast(), PortableBf16Exact(), PortableF16Half(),
      PortableF16Exact(), PortableTf32(),      PortablePlanes()};
  return table.List();
}

const PortableKernel* ChoosePortable(const fxfuse_problem& problem, bool aligned,
                                     const DeviceLimits& device) {
  const bool fits = FitsAlignedTiles(problem, aligned);
  return BestKernel(
      AllPortableKernels(), RequiredMath(problem),
      [&](const PortableKernel& kernel) {
        return kernel.input_dtype == problem.input_dtype && kernel.planes == problem.planes &&
               (kernel.tile == TileKind::kRagged) != fits &&
               kernel.shared_bytes <= device.shared_bytes_per_block;
      },
      [&](const PortableKernel& kernel) { return Cost(kernel, problem, device); });
}

}  // namespace fxfuse
