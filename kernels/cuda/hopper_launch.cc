#include "hopper_launch.h"

#include <cudaTypedefs.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <iterator>
#include <limits>

#include "device.h"
#include "launch.h"

namespace fxfuse {
namespace {

// The driver's encoder, found at run time so that the library loads where there is no driver.
PFN_cuTensorMapEncodeTiled_v12000 FindEncoder() {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry,
                                                             12000, cudaEnableDefault, &found);
  if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) return nullptr;
  return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(entry);
}

// Whether rows of 16-bit elements begin where cache lines do, as the first does.
bool WholeLines(int64_t stride) { return stride % 64 == 0; }

// A tensor of 16-bit elements, and the box of it that one copy brings. Dimensions go from the
// innermost, of adjacent elements; strides are in elements, from the second dimension on.
struct Tensor {
  int rank;
  int64_t size[5];
  int64_t stride[4];
  int box[5];
};

fxfuse_status Encode(const char* call, const char* name, const void* data, int dtype,
                     const Tensor& tensor, CUtensorMap* map) {
  static const PFN_cuTensorMapEncodeTiled_v12000 encode = FindEncoder();
  if (encode == nullptr) {
    return Fail(FXFUSE_RUNTIME_ERROR, "%s: the driver has no cuTensorMapEncodeTiled (CUDA 12.0)",
                call);
  }
  const CUtensorMapDataType type =
      dtype == FXFUSE_BF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  constexpr cuuint32_t kSteps[] = {1, 1, 1, 1, 1};
  cuuint64_t sizes[5], strides[4];
  cuuint32_t box[5];
  for (int i = 0; i < tensor.rank; ++i) {
    sizes[i] = static_cast<cuuint64_t>(tensor.size[i]);
    box[i] = static_cast<cuuint32_t>(tensor.box[i]);
    if (i > 0) strides[i - 1] = static_cast<cuuint64_t>(tensor.stride[i - 1]) * 2;
  }
  // Where rows begin inside a cache line, to fetch its neighbour, too, is too much.
  const bool whole_lines = WholeLines(tensor.stride[0]);
  const CUresult result =
      encode(map, type, tensor.rank, const_cast<void*>(data), sizes, strides, box, kSteps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             whole_lines ? CU_TENSOR_MAP_L2_PROMOTION_L2_256B : CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return FXFUSE_OK;
  return Fail(FXFUSE_RUNTIME_ERROR, "%s: cuTensorMapEncodeTiled of %s [%lld, %lld]: error %d", call,
              name, static_cast<long long>(tensor.size[1]), static_cast<long long>(tensor.size[0]),
              static_cast<int>(result));
}

// The stride of a single row is moot, but must pass the encoder's check all the same.
int64_t RowStride(int64_t rows, int64_t width, int64_t stride) {
  return rows > 1 ? stride : CeilDivide(width, 8) * 8;
}

// Rows of a box for tiles at the edge of the matrix: few, so that such a tile need not bring what
// is outside.
int EdgeRows(int64_t rows) {
  return static_cast<int>(std::min<int64_t>(32, CeilDivide(rows, 8) * 8));
}

// Rows from one of the planes to the next; of a matrix that is no planes, its own.
int64_t PlaneRows(const fxfuse_problem& problem, int64_t rows) {
  constexpr int64_t kUnit = FXFUSE_PLANE_ROWS;
  return problem.planes > 0 ? CeilDivide(rows, kUnit) * kUnit : rows;
}

// Rows of all planes together.
int64_t AllRows(const fxfuse_problem& problem, int64_t rows) {
  return PlaneRows(problem, rows) * std::max(problem.planes, 1);
}

static_assert(FXFUSE_PLANE_ROWS % 32 == 0, "planes of B are read interleaved");

Tensor DescribeA(const fxfuse_problem& problem, int box) {
  const int64_t rows = AllRows(problem, problem.m);
  return {2, {problem.k, rows}, {RowStride(rows, problem.k, problem.lda)}, {64, box}};
}

LayoutB ChooseLayoutB(const fxfuse_problem& problem) {
  if (problem.b_transposed) return LayoutB::kColumns;
  return problem.n % 8 == 0 || problem.planes > 0 ? LayoutB::kInterleaved : LayoutB::kRows;
}

// Row 32 u + 8 q + 2 j + e of B becomes row 32 u + 8 j + 2 q + e of a tile: as a tensor, B's rows
// have the dimensions e, q, j, u. Those beyond the last multiple of 32 are a tensor of their own
// (DescribeTail), of fewer q.
Tensor DescribeB(const fxfuse_problem& problem, LayoutB layout, int box) {
  const int64_t n = AllRows(problem, problem.n), k = problem.k;
  const int64_t row = RowStride(n, k, problem.ldb);
  if (layout == LayoutB::kInterleaved) {
    return {5, {k, 2, 4, 4, n / 32}, {row, 8 * row, 2 * row, 32 * row}, {64, 2, 4, 4, box / 32}};
  }
  if (layout == LayoutB::kRows) return {2, {k, n}, {row}, {64, box}};
  // Rows of a plane beyond K are zeros, whatever its padding holds.
  const int64_t planes = std::max(problem.planes, 1);
  const int64_t columns_row = RowStride(k, problem.n, problem.ldb);
  return {
      3, {problem.n, k, planes}, {columns_row, PlaneRows(problem, k) * columns_row}, {64, 64, 1}};
}

int TailRows(const fxfuse_problem& problem) {
  return static_cast<int>(PlaneRows(problem, problem.n) % 32);
}

Tensor DescribeTail(const fxfuse_problem& problem) {
  const int64_t k = problem.k;
  const int64_t row = RowStride(problem.n, k, problem.ldb);
  return {
      5, {k, 2, TailRows(problem) / 8, 4, 1}, {row, 8 * row, 2 * row, 32 * row}, {64, 2, 4, 4, 1}};
}

int EdgeB(const fxfuse_problem& problem, LayoutB layout) {
  if (layout == LayoutB::kColumns) return 64;
  return layout == LayoutB::kInterleaved ? 32 : EdgeRows(problem.n);
}

// Encodes a matrix in boxes of a whole tile's rows, or half of them if `shared` by pairs, and,
// where a tile lies at its edge, in smaller ones; `describe` says how, for so many rows of a box.
template <class Describe>
fxfuse_status EncodeBoth(const char* call, const char* name, const void* data, int dtype,
                         int64_t rows, int tile_rows, bool shared, int edge_rows, Describe describe,
                         CUtensorMap* whole, CUtensorMap* edge) {
  fxfuse_status status = FXFUSE_OK;
  if (rows >= tile_rows) {
    const int box_rows = shared ? tile_rows / 2 : tile_rows;
    status = Encode(call, name, data, dtype, describe(box_rows), whole);
  }
  if (status == FXFUSE_OK && rows % tile_rows != 0) {
    status = Encode(call, name, data, dtype, describe(edge_rows), edge);
  }
  return status;
}

// A kernel's tile as fxfuse_problem.tile and the table below have it.
int TileNumber(const HopperKernel& kernel, Pairs pairs) {
  return kernel.tile_n + (kernel.ping_pong ? FXFUSE_TILE_IN_TURNS : 0) +
         (kernel.tile_m == 64 ? FXFUSE_TILE_OF_64_ROWS : 0) +
         (pairs == Pairs::kShareA ? FXFUSE_TILE_SHARES_A : 0) +
         (pairs == Pairs::kShareB ? FXFUSE_TILE_SHARES_B : 0);
}

// Tiles that clusters take in turns, along M and N: pairs of them, where blocks work in pairs.
struct Grid {
  Grid(const HopperKernel& kernel, Pairs pairs, const fxfuse_problem& problem)
      : m(CeilDivide(problem.m, kernel.tile_m * (pairs == Pairs::kShareB ? 2 : 1))),
        n(CeilDivide(problem.n, kernel.tile_n * (pairs == Pairs::kShareA ? 2 : 1))) {}
  int64_t Tiles() const { return m * n; }
  int64_t m, n;
};

// What a tile costs, in nanoseconds, where `split` blocks divide K: for each stage of 64 along K,
// and once for all else; of tiles in turns, once for all of a block's. Latencies are those of the
// block with the most tiles; to the load on memory and clock, which all blocks share, each adds
// what the average block has; and some of it goes with the rows of A in a tile.
struct TileCost {
  int16_t whole_lines;  // whether rows begin at cache lines; 1 for two planes
  int16_t planes;
  int16_t tile;
  int16_t split;
  double stage, stage_load, stage_rows;
  double once, once_load, once_rows;

  // The table's order.
  constexpr bool operator<(const TileCost& other) const {
    if (planes != other.planes) return planes < other.planes;
    if (whole_lines != other.whole_lines) return whole_lines > other.whole_lines;
    if (tile != other.tile) return tile > other.tile;
    return split < other.split;
  }
};

constexpr TileCost kTileCosts[] = {
#include "hopper_costs.inc"
};

constexpr bool InOrder() {
  for (size_t i = 1; i < std::size(kTileCosts); ++i) {
    if (!(kTileCosts[i - 1] < kTileCosts[i])) return false;
  }
  return true;
}
static_assert(InOrder(), "Cost looks rows up by halves, at each call");

constexpr double kNever = std::numeric_limits<double>::infinity();

// Of what the table does not have, kNever.
double Cost(const HopperKernel& kernel, const Division& division, const fxfuse_problem& problem,
            const DeviceLimits& device) {
  // Of two planes the table does not tell.
  const bool whole_lines =
      kernel.planes > 1 || (WholeLines(problem.lda) && WholeLines(problem.ldb));
  TileCost wanted = {};
  wanted.whole_lines = whole_lines;
  wanted.planes = kernel.planes;
  wanted.tile = static_cast<int16_t>(TileNumber(kernel, division.pairs));
  wanted.split = static_cast<int16_t>(division.split);
  const auto cost = std::lower_bound(std::begin(kTileCosts), std::end(kTileCosts), wanted);
  if (cost == std::end(kTileCosts) || wanted < *cost) return kNever;
  const int64_t stages = CeilDivide(CeilDivide(problem.k, 64), division.split);
  const int64_t tiles = Grid(kernel, division.pairs, problem).Tiles();
  const int64_t clusters = device.hopper_clusters[division.ClusterSize()];
  const int64_t turns = CeilDivide(tiles, clusters);
  const double average = static_cast<double>(tiles) / clusters;
  const double filled = turns * std::min(1.0, static_cast<double>(problem.m) / kernel.tile_m);
  return stages * (turns * cost->stage + average * cost->stage_load + filled * cost->stage_rows) +
         (kernel.ping_pong ? 1 : turns) * cost->once + average * cost->once_load +
         filled * cost->once_rows;
}

// Whether a kernel can serve the problem so, and there is sense in it. Of a divided K every block
// gets a stage and 16 rows to finish, and no SM a second tile. Pairs have two tiles side by side.
// For tiles in turns there are turns to take; of tiles of 64 rows there are more than of 128, which
// bring no more rows than there are, either.
bool CanDivide(const HopperKernel& kernel, const Division& division, const fxfuse_problem& problem,
               const DeviceLimits& device) {
  if (division.ClusterSize() > kMaxCluster) return false;
  const bool asked = problem.tile != 0;
  if (asked && problem.tile != 16 * TileNumber(kernel, division.pairs) + division.split) {
    return false;
  }
  if (division.pairs != Pairs::kNone && kernel.planes > 1) return false;
  if (division.pairs == Pairs::kShareA && problem.n <= kernel.tile_n) return false;
  if (division.pairs == Pairs::kShareB && problem.m <= kernel.tile_m) return false;
  const int64_t tiles = Grid(kernel, division.pairs, problem).Tiles();
  const int64_t clusters = device.hopper_clusters[division.ClusterSize()];
  if (clusters == 0) return false;  // of a part of a GPU, say
  if (kernel.ping_pong) return division.split == 1 && (tiles > clusters || asked);
  if (kernel.tile_m == 64 && problem.m <= 64 && !asked) return false;
  return division.split == 1 || (CeilDivide(problem.k, 64) >= division.split &&
                                 kernel.tile_m / 16 >= division.split && tiles <= clusters);
}

// The cheapest way for a kernel to serve the problem, or the one the problem asks for; kNever where
// there is none.
struct PricedDivision {
  Division division;
  double cost = kNever;
};

PricedDivision BestDivision(const HopperKernel& kernel, const fxfuse_problem& problem,
                            const DeviceLimits& device) {
  PricedDivision best;
  for (const Pairs pairs : {Pairs::kNone, Pairs::kShareA, Pairs::kShareB}) {
    for (int split = 1; split <= kMaxSplit; split *= 2) {
      const Division division = {split, pairs};
      if (!CanDivide(kernel, division, problem, device)) continue;
      const double cost = problem.tile != 0 ? 0.0 : Cost(kernel, division, problem, device);
      if (cost < best.cost) best = {division, cost};
    }
  }
  return best;
}

}  // namespace

