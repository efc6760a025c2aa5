#include "hopper_launch.h"

#include <cudaTypedefs.h>
#include <cuda_runtime_api.h>

#include <algorithm>

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

// Describes rows [rows, k] of 16-bit elements in boxes of `box_rows` by 64.
fxfuse_status EncodeRows(const char* call, const char* name, const void* data, int64_t rows,
                         int64_t k, int64_t stride, int dtype, int box_rows, CUtensorMap* map) {
  static const PFN_cuTensorMapEncodeTiled_v12000 encode = FindEncoder();
  if (encode == nullptr) {
    return Fail(FXFUSE_RUNTIME_ERROR, "%s: the driver has no cuTensorMapEncodeTiled (CUDA 12.0)",
                call);
  }
  const CUtensorMapDataType type =
      dtype == FXFUSE_BF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  // The stride of a single row is moot, but must pass the encoder's check all the same.
  const int64_t row_stride = rows > 1 ? stride : CeilDivide(k, 8) * 8;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(k), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(row_stride) * 2};
  const cuuint32_t box[] = {64, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t element_strides[] = {1, 1};
  const CUresult result =
      encode(map, type, 2, const_cast<void*>(data), sizes, strides, box, element_strides,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return FXFUSE_OK;
  return Fail(FXFUSE_RUNTIME_ERROR, "%s: cuTensorMapEncodeTiled of %s [%lld, %lld]: error %d", call,
              name, static_cast<long long>(rows), static_cast<long long>(k),
              static_cast<int>(result));
}

// What a tile of 128 rows costs in cycles of an SM: for each stage of 64 along K, and once for its
// epilogue.
struct TileCost {
  int16_t tile_n;
  int16_t cluster;
  int stage;
  int once;
};

// Fitted to bias -> add -> relu on an H200 at 45 shapes (scripts/bench_routes.py).
constexpr TileCost kTileCosts[] = {{256, 1, 1150, 24000}, {128, 1, 560, 10000}, {64, 1, 350, 3900}};

const TileCost& CostOf(const HopperKernel& kernel) {
  for (const TileCost& cost : kTileCosts) {
    if (cost.tile_n == kernel.tile_n && cost.cluster == kernel.cluster) return cost;
  }
  return kTileCosts[0];
}

int64_t Cost(const HopperKernel& kernel, const fxfuse_problem& problem,
             const DeviceLimits& device) {
  const int64_t stages = CeilDivide(problem.k, 64);
  const int64_t clusters =
      CeilDivide(problem.m, kernel.tile_m * kernel.cluster) * CeilDivide(problem.n, kernel.tile_n);
  const int64_t per_block = CeilDivide(clusters, device.hopper_clusters[kernel.cluster - 1]);
  const TileCost& cost = CostOf(kernel);
  return per_block * (stages * cost.stage + cost.once);
}

// The launch of `blocks` blocks; `cluster` is storage the result refers to.
cudaLaunchConfig_t Configure(const HopperKernel& kernel, int blocks, void* stream,
                             cudaLaunchAttribute* cluster) {
  cluster->id = cudaLaunchAttributeClusterDimension;
  cluster->val.clusterDim = {static_cast<unsigned>(kernel.cluster), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kHopperThreads);
  config.dynamicSmemBytes = static_cast<size_t>(kernel.shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = cluster;
  config.numAttrs = kernel.cluster > 1 ? 1 : 0;
  return config;
}

}  // namespace

HopperKernels AllHopperKernels() {
  static const KernelTable<HopperKernel, kMaxHopperKernels> table = {HopperBf16(), HopperF16()};
  return table.List();
}

const HopperKernel* ChooseHopper(const fxfuse_problem& problem, bool aligned,
                                 const DeviceLimits& device) {
  if (!device.hopper || !aligned || problem.k == 0) return nullptr;
  return BestKernel(
      AllHopperKernels(), problem, [](const HopperKernel&) { return true; },
      [&](const HopperKernel& kernel) { return Cost(kernel, problem, device); });
}

fxfuse_status PrepareHopper(const char* call, DeviceLimits* device) {
  const HopperKernels all = AllHopperKernels();
  device->hopper_clusters[0] = device->sm_count;
  device->hopper_clusters[1] = device->sm_count / 2;
  for (int i = 0; i < all.count; ++i) {
    const HopperKernel& kernel = all.kernel[i];
    cudaFuncAttributes attributes;
    cudaError_t error = cudaFuncGetAttributes(&attributes, kernel.function);  // loads the kernel
    if (error == cudaSuccess) {
      error = cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   kernel.shared_bytes);
    }
    // Both blocks of a pair must sit in one group of SMs, so there may be fewer pairs than half the
    // SMs; one pair too many would run alone after all the others.
    if (error == cudaSuccess && kernel.cluster > 1) {
      cudaLaunchAttribute cluster;
      cudaLaunchConfig_t config = Configure(kernel, device->sm_count / 2 * 2, nullptr, &cluster);
      int clusters = 0;
      error = cudaOccupancyMaxActiveClusters(&clusters, kernel.function, &config);
      device->hopper_clusters[1] = std::min(device->hopper_clusters[1], clusters);
    }
    if (error != cudaSuccess) {
      cudaGetLastError();
      return Fail(FXFUSE_RUNTIME_ERROR, "%s: %s: %s", call, kernel.name, cudaGetErrorString(error));
    }
  }
  return FXFUSE_OK;
}

