// The C entry points of libfxfuse_cuda: check, choose, launch.
//
// Nothing here synchronises or allocates on the device, so once fxfuse_cuda_init has run a call may
// be captured in a CUDA graph.

#include "choose.h"
#include "common.h"
#include "device.h"
#include "device_program.h"
#include "hopper_launch.h"
#include "launch.h"
#include "skinny_launch.h"
#include "split.h"

namespace fxfuse {
namespace {

// What will run: exactly one of the kernels is set.
struct Choice {
  fxfuse_route route;
  const PointwiseKernel* pointwise = nullptr;
  const PortableKernel* portable = nullptr;
  HopperChoice hopper;
  SkinnyChoice skinny;

  const char* Name() const {
    if (pointwise != nullptr) return pointwise->name;
    if (skinny.kernel != nullptr) return skinny.kernel->name;
    return hopper.kernel != nullptr ? hopper.kernel->name : portable->name;
  }
};

// Without addresses (`pointers` null) A and B are taken to start at multiples of 16 bytes.
bool InputsAligned(const fxfuse_problem& problem, void* const* pointers) {
  if (problem.k == 0) return true;
  const void* a = pointers != nullptr ? pointers[FXFUSE_PTR_A] : nullptr;
  const void* b = pointers != nullptr ? pointers[FXFUSE_PTR_B] : nullptr;
  return VectorAligned(a, problem.lda, problem.m, problem.input_dtype) &&
         VectorAligned(b, problem.ldb, problem.b_transposed ? problem.k : problem.n,
                       problem.input_dtype);
}

// The Hopper route has more to set up than a handful of rows or a tiny problem takes, unless few
// columns leave the portable tiles few SMs to read a long K with (measured on an H200,
// scripts/bench_routes.py).
bool PortableIsFaster(const fxfuse_problem& problem) {
  if (problem.b_transposed || problem.planes > 0) return false;
  if (problem.m <= 32) return problem.n >= 8192 || problem.k <= 1024;
  if (problem.m <= 64 && problem.n > 2048) return false;
  constexpr double kTiny = 1 << 27;
  return problem.k <= 1024 && static_cast<double>(problem.m) * problem.n * problem.k <= kTiny;
}

fxfuse_status ChooseGemm(const char* call, const fxfuse_problem& problem, void* const* pointers,
                         const Device& device, Choice* choice) {
  const bool aligned = InputsAligned(problem, pointers);
  const bool automatic =
      problem.route == FXFUSE_ROUTE_AUTO && (GroupWidth(problem) > 0 || !PortableIsFaster(problem));
  if (automatic || problem.route == FXFUSE_ROUTE_HOPPER) {
    choice->route = FXFUSE_ROUTE_HOPPER;
    choice->hopper = ChooseHopper(problem, pointers, aligned, device.limits);
    if (choice->hopper.kernel != nullptr) return FXFUSE_OK;
  }
  if (GroupWidth(problem) > 0) {
    return Fail(FXFUSE_UNSUPPORTED,
                "%s: groups of %d columns: after a GEMM only a chain of the Hopper route takes "
                "groups, of %d columns or that times a power of two, up to a tile's",
                call, GroupWidth(problem), kMinChainGroup);
  }
  if (problem.route == FXFUSE_ROUTE_HOPPER) {
    return Fail(FXFUSE_UNSUPPORTED,
                "%s: route=hopper (%d) takes 16-bit inputs with rows at multiples of 16 bytes and "
                "K > 0, on sm_90",
                call, problem.route);
  }
  if (problem.route == FXFUSE_ROUTE_SKINNY) {
    choice->route = FXFUSE_ROUTE_SKINNY;
    choice->skinny = ChooseSkinny(problem, aligned, device.limits);
    if (choice->skinny.kernel != nullptr) return FXFUSE_OK;
    return Fail(FXFUSE_UNSUPPORTED,
                "%s: route=skinny (%d), m=%lld, k=%lld, ldb=%lld: it takes fp32 inputs, B [N, K], "
                "rows at multiples of 16 bytes, m up to %d, k a multiple of 4 up to %lld, ldb up "
                "to %lld",
                call, problem.route, static_cast<long long>(problem.m),
                static_cast<long long>(problem.k), static_cast<long long>(problem.ldb), kSkinnyMaxM,
                static_cast<long long>(kSkinnyMaxK), static_cast<long long>(kSkinnyMaxStride));
  }
  if (problem.route == FXFUSE_ROUTE_POINTWISE) {
    return Fail(FXFUSE_BAD_ARGUMENT, "%s: route=pointwise (%d), expected has_gemm=0 with it", call,
                problem.route);
  }
  if (problem.b_transposed || problem.planes == 1) {
    return Fail(FXFUSE_UNSUPPORTED,
                "%s: b_transposed=%d, planes=%d: the portable route takes B [N, K] and no single "
                "planes, and the Hopper route cannot serve the problem",
                call, problem.b_transposed, problem.planes);
  }
  fxfuse_status status = CheckLimit(call, "k", problem.k, kPortableMaxK);
  if (status != FXFUSE_OK) return status;
  choice->route = FXFUSE_ROUTE_PORTABLE;
  choice->portable = ChoosePortable(problem, aligned, device.limits);
  if (choice->portable != nullptr) return FXFUSE_OK;
  if (problem.planes > 0) {
    return Fail(FXFUSE_UNSUPPORTED,
                "%s: planes=%d, lda=%lld, ldb=%lld: the portable route takes rows of planes at "
                "multiples of 16 bytes, and strides below %d",
                call, problem.planes, static_cast<long long>(problem.lda),
                static_cast<long long>(problem.ldb), 1 << 23);
  }
  return Fail(FXFUSE_UNSUPPORTED, "%s: no portable kernel fits %d bytes of shared memory", call,
              device.limits.shared_bytes_per_block);
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
  choice->pointwise = &PointwiseKernelFor(problem);
  const int width = choice->pointwise->width;
  if (LanesCoverGroups(problem, width)) return FXFUSE_OK;
  return Fail(FXFUSE_UNSUPPORTED,
              "%s: groups of %d columns, %s takes %d or that times a power of two, up to %d", call,
              GroupWidth(problem), choice->pointwise->name, width, 32 * width);
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
    return fxfuse::LaunchPointwise(kCall, *problem, pointers, *device, *choice.pointwise, stream);
  }
  if (choice.route == FXFUSE_ROUTE_HOPPER) {
    return fxfuse::LaunchHopper(kCall, *problem, pointers, device->limits, choice.hopper, stream);
  }
  if (choice.route == FXFUSE_ROUTE_SKINNY) {
    return fxfuse::LaunchSkinny(kCall, *problem, pointers, device->limits, choice.skinny, stream);
  }
  return fxfuse::LaunchPortable(kCall, *problem, pointers, device->limits, *choice.portable,
                                stream);
}

fxfuse_status fxfuse_cuda_partials(const fxfuse_problem* problem, int64_t* p, int64_t* q) {
  constexpr const char* kCall = "fxfuse_cuda_partials";
  fxfuse_status status = fxfuse::CheckProblem(kCall, problem, nullptr, false);
  if (status != FXFUSE_OK) return status;
  if (p == nullptr || q == nullptr) {
    return fxfuse::Fail(FXFUSE_BAD_ARGUMENT, "%s: %s=null, expected an address", kCall,
                        p == nullptr ? "p" : "q");
  }
  *p = *q = 0;
  if (problem->has_gemm || problem->m == 0 || problem->n == 0) return FXFUSE_OK;
  const fxfuse::Device* device;
  status = fxfuse::CurrentDevice(kCall, &device);
  if (status != FXFUSE_OK) return status;
  fxfuse::Choice choice;
  status = fxfuse::Choose(kCall, *problem, nullptr, *device, &choice);
  if (status != FXFUSE_OK) return status;
  fxfuse::PartialSums(*problem, *device, *choice.pointwise, p, q);
  return FXFUSE_OK;
}

fxfuse_status fxfuse_cuda_add_parts(const float* source, int64_t count, int64_t parts, int64_t n,
                                    void* sums, int32_t dtype, void* stream) {
  constexpr const char* kCall = "fxfuse_cuda_add_parts";
  constexpr int64_t kMost = INT32_MAX;
  const struct {
    const char* field;
    int64_t value, least;
  } sizes[] = {{"count", count, 0}, {"parts", parts, 1}, {"n", n, 0}};
  for (const auto& [field, value, least] : sizes) {
    if (value >= least && value <= kMost) continue;
    return fxfuse::Fail(FXFUSE_BAD_ARGUMENT, "%s: %s=%lld, expected %lld to %lld", kCall, field,
                        static_cast<long long>(value), static_cast<long long>(least),
                        static_cast<long long>(kMost));
  }
  if (dtype != FXFUSE_F32 && dtype != FXFUSE_F16 && dtype != FXFUSE_BF16) {
    return fxfuse::Fail(FXFUSE_BAD_ARGUMENT,
                        "%s: dtype=%d, expected f32 (%d), f16 (%d) or bf16 (%d)", kCall, dtype,
                        FXFUSE_F32, FXFUSE_F16, FXFUSE_BF16);
  }
  if (count == 0 || n == 0) return FXFUSE_OK;
  if (source == nullptr || sums == nullptr) {
    return fxfuse::Fail(FXFUSE_BAD_ARGUMENT, "%s: %s=null, expected an address", kCall,
                        source == nullptr ? "source" : "sums");
  }
  const fxfuse::Device* device;
  const fxfuse_status status = fxfuse::CurrentDevice(kCall, &device);
  if (status != FXFUSE_OK) return status;
  fxfuse::AddPartsArguments arguments = {source, sums, n, static_cast<int32_t>(parts), dtype, 0};
  return fxfuse::LaunchAddParts(kCall, device->limits, count, &arguments, stream);
}

fxfuse_status fxfuse_cuda_split(const fxfuse_split* matrices, int count, void* stream) {
  constexpr const char* kCall = "fxfuse_cuda_split";
  fxfuse_status status = fxfuse::CheckSplit(kCall, matrices, count);
  if (status != FXFUSE_OK) return status;
  const fxfuse::Device* device;
  status = fxfuse::CurrentDevice(kCall, &device);
  if (status != FXFUSE_OK) return status;
  return fxfuse::LaunchSplit(kCall, device->limits, matrices, count, stream);
}

}  // extern "C"
