#include "choose.h"

#include <initializer_list>

#include "portable_tiles.h"

namespace fxfuse {
namespace {

// What a tile costs, in cycles of an SM that is kept busy: `stage` for each 128 bytes of K, `tile`
// for a prologue and an epilogue of a few operations, so far as no other block runs under them.
struct TileCost {
  TileKind tile;
  int stage;
  int once;
};

// Reckoned for an H200 (about 1100 multiply-adds a cycle and SM in 64 x 64 warp tiles, 20 bytes a
// cycle and SM of device memory); to be replaced by measurement where that says otherwise.
constexpr TileCost kTileCosts[] = {
    {TileKind::kLarge, 1900, 20000}, {TileKind::kMedium, 1050, 8000}, {TileKind::kSmall, 440, 2500},
    {TileKind::kSkinny, 200, 1200},  {TileKind::kRagged, 2000, 4000},
};

int64_t CeilDivide(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t Cost(const PortableKernel& kernel, const fxfuse_problem& problem,
             const DeviceLimits& device) {
  const int64_t element_bytes = problem.input_dtype == FXFUSE_F32 ? 4 : 2;
  const int64_t stages = CeilDivide(problem.k * element_bytes, kStageRowBytes);
  const int64_t tiles = CeilDivide(problem.m, kernel.tile_m) * CeilDivide(problem.n, kernel.tile_n);
  const int64_t tiles_per_sm = CeilDivide(tiles, device.sm_count);
  const TileCost& cost = kTileCosts[static_cast<int>(kernel.tile)];
  return tiles_per_sm * (stages * cost.stage + cost.once);
}

}  // namespace

PortableKernels AllPortableKernels() {
  struct Table {
    PortableKernel kernel[kMaxPortableKernels];
    int count = 0;
    Table() {
      for (const PortableKernels& some : {PortableBf16Fast(), PortableBf16Exact(),
                                          PortableF16Half(), PortableF16Exact(), PortableTf32()}) {
        for (int i = 0; i < some.count && count < kMaxPortableKernels; ++i) {
          kernel[count++] = some.kernel[i];
        }
      }
    }
  };
  static const Table table;
  return {table.kernel, table.count};
}

const PortableKernel* ChoosePortable(const fxfuse_problem& problem, bool aligned,
                                     const DeviceLimits& device) {
  const MathLevel math = RequiredMath(problem.program);
  const PortableKernels all = AllPortableKernels();
  const PortableKernel* best = nullptr;
  int64_t best_cost = 0;
  for (int i = 0; i < all.count; ++i) {
    const PortableKernel& kernel = all.kernel[i];
    if (kernel.input_dtype != problem.input_dtype || kernel.math < math) continue;
    if ((kernel.tile == TileKind::kRagged) == aligned) continue;
    if (kernel.shared_bytes > device.shared_bytes_per_block) continue;
    const int64_t cost = Cost(kernel, problem, device);
    // Of two exact enough, the cheaper arithmetic; of one arithmetic, the cheaper tile.
    if (best == nullptr || kernel.math < best->math ||
        (kernel.math == best->math && cost < best_cost)) {
      best = &kernel;
      best_cost = cost;
    }
  }
  return best;
}

}  // namespace fxfuse
