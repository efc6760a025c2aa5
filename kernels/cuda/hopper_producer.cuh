// The Hopper GEMM's producer: fills the ring of stages by bulk tensor copies.

#ifndef FXFUSE_CUDA_HOPPER_PRODUCER_CUH_
#define FXFUSE_CUDA_HOPPER_PRODUCER_CUH_

#include "hopper_config.cuh"

namespace fxfuse {

__device__ __forceinline__ int RoundUp(int n, int unit) { return (n + unit - 1) / unit * unit; }

// A block's tile as its boxes: rows of A and of B (or columns) that it has, and of a box of each.
//
// Boxes that lie outside the matrices are left out: bringing zeros takes longer than bringing data
// (an H200 took 79 us for 1 x 8192 -> 8192 where it took 42 for 128 rows). What the tile holds in
// their place reaches no result that is stored.
template <class Config>
struct TileBoxes {
  TileOrigin tile;
  const CUtensorMap &a, &b;
  int rows_a, rows_b;
  int box_a, box_b;
};

template <class Config>
__device__ __forceinline__ TileBoxes<Config> FindBoxes(const HopperArguments& arguments,
                                                       const TileOrigin& tile) {
  const int left_m = static_cast<int>(arguments.program.rows) - tile.row;
  const int left_n = static_cast<int>(arguments.program.columns) - tile.column;
  const bool whole_a = left_m >= Config::kM, whole_b = left_n >= Config::kN;
  return {tile,
          whole_a ? arguments.a : arguments.a_edge,
          whole_b ? arguments.b : arguments.b_edge,
          whole_a ? Config::kM : RoundUp(left_m, arguments.edge_a),
          whole_b ? Config::kN : RoundUp(left_n, arguments.edge_b),
          whole_a ? Config::kM : arguments.edge_a,
          left_n < Config::kN || arguments.layout_b == LayoutB::kColumns ? arguments.edge_b
                                                                         : Config::kN};
}

// Brings what a tile has of plane `plane` of A at `k`.
template <class Config>
__device__ __forceinline__ void BringA(const HopperArguments& arguments,
                                       const TileBoxes<Config>& boxes, uint32_t stage,
                                       uint32_t full, int k, int plane) {
  for (int i = 0; i < boxes.rows_a; i += boxes.box_a) {
    copy_box(stage + plane * Config::kBytesA + i * kRowBytes, &boxes.a, full, k,
             boxes.tile.row + plane * arguments.plane_rows_a + i);
  }
}

// The same of B. Of an interleaved B what lies beyond the last multiple of 32 rows is its tail's.
template <class Config>
__device__ __forceinline__ void BringB(const HopperArguments& arguments,
                                       const TileBoxes<Config>& boxes, uint32_t stage,
                                       uint32_t full, int k, int plane) {
  const int first = boxes.tile.column + plane * arguments.plane_rows_b;
  const int whole = Config::kPlanes * arguments.plane_rows_b / 32 * 32;
  const uint32_t from = stage + Config::kPlanes * Config::kBytesA + plane * Config::kBytesB;
  for (int i = 0; i < boxes.rows_b; i += boxes.box_b) {
    const uint32_t to = from + i * kRowBytes;
    if (arguments.layout_b == LayoutB::kInterleaved) {
      const bool inside = first + i < whole;
      copy_box(to, inside ? &boxes.b : &arguments.b_tail, full, k, 0, 0, 0,
               inside ? (first + i) / 32 : 0);
    } else if (arguments.layout_b == LayoutB::kRows) {
      copy_box(to, &boxes.b, full, k, first + i);
    } else {
      copy_box(to, &boxes.b, full, boxes.tile.column + i, k, plane);
    }
  }
}

// Two warps produce: one brings A and announces the bytes of a stage, the other (`brings_b`) brings
// B. One alone is too slow for the narrowest tile.
//
// A thread of each issues, but the warp stays together and lane 0 says where things are: what the
// compiler does not know to be uniform it passes to the copy engine in a loop over the warp's
// lanes.
template <class Config>
__device__ __forceinline__ void Produce(const HopperArguments& arguments, uint32_t ring,
                                        const Barriers<Config>& barriers, const BlockWork& work,
                                        bool brings_b) {
  RingPosition<Config> at;
  ring = Uniform(ring);
  const Barriers<Config> uniform{Uniform(barriers.base)};
  const int first_stage = Uniform(work.first_stage);
  TileOrigin tile = FindTile<Config>(arguments, 0);
  await_turn();
  for (int round = 1; tile.row >= 0; tile = FindTile<Config>(arguments, round++)) {
    int stages = work.stages;
    if constexpr (Config::kPlanes == 2) {
      if (HasSpecial<Config>(arguments, tile)) stages *= 2;
    }
    const auto boxes = FindBoxes<Config>(arguments, {Uniform(tile.row), Uniform(tile.column)});
    for (int stage = 0; stage < stages; ++stage) {
      barrier_wait(uniform.Empty(at.slot), at.parity ^ 1);
      const uint32_t full = uniform.Full(at.slot);
      const int again = Config::kPlanes == 2 && stage >= work.stages ? work.stages : 0;
      if (elect_thread()) {
        if (!brings_b) {
          barrier_arrive_expect(full, Config::kPlanes * (boxes.rows_a + boxes.rows_b) * kRowBytes);
        }
        const uint32_t to = ring + at.slot * Config::kStageBytes;
        const int k = (first_stage + stage - again) * Config::kStageK;
#pragma unroll
        for (int p = 0; p < Config::kPlanes; ++p) {
          brings_b ? BringB(arguments, boxes, to, full, k, p)
                   : BringA(arguments, boxes, to, full, k, p);
        }
      }
      at.Advance();
    }
  }
}

}  // namespace fxfuse

#endif  // FXFUSE_CUDA_HOPPER_PRODUCER_CUH_
