// The Hopper GEMM's producer: fills the ring of stages by bulk tensor copies.

#ifndef FXFUSE_CUDA_HOPPER_PRODUCER_CUH_
#define FXFUSE_CUDA_HOPPER_PRODUCER_CUH_

#include <type_traits>

#include "hopper_config.cuh"

namespace fxfuse {

// Rows of the boxes that hold `left` rows, at the edge of a matrix. Where there are several they
// have 32 rows or 64.
__device__ __forceinline__ int RowsInBoxes(int left, int box) {
  return left <= 0 ? 0 : left <= box ? box : (left + box - 1) & -box;
}

// What a warp brings: A, or B as it lies.
enum class Brings { kA, kInterleavedB, kRowsB, kColumnsB };

// A tile's rows of a matrix (or columns), of which this block brings boxes from row `first` on, a
// box each `step` rows: all of them, or, where pairs share the matrix, every other one, to `blocks`
// of the cluster.
//
// Boxes that lie outside the matrices are left out: bringing zeros takes longer than bringing data
// (an H200 took 79 us for 1 x 8192 -> 8192 where it took 42 for 128 rows). What the tile holds in
// their place reaches no result that is stored.
struct Boxes {
  const CUtensorMap* map;
  int rows;
  int first, step;
  uint16_t blocks;