HopperKernels AllHopperKernels() {
  static const KernelTable<HopperKernel, kMaxHopperKernels> table = {
      HopperFastChain(), HopperFast(),  HopperHalfRows(),    HopperHalfChain(), HopperHalf(),
      HopperHighChain(), HopperExact(), HopperPlanesChain(), HopperPlanes()};
  return table.List();
}

HopperChoice ChooseHopper(const fxfuse_problem& problem, void* const* pointers, bool aligned,
                          const DeviceLimits& device) {
  const bool halves = problem.input_dtype == FXFUSE_F16 || problem.input_dtype == FXFUSE_BF16;
  if (!device.hopper || !aligned || !halves || problem.k == 0) return {};
  const int group_width = GroupWidth(problem);
  const auto best = [&](const ChainTraits& chain) {
    return BestKernel(
        AllHopperKernels(), RequiredMath(problem),
        [&](const HopperKernel& k) {
          return k.chain_dtype == chain.dtype && k.full_operands >= chain.full_operands &&
                 k.planes == std::max(problem.planes, 1) &&
                 group_width <= (chain.dtype == kNoChain ? 0 : k.tile_n);
        },
        [&](const HopperKernel& k) { return BestDivision(k, problem, device).cost; });
  };
  const HopperKernel* kernel = best(FindChain(problem, pointers));
  if (kernel == nullptr) kernel = best(ChainTraits());
  if (kernel == nullptr) return {};
  const PricedDivision cheapest = BestDivision(*kernel, problem, device);
  return cheapest.cost < kNever ? HopperChoice{kernel, cheapest.division} : HopperChoice{};
}

