#include "pointwise_kernel.h"

#include <algorithm>

#include "kernel_list.h"

namespace fxfuse {

const PointwiseKernel& PointwiseKernelFor(MathLevel math, PointwiseKind kind) {
  const bool is_double = math == MathLevel::kDouble;
  const PointwiseKernels& kernels =
      is_double ? PointwiseF64() : PointwiseF32()[static_cast<int>(math)];
  return kernels[static_cast<int>(kind)];
}

const PointwiseKernel& PointwiseKernelFor(const fxfuse_problem& problem) {
  const MathLevel math = RequiredMath(problem);
  DeviceProgram program;
  PointwiseKind kind = HasSums(problem) ? PointwiseKind::kSums : PointwiseKind::kPlain;
  if (math != MathLevel::kDouble && TranslateGradient(problem, &program)) {
    kind = PointwiseKind::kGradient;
  }
  return PointwiseKernelFor(math, kind);
}

PointwiseGrid DividePointwise(const PointwiseKernel& kernel, int threads, int64_t m, int64_t n) {
  const int64_t vectors = CeilDivide(n, kernel.width);
  // As many threads side by side as waste at most an eighth of them at the end of the row, but a
  // warp's worth where the row has it: short segments would not fill memory transactions.
  int log2_lanes = 0;
  while (1 << log2_lanes < threads) ++log2_lanes;  // all of a block's threads in one row
  while (log2_lanes > 0) {
    const int64_t lanes = int64_t{1} << log2_lanes;
    const int64_t padded = CeilDivide(vectors, lanes) * lanes;
    if (log2_lanes <= 5 && vectors >= lanes) break;
    if (vectors >= lanes && (padded - vectors) * 8 <= padded) break;
    --log2_lanes;
  }
  const int64_t lines = (threads >> log2_lanes) * int64_t{kernel.groups};
  return {threads, log2_lanes, static_cast<uint32_t>(CeilDivide(vectors, int64_t{1} << log2_lanes)),
          static_cast<uint32_t>(CeilDivide(m, lines))};
}

int SlotCount(const fxfuse_problem& problem, PointwiseKind kind) {
  static void* const kNoPointers[FXFUSE_PTR_COUNT] = {};
  return DescribePointwise<PointwiseArguments>(problem, kNoPointers, kind).program.slot_count;
}

PointwiseStrips DivideSums(const PointwiseGrid& grid, int resident) {
  // Enough parts to fill the device, and no sum of too many terms one after another.
  constexpr uint32_t kMaxStrip = 32;
  const uint32_t fewest = static_cast<uint32_t>(CeilDivide(grid.row_blocks, kMaxStrip));
  const uint32_t filling = std::max(1u, resident / grid.column_blocks);
  const uint32_t segments = grid.log2_lanes > 5 ? 1u << (grid.log2_lanes - 5) : 1;
  return {std::min(grid.row_blocks, std::max(fewest, filling)), grid.column_blocks * segments};
}

}  // namespace fxfuse