fxfuse_status LaunchHopper(const char* call, const fxfuse_problem& problem, void* const* pointers,
                           const DeviceLimits& device, const HopperKernel& kernel, void* stream) {
  HopperArguments arguments;
  fxfuse_status status = EncodeRows(call, "A", pointers[FXFUSE_PTR_A], problem.m, problem.k,
                                    problem.lda, problem.input_dtype, kernel.tile_m, &arguments.a);
  if (status != FXFUSE_OK) return status;
  status = EncodeRows(call, "B", pointers[FXFUSE_PTR_B], problem.n, problem.k, problem.ldb,
                      problem.input_dtype, kernel.tile_n / kernel.cluster, &arguments.b);
  if (status != FXFUSE_OK) return status;
  arguments.stages = static_cast<int32_t>(CeilDivide(problem.k, 64));
  const int64_t tiles_m = CeilDivide(problem.m, int64_t{kernel.tile_m} * kernel.cluster);
  const int64_t tiles_n = CeilDivide(problem.n, kernel.tile_n);
  if (tiles_m * tiles_n > INT32_MAX / 2) {
    return Fail(FXFUSE_UNSUPPORTED, "%s: %lld tiles, %s takes up to %d", call,
                static_cast<long long>(tiles_m * tiles_n), kernel.name, INT32_MAX / 2);
  }
  arguments.tiles_m = static_cast<int32_t>(tiles_m);
  arguments.tiles_n = static_cast<int32_t>(tiles_n);
  TranslateProgram(problem, pointers, &arguments.program);
  // Its first instruction adds the bias, unless the accumulators can begin with it.
  const void* bias = problem.has_bias ? pointers[FXFUSE_PTR_BIAS] : nullptr;
  const bool paired = problem.n % 2 == 0 && reinterpret_cast<uintptr_t>(bias) % 4 == 0;
  arguments.bias = paired ? bias : nullptr;
  arguments.first = arguments.bias != nullptr ? 1 : 0;

  const int64_t resident = device.hopper_clusters[kernel.cluster - 1];
  const int clusters = static_cast<int>(std::min(tiles_m * tiles_n, resident));
  cudaLaunchAttribute cluster;
  const cudaLaunchConfig_t config = Configure(kernel, clusters * kernel.cluster, stream, &cluster);
  void* parameters[] = {&arguments};
  const cudaError_t error = cudaLaunchKernelExC(&config, kernel.function, parameters);
  if (error == cudaSuccess) return FXFUSE_OK;
  cudaGetLastError();
  return Fail(FXFUSE_RUNTIME_ERROR, "%s: launch of %s: %s", call, kernel.name,
              cudaGetErrorString(error));
}

}  // namespace fxfuse
