// The C entry points of libfxfuse_cuda: check, choose, launch.
//
// Nothing here synchronises or allocates on the device, so once fxfuse_cuda_init has run a call may
// be captured in a CUDA graph.

#include <cuda_runtime_api.h>

#include "choose.h"
#include "common.h"
#include "device.h"
#include "device_program.h"

namespace fxfuse {
namespace {

// What will run: exactly one of the kernels is set.
struct Choice {
  fxfuse_route route;
  const PointwiseKernel* pointwise = nullptr;
  const PortableKernel* portable = nullptr;

  const char* Name() const { return pointwise != nullptr ? pointwise->name : portable->name; }
};

fxfuse_status CheckLimit(const char* call, const char* field, int64_t value, int64_t limit) {
  if (value <= limit) return FXFUSE_OK;
  return Fail(FXFUSE_UNSUPPORTED, "%s: %s=%lld, the kernels take up to %lld", call, field,
              static_cast<long long>(value), static_cast<long long>(limit));
}

// Without addresses (`pointers` null) A and B are taken to start at multiples of 16 bytes.
bool InputsAligned(const fxfuse_problem& problem, void* const* pointers) {
  if (problem.k == 0) return true;
  const void* a = pointers != nullptr ? pointers[FXFUSE_PTR_A] : nullptr;
  const void* b = pointers != nullptr ? pointers[FXFUSE_PTR_B] : nullptr;
  return VectorAligned(a, problem.lda, problem.m, problem.input_dtype) &&
         VectorAligned(b, problem.ldb, problem.n, problem.input_dtype);
}

fxfuse_status ChooseGemm(const char* call, const fxfuse_problem& problem, void* const* pointers,
                         const Device& device, Choice* choice) {
  // The Hopper mainloop will be tried here first, under AUTO as well.
  if (problem.route == FXFUSE_ROUTE_HOPPER) {
    return Fail(FXFUSE_UNSUPPORTED, "%s: route=hopper (%d) is not built into this library", call,
                problem.route);
  }
  if (problem.route == FXFUSE_ROUTE_POINTWISE) {
    return Fail(FXFUSE_BAD_ARGUMENT, "%s: route=pointwise (%d), expected has_gemm=0 with it", call,
                problem.route);
  }
  fxfuse_status status = CheckLimit(call, "k", problem.k, kPortableMaxK);
  if (status != FXFUSE_OK) return status;
  choice->route = FXFUSE_ROUTE_PORTABLE;
  choice->portable = ChoosePortable(problem, InputsAligned(problem, pointers), device.limits);
  if (choice->portable == nullptr) {
    return Fail(FXFUSE_UNSUPPORTED, "%s: no portable kernel fits %d bytes of shared memory", call,
                device.limits.shared_bytes_per_block);
  }
  return FXFUSE_OK;
}

// `problem` has passed CheckProblem.
fxfuse_status Choose(const char* call, const fxfuse_problem& problem, void* const* pointers,
                     const Device& device, Choice* choice) {
  fxfuse_status status = CheckLimit(call, "m", problem.m, kMaxRows);
  if (status == FXFUSE_OK) status = CheckLimit(call, "n", problem.n, kMaxRows);
  if (status != FXFUSE_OK) return status;
  if (problem.has_gemm) return ChooseGemm(call, problem, pointers, device, choice);
  if (problem.route != FXFUSE_ROUTE_AUTO && problem.route != FXFUSE_ROUTE_POINTWISE) {
    return Fail(FXFUSE_BAD_ARGUMENT, "%s: route=%d, expected pointwise (%d) without a GEMM", call,
                problem.route, FXFUSE_ROUTE_POINTWISE);
  }
  choice->route = FXFUSE_ROUTE_POINTWISE;
  choice->pointwise = &PointwiseKernelFor(RequiredMath(problem.program));
  return FXFUSE_OK;
}

fxfuse_status Launch(const char* call, const char* kernel, const void* function, int64_t blocks,
                     int threads, int shared_bytes, void* arguments, void* stream) {
  const fxfuse_status status = CheckLimit(call, "blocks", blocks, INT32_MAX);
  if (status != FXFUSE_OK) return status;
  void* parameters[] = {arguments};
  const cudaError_t error =
      cudaLaunchKernel(function, dim3(static_cast<unsigned>(blocks)), dim3(threads), parameters,
                       shared_bytes, static_cast<cudaStream_t>(stream));
  if (error == cudaSuccess) return FXFUSE_OK;
  // Taken off the runtime's record: it is told here, and must not surface again in a later call.
  cudaGetLastError();
  return Fail(FXFUSE_RUNTIME_ERROR, "%s: launch of %s: %s", call, kernel,
              cudaGetErrorString(error));
}

fxfuse_status RunPointwise(const char* call, const fxfuse_problem& problem, void* const* pointers,
                           const Device& device, const PointwiseKernel& kernel, void* stream) {
  PointwiseArguments arguments;
  arguments.accumulator = pointers[FXFUSE_PTR_A];
  arguments.row_stride = problem.lda;
  arguments.dtype = static_cast<uint8_t>(problem.input_dtype);
  arguments.vector =
      VectorAligned(pointers[FXFUSE_PTR_A], problem.lda, problem.m, problem.input_dtype);
  const PointwiseGrid grid = DividePointwise(kernel, problem.m, problem.n);
  arguments.log2_lanes = static_cast<uint8_t>(grid.log2_lanes);
  arguments.column_blocks = grid.column_blocks;
  arguments.row_blocks = grid.row_blocks;
  TranslateProgram(problem, pointers, &arguments.program);
  const int64_t all = int64_t{grid.column_blocks} * grid.row_blocks;
  const int64_t resident = device.pointwise_blocks[static_cast<int>(kernel.math)];
  return Launch(call, kernel.name, kernel.function, all < resident ? all : resident,
                kPointwiseThreads, 0, &arguments, stream);
}

fxfuse_status RunPortable(const char* call, const fxfuse_problem& problem, void* const* pointers,
                          const PortableKernel& kernel, void* stream) {
  PortableArguments arguments;
  arguments.a = pointers[FXFUSE_PTR_A];
  arguments.b = pointers[FXFUSE_PTR_B];
  arguments.lda = problem.lda;
  arguments.ldb = problem.ldb;
  arguments.m = static_cast<int32_t>(problem.m);
  arguments.n = static_cast<int32_t>(problem.n);
  arguments.k = static_cast<int32_t>(problem.k);
  arguments.tiles_m = static_cast<int32_t>((problem.m + kernel.tile_m - 1) / kernel.tile_m);
  arguments.tiles_n = static_cast<int32_t>((problem.n + kernel.tile_n - 1) / kernel.tile_n);
  arguments.whole_words =
      RowsAligned(arguments.a, problem.lda, problem.m, problem.input_dtype, 4) &&
      RowsAligned(arguments.b, problem.ldb, problem.n, problem.input_dtype, 4);
  TranslateProgram(problem, pointers, &arguments.program);
  return Launch(call, kernel.name, kernel.function, int64_t{arguments.tiles_m} * arguments.tiles_n,
                kernel.threads, kernel.shared_bytes, &arguments, stream);
}

}  // namespace
}  // namespace fxfuse