fxfuse_status PrepareHopper(const char* call, DeviceLimits* device) {
  const HopperKernels all = AllHopperKernels();
  for (int& clusters : device->hopper_clusters) clusters = device->sm_count;
  for (int i = 0; i < all.count; ++i) {
    const HopperKernel& kernel = all.kernel[i];
    cudaFuncAttributes attributes;
    cudaError_t error = cudaFuncGetAttributes(&attributes, kernel.function);  // loads the kernel
    if (error == cudaSuccess) {
      error = cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   kernel.shared_bytes);
    }
    // All blocks of a cluster must sit in one group of SMs, so there may be fewer clusters than SMs
    // would allow.
    for (int size = 2; error == cudaSuccess && size <= kMaxCluster; size *= 2) {
      const LaunchConfig launch(*device, device->sm_count / size * size, kHopperThreads,
                                kernel.shared_bytes, nullptr, size);
      int clusters = 0;
      error = cudaOccupancyMaxActiveClusters(&clusters, kernel.function, &launch.config());
      device->hopper_clusters[size] = std::min(device->hopper_clusters[size], clusters);
    }
    if (error != cudaSuccess) return CudaFailure(call, kernel.name, error);
  }
  return FXFUSE_OK;
}

fxfuse_status LaunchHopper(const char* call, const fxfuse_problem& problem, void* const* pointers,
                           const DeviceLimits& device, const HopperChoice& choice, void* stream) {
  const HopperKernel& kernel = *choice.kernel;
  const Division& division = choice.division;
  HopperArguments arguments = {};
  arguments.layout_b = ChooseLayoutB(problem);
  arguments.edge_a = EdgeRows(problem.m);
  arguments.edge_b = EdgeB(problem, arguments.layout_b);
  fxfuse_status status = EncodeBoth(
      call, "A", pointers[FXFUSE_PTR_A], problem.input_dtype, problem.m, kernel.tile_m,
      division.pairs == Pairs::kShareA, arguments.edge_a,
      [&](int box) { return DescribeA(problem, box); }, &arguments.a, &arguments.a_edge);
  if (status != FXFUSE_OK) return status;
  const int tail = arguments.layout_b == LayoutB::kInterleaved ? TailRows(problem) : 0;
  status = EncodeBoth(
      call, "B", pointers[FXFUSE_PTR_B], problem.input_dtype, problem.n - tail, kernel.tile_n,
      division.pairs == Pairs::kShareB, arguments.edge_b,
      [&](int box) { return DescribeB(problem, arguments.layout_b, box); }, &arguments.b,
      &arguments.b_edge);
  if (status == FXFUSE_OK && tail > 0) {
    const int64_t bytes = (problem.n - tail) * problem.ldb * 2;
    status = Encode(call, "the tail of B", static_cast<char*>(pointers[FXFUSE_PTR_B]) + bytes,
                    problem.input_dtype, DescribeTail(problem), &arguments.b_tail);
  }
  if (status != FXFUSE_OK) return status;
  const Grid grid(kernel, division.pairs, problem);
  if (grid.Tiles() > kMaxHopperTiles) {
    return Fail(FXFUSE_UNSUPPORTED, "%s: %lld tiles, %s takes up to %d", call,
                static_cast<long long>(grid.Tiles()), kernel.name, kMaxHopperTiles);
  }
  arguments.half = problem.input_dtype == FXFUSE_F16;
  arguments.stages = static_cast<int32_t>(CeilDivide(problem.k, 64));
  arguments.split = division.split;
  arguments.pairs = division.pairs;
  arguments.tiles_m = static_cast<int32_t>(grid.m);
  arguments.tiles_n = static_cast<int32_t>(grid.n);
  arguments.plane_rows_a = static_cast<int32_t>(PlaneRows(problem, problem.m));
  arguments.plane_rows_b = static_cast<int32_t>(PlaneRows(problem, problem.n));
  if (problem.planes > 0) {
    arguments.root_a = static_cast<float*>(pointers[FXFUSE_PTR_ROOT_A]);
    if (!problem.b_transposed) arguments.root_b = static_cast<float*>(pointers[FXFUSE_PTR_ROOT_B]);
  }
  if (problem.planes > 1) {
    arguments.special_a = static_cast<int32_t*>(pointers[FXFUSE_PTR_SPECIAL_A]);
    if (!problem.b_transposed) {
      arguments.special_b = static_cast<int32_t*>(pointers[FXFUSE_PTR_SPECIAL_B]);
    }
  }
  TranslateProgram(problem, pointers, &arguments.program);
  // A divided tile is a cluster's only one: the ring serves the reduction in the end.
  const int size = division.ClusterSize();
  int64_t clusters = grid.Tiles();
  if (division.split == 1) {
    clusters = std::min<int64_t>(clusters, device.hopper_clusters[size]);
  }
  const LaunchConfig config(device, clusters * size, kHopperThreads, kernel.shared_bytes, stream,
                            size);
  return Launch(call, kernel.name, kernel.function, config, &arguments);
}

}  // namespace fxfuse