  __device__ __forceinline__ Boxes(const HopperArguments& arguments, const CUtensorMap* map,
                                   int rows, int box, bool shared)
      : map(map), rows(rows), first(0), step(box), blocks(0) {
    if (!shared) return;
    first = FirstRank(arguments) == 0 ? 0 : box;
    step = 2 * box;
    blocks = static_cast<uint16_t>(1 << cluster_rank() | 1 << Partner(arguments));
  }
};

// Those of A, or of B.
template <class Config, bool kOfA>
__device__ __forceinline__ Boxes FindBoxes(const HopperArguments& arguments,
                                           const TileOrigin& tile) {
  constexpr int kRows = kOfA ? Config::kM : Config::kN;
  const bool shared = arguments.pairs == (kOfA ? Pairs::kShareA : Pairs::kShareB);
  const int all = static_cast<int>(kOfA ? arguments.program.rows : arguments.program.columns);
  const int left = all - (kOfA ? tile.row : tile.column);
  const int edge = kOfA ? arguments.edge_a : arguments.edge_b;
  if (left < kRows) {
    const CUtensorMap* map = kOfA ? &arguments.a_edge : &arguments.b_edge;
    return {arguments, map, RowsInBoxes(left, edge), edge, shared};
  }
  const bool by_columns = !kOfA && arguments.layout_b == LayoutB::kColumns;
  const int whole = by_columns ? edge : shared ? kRows / 2 : kRows;
  return {arguments, kOfA ? &arguments.a : &arguments.b, kRows, whole, shared};
}

// Brings what a tile that begins at row `origin` of a matrix (or column) has of one plane at `k`.
// Of an interleaved B what lies beyond the last multiple of 32 rows is its tail's.
template <class Config, Brings kBrings>
__device__ __forceinline__ void Bring(const HopperArguments& arguments, const Boxes& boxes,
                                      int origin, uint32_t stage, uint32_t full, int k, int plane) {
  constexpr bool kOfA = kBrings == Brings::kA;
  const uint32_t from =
      stage + (kOfA ? plane * Config::kBytesA
                    : Config::kPlanes * Config::kBytesA + plane * Config::kBytesB);
  const int first = origin + plane * (kOfA ? arguments.plane_rows_a : arguments.plane_rows_b);
  const int whole = Config::kPlanes * arguments.plane_rows_b / 32 * 32;
  for (int i = boxes.first; i < boxes.rows; i += boxes.step) {
    const uint32_t to = from + i * kRowBytes;
    if constexpr (kBrings == Brings::kInterleavedB) {
      const bool inside = first + i < whole;
      copy_box(to, inside ? boxes.map : &arguments.b_tail, full, boxes.blocks, k, 0, 0, 0,
               inside ? (first + i) / 32 : 0);
    } else if constexpr (kBrings == Brings::kColumnsB) {
      copy_box(to, boxes.map, full, boxes.blocks, origin + i, k, plane);
    } else {
      copy_box(to, boxes.map, full, boxes.blocks, k, first + i);
    }
  }
}

// Four warps produce, each every other stage (from `turn` on, 0 or 1) of one matrix. It takes a
// warp some hundred cycles to see that a slot is free and to ask for a stage, whatever it brings:
// with one warp to a matrix that was the limit of narrow tiles.
//
// Each announces all bytes of its matrix, whichever block of a pair brings them, also where there
// are none: a stage waits for both, or a warp with nothing to bring could be left behind by the
// ring.
//
// A thread of each issues, but the warp stays together and lane 0 says where things are: what the
// compiler does not know to be uniform it passes to the copy engine in a loop over the warp's
// lanes.
template <class Config, Brings kBrings>
__device__ __forceinline__ void ProduceOf(const HopperArguments& arguments, uint32_t ring,
                                          const Barriers<Config>& barriers, const BlockWork& work,
                                          TileOrigin tile, int turn) {
  constexpr int kTurns = 2;
  constexpr bool kOfA = kBrings == Brings::kA;
  RingPosition<Config> at;
  if (turn == 1) at.Advance();
  ring = Uniform(ring);
  const Barriers<Config> uniform{Uniform(barriers.base)};
  const int first_stage = Uniform(work.first_stage);
  int stage = turn;
  await_turn();
  for (int round = 1; tile.row >= 0; tile = FindTile<Config>(arguments, round++)) {
    const TileOrigin origin = {Uniform(tile.row), Uniform(tile.column)};
    const Boxes boxes = FindBoxes<Config, kOfA>(arguments, origin);
    int stages = work.stages;
    if constexpr (Config::kPlanes == 2) {
      if (HasSpecial<Config>(arguments, tile)) stages *= 2;
    }
    for (; stage < stages; stage += kTurns) {
      barrier_wait(uniform.Empty(at.slot), at.parity ^ 1);
      const uint32_t full = uniform.Full(at.slot);
      const int again = Config::kPlanes == 2 && stage >= work.stages ? work.stages : 0;
      if (elect_thread()) {
        barrier_arrive_expect(full, Config::kPlanes * boxes.rows * kRowBytes);
        const uint32_t to = ring + at.slot * Config::kStageBytes;
        const int k = (first_stage + stage - again) * Config::kStageK;
#pragma unroll
        for (int p = 0; p < Config::kPlanes; ++p) {
          Bring<Config, kBrings>(arguments, boxes, kOfA ? origin.row : origin.column, to, full, k,
                                 p);
        }
      }
      at.Advance(kTurns);
    }
    stage -= stages;
  }
  // A block of a pair stays until both have read all there is: they tell each other.
  if (arguments.pairs == Pairs::kNone) return;
  for (; stage < Config::kStages; stage += kTurns) {
    barrier_wait(uniform.Empty(at.slot), at.parity ^ 1);
    at.Advance(kTurns);
  }
}

// The part of warp `warp` of the four.
template <class Config>
__device__ __forceinline__ void Produce(const HopperArguments& arguments, uint32_t ring,
                                        const Barriers<Config>& barriers, const BlockWork& work,
                                        const TileOrigin& first, int warp) {
  const auto produce = [&](auto brings) {
    ProduceOf<Config, brings.value>(arguments, ring, barriers, work, first, warp / 2);
  };
  if (warp % 2 == 0) return produce(std::integral_constant<Brings, Brings::kA>());
  switch (arguments.layout_b) {
    case LayoutB::kInterleaved:
      return produce(std::integral_constant<Brings, Brings::kInterleavedB>());
    case LayoutB::kRows:
      return produce(std::integral_constant<Brings, Brings::kRowsB>());
    case LayoutB::kColumns:
      return produce(std::integral_constant<Brings, Brings::kColumnsB>());
  }
}

}  // namespace fxfuse

#endif  // FXFUSE_CUDA_HOPPER_PRODUCER_CUH_
