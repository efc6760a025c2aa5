// Adds up parts of sums over rows. A warp takes every eighth part of 32 columns, and the first warp
// what all eight have: always in the same order.

#include "add_parts.h"
#include "memory.cuh"
#include "ptx.cuh"

namespace fxfuse {
namespace {

constexpr int kAddPartsColumns = 32;
constexpr int kAddPartsWarps = 8;

__global__ void __launch_bounds__(kAddPartsColumns* kAddPartsWarps)
    AddParts(const __grid_constant__ AddPartsArguments arguments) {
  __shared__ float of_warp[kAddPartsWarps][kAddPartsColumns];
  const int64_t matrix = static_cast<int>(blockIdx.x) / arguments.columns;
  const int block = static_cast<int>(blockIdx.x) % arguments.columns;
  const int warp = static_cast<int>(threadIdx.x) / kAddPartsColumns;
  const int lane = static_cast<int>(threadIdx.x) % kAddPartsColumns;
  const int64_t column = static_cast<int64_t>(block) * kAddPartsColumns + lane;
  const bool inside = column < arguments.n;
  const float* const from = arguments.source + matrix * arguments.parts * arguments.n + column;
  await_turn();
  float sum = 0.0f;
#pragma unroll 8
  for (int i = warp; i < arguments.parts; i += kAddPartsWarps) {
    sum += inside ? from[i * arguments.n] : 0.0f;
  }
  of_warp[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || !inside) return;
#pragma unroll
  for (int i = 1; i < kAddPartsWarps; ++i) sum += of_warp[i][lane];
  StoreElement(arguments.sums, arguments.dtype, matrix * arguments.n + column, sum);
}

}  // namespace

const AddPartsKernel& TheAddPartsKernel() {
  static const AddPartsKernel kernel = {"add_parts", reinterpret_cast<const void*>(&AddParts),
                                        kAddPartsColumns * kAddPartsWarps, kAddPartsColumns};
  return kernel;
}

}  // namespace fxfuse
