// The Hopper GEMM's kernels as the host sees them: what they take and which there are.

#ifndef FXFUSE_CUDA_HOPPER_KERNELS_H_
#define FXFUSE_CUDA_HOPPER_KERNELS_H_

#include <cuda.h>

#include "kernel_list.h"

namespace fxfuse {

// How B reaches shared memory, and with it which columns a lane's accumulators are.
enum class LayoutB : int32_t {
  kInterleaved,  // B [N, K], N a multiple of 8: rows in an order that leaves lanes adjacent columns
  kRows,         // B [N, K], rows in their own order
  kColumns       // B [K, N]
};

// Pairs of blocks have tiles side by side, and what these have in common each brings half of, for
// both (multicast).
enum class Pairs : int32_t {
  kNone,
  kShareA,  // pairs of tiles along N
  kShareB   // along M
};

struct HopperArguments {
  // A [M, K] and B, K by 64, in boxes of a tile's rows, or of half as many of the matrix that pairs
  // share; and, for tiles at the edge of the matrix, of edge_a and edge_b rows. Of a B [K, N] all
  // boxes have 64 columns.
  CUtensorMap a, b;
  CUtensorMap a_edge, b_edge;
  CUtensorMap b_tail;  // of an interleaved B, the rows from the last multiple of 32 on
  int32_t edge_a, edge_b;
  LayoutB layout_b;
  int32_t half;    // inputs are fp16, not bf16
  int32_t stages;  // of 64 along K, over all of the split
  int32_t split;   // blocks that divide K among them: 1, 2, 4 or 8
  Pairs pairs;     // where there are, a cluster has `split` blocks for each of a pair's tiles
  int32_t tiles_m, tiles_n;            // tiles, or pairs of them, along M and N
  int32_t plane_rows_a, plane_rows_b;  // from one plane to the next
  // Null, or what undoes the scaling of A's and B's rows: acc * (root_a[m] * root_b[n])^2. Of
  // planes of a B [K, N] root_b and special_b are null: A has their part.
  const float* root_a;
  const float* root_b;
  // Of two planes: 1 for a row that holds an infinity or a NaN.
  const int32_t* special_a;
  const int32_t* special_b;
  DeviceProgram program;
};
static_assert(sizeof(HopperArguments) <= 4096, "the limit of kernel parameters");

struct HopperKernel {
  const char* name;
  const void* function;
  MathLevel math;
  int16_t planes;  // of each matrix that it multiplies: 1 or 2
  int16_t tile_m, tile_n;
  int8_t chain_dtype;  // serves chains of it alone (see FindChain), faster; or kNoChain: anything
  bool full_operands;  // serves chains with operands [M, N]
  bool ping_pong;      // warpgroups take whole tiles in turns; K is not divided
  int32_t shared_bytes;
};

constexpr int kHopperThreads = 384;
constexpr int kMaxHopperKernels = 40;
constexpr int kMaxCluster = 8;  // every GPU accepts
constexpr int kMaxSplit = kMaxCluster;
constexpr int kMaxHopperTiles = 1 << 24;  // FindTile's limit

// The instantiations, in hopper_*.cu.
using HopperKernels = KernelList<HopperKernel>;
HopperKernels HopperFastChain();
HopperKernels HopperFast();
HopperKernels HopperHalfRows();  // preferred to the next, where it serves
HopperKernels HopperHalfChain();
HopperKernels HopperHalf();
HopperKernels HopperHighChain();
HopperKernels HopperExact();
HopperKernels HopperPlanesChain();
HopperKernels HopperPlanes();

}  // namespace fxfuse

#endif  // FXFUSE_CUDA_HOPPER_KERNELS_H_