extern "C" {

const char* fxfuse_build_info(void) { return FXFUSE_CUDA_BUILD_INFO; }

fxfuse_status fxfuse_cuda_init(void) {
  const fxfuse::Device* device;
  return fxfuse::CurrentDevice("fxfuse_cuda_init", &device);
}

fxfuse_status fxfuse_cuda_choose(const fxfuse_problem* problem, int32_t* route,
                                 const char** kernel) {
  constexpr const char* kCall = "fxfuse_cuda_choose";
  fxfuse_status status = fxfuse::CheckProblem(kCall, problem, nullptr, false);
  if (status != FXFUSE_OK) return status;
  const fxfuse::Device* device;
  status = fxfuse::CurrentDevice(kCall, &device);
  if (status != FXFUSE_OK) return status;
  fxfuse::Choice choice;
  status = fxfuse::Choose(kCall, *problem, nullptr, *device, &choice);
  if (status != FXFUSE_OK) return status;
  if (route != nullptr) *route = choice.route;
  if (kernel != nullptr) *kernel = choice.Name();
  return FXFUSE_OK;
}

fxfuse_status fxfuse_cuda_run(const fxfuse_problem* problem, void* const* pointers, void* stream) {
  constexpr const char* kCall = "fxfuse_cuda_run";
  fxfuse_status status = fxfuse::CheckProblem(kCall, problem, pointers, true);
  if (status != FXFUSE_OK) return status;
  const fxfuse::Device* device;
  status = fxfuse::CurrentDevice(kCall, &device);
  if (status != FXFUSE_OK) return status;
  fxfuse::Choice choice;
  status = fxfuse::Choose(kCall, *problem, pointers, *device, &choice);
  if (status != FXFUSE_OK) return status;
  if (problem->m == 0 || problem->n == 0) return FXFUSE_OK;
  if (choice.route == FXFUSE_ROUTE_POINTWISE) {
    return fxfuse::RunPointwise(kCall, *problem, pointers, *device, *choice.pointwise, stream);
  }
  return fxfuse::RunPortable(kCall, *problem, pointers, *choice.portable, stream);
}

}  // extern "C"
