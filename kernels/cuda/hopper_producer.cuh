// The Hopper GEMM's producer: fills the ring of stages by bulk tensor copies.

#ifndef FXFUSE_CUDA_HOPPER_PRODUCER_CUH_
#define FXFUSE_CUDA_HOPPER_PRODUCER_CUH_

#include "hopper_config.cuh"

namespace fxfuse {

__device__ __forceinline__ int RoundUp(int n, int unit) { return (n + unit - 1) / unit * unit; }

// Brings `rows` rows of a plane of B, from `n` on, or as many columns, at `k`, in boxes of `box`.
// Of an interleaved B what lies beyond the last multiple of 32 rows is its tail's.
template <class Config>
__device__ __forceinline__ void CopyB(const HopperArguments& arguments, const CUtensorMap& map,
                                      int box, uint32_t to, uint32_t full, int n, int rows, int k,
                                      int plane) {
  const int first = n + plane * arguments.plane_rows_b;
  const int whole = Config::kPlanes * arguments.plane_rows_b / 32 * 32;
  for (int i = 0; i < rows; i += box) {
    if (arguments.layout_b == LayoutB::kInterleaved) {
      const bool inside = first + i < whole;
      copy_box(to + i * kRowBytes, inside ? &map : &arguments.b_tail, full, k, 0, 0, 0,
               inside ? (first + i) / 32 : 0);
    } else if (arguments.layout_b == LayoutB::kRows) {
      copy_box(to + i * kRowBytes, &map, full, k, first + i);
    } else {
      copy_box(to + i * kRowBytes, &map, full, n + i, k, plane);
    }
  }
}

// Two warps produce, a thread of each: one brings A and announces the bytes of a stage, the other
// (`brings_b`) brings B. One alone is too slow for the narrowest tile.
//
// Boxes that lie outside the matrices are left out: bringing zeros takes longer than bringing data
// (an H200 took 79 us for 1 x 8192 -> 8192 where it took 42 for 128 rows). What the tile holds in
// their place reaches no result that is stored.
template <class Config>
__device__ __forceinline__ void Produce(const HopperArguments& arguments, uint32_t ring,
                                        const Barriers<Config>& barriers, const BlockWork& work,
                                        bool brings_b) {
  RingPosition<Config> at;
  const bool issues = threadIdx.x % 32 == 0;
  TileOrigin tile = FindTile<Config>(arguments, 0);
  await_turn();
  for (int round = 1; tile.row >= 0; tile = FindTile<Config>(arguments, round++)) {
    int stages = work.stages;
    if constexpr (Config::kPlanes == 2) {
      if (HasSpecial<Config>(arguments, tile)) stages *= 2;
    }
    if (!issues) continue;
    const int left_m = static_cast<int>(arguments.program.rows) - tile.row;
    const int left_n = static_cast<int>(arguments.program.columns) - tile.column;
    const bool whole_a = left_m >= Config::kM, whole_b = left_n >= Config::kN;
    const int rows_a = whole_a ? Config::kM : RoundUp(left_m, arguments.edge_a);
    const int rows_b = whole_b ? Config::kN : RoundUp(left_n, arguments.edge_b);
    const int box_a = whole_a ? Config::kM : arguments.edge_a;
    const int box_b =
        whole_b && arguments.layout_b != LayoutB::kColumns ? Config::kN : arguments.edge_b;
    const CUtensorMap& a = whole_a ? arguments.a : arguments.a_edge;
    const CUtensorMap& b = whole_b ? arguments.b : arguments.b_edge;
    for (int stage = 0; stage < stages; ++stage) {
      barrier_wait(barriers.Empty(at.slot), at.parity ^ 1);
      const uint32_t full = barriers.Full(at.slot);
      const uint32_t to_a = ring + at.slot * Config::kStageBytes;
      const uint32_t to_b = to_a + Config::kPlanes * Config::kBytesA;
      const int again = Config::kPlanes == 2 && stage >= work.stages ? work.stages : 0;
      const int k = (work.first_stage + stage - again) * Config::kStageK;
      if (!brings_b) barrier_arrive_expect(full, Config::kPlanes * (rows_a + rows_b) * kRowBytes);
#pragma unroll
      for (int p = 0; p < Config::kPlanes; ++p) {
        if (brings_b) {
          CopyB<Config>(arguments, b, box_b, to_b + p * Config::kBytesB, full, tile.column, rows_b,
                        k, p);
        } else {
          for (int i = 0; i < rows_a; i += box_a) {
            copy_box(to_a + p * Config::kBytesA + i * kRowBytes, &a, full, k,
                     tile.row + p * arguments.plane_rows_a + i);
          }
        }
      }
      at.Advance();
    }
  }
}

}  // namespace fxfuse

#endif  // FXFUSE_CUDA_HOPPER_PRODUCER_CUH_
