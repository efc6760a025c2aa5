// The entry points of libfxfuse_cpu: instruction set, threads, and the call itself.

#include <pthread.h>
#include <string.h>

#include <atomic>

#include "common.h"
#include "include/fxfuse.h"
#include "interpreter.h"
#include "isa.h"
#include "plan.h"

namespace fxfuse {
namespace {

struct Isa {
  const IsaKernels* kernels;
  bool (*is_supported)();
};

const Isa kIsas[] = {
// best first
#if defined(FXFUSE_X86)
    {&avx512::kKernels,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
     }},
    {&avx2::kKernels,
     [] {
       return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
              __builtin_cpu_supports("f16c");
     }},
#endif
    {&baseline::kKernels, [] { return true; }},
};

const IsaKernels* BestIsa() {
  for (const Isa& isa : kIsas) {
    if (isa.is_supported()) return isa.kernels;
  }
  return &baseline::kKernels;
}

// Null until first asked for or set.
std::atomic<const IsaKernels*> current_isa{nullptr};
std::atomic<fxfuse_parallel> current_parallel{nullptr};

const IsaKernels& CurrentIsa() {
  const IsaKernels* isa = current_isa.load(std::memory_order_acquire);
  if (isa == nullptr) {
    isa = BestIsa();
    current_isa.store(isa, std::memory_order_release);
  }
  return *isa;
}

// Work, in additions, below which another thread costs more than it brings (some 20 us).
constexpr int64_t kWorkPerThread = 400000;
// Turns in which a thread comes back for more: enough to even out a core that others use too.
constexpr int64_t kChunksPerThread = 16;

// A call under way, shared by its threads.
struct Job {
  const Plan& plan;
  int64_t chunk;  // strips taken at a time
  std::atomic<int64_t> next{0};
  std::atomic<bool> is_out_of_memory{false};
};

void Work(void* data) {
  Job& job = *static_cast<Job*>(data);
  int64_t first = job.next.fetch_add(job.chunk, std::memory_order_relaxed);
  if (first >= job.plan.strip_count) return;
  Interpreter interpreter(job.plan);
  if (!interpreter.ok()) {
    job.is_out_of_memory.store(true, std::memory_order_relaxed);
    return;
  }
  const int64_t count = job.plan.strip_count;
  while (first < count) {
    const int64_t last = first + job.chunk < count ? first + job.chunk : count;
    for (int64_t i = first; i < last; ++i) interpreter.RunStrip(i);
    first = job.next.fetch_add(job.chunk, std::memory_order_relaxed);
  }
}

void* WorkOnHelper(void* job) {
  Work(job);
  return nullptr;
}

// Without a thread pool to borrow: threads of our own, as many as can be had. POSIX threads, since
// std::thread would tie the library to the newest C library's symbols and throws besides.
void WorkOnOwnThreads(Job* job, int threads) {
  constexpr int kMaxHelpers = 255;
  pthread_t helper[kMaxHelpers];
  int count = 0;
  while (count < threads - 1 && count < kMaxHelpers &&
         pthread_create(&helper[count], nullptr, WorkOnHelper, job) == 0) {
    ++count;
  }
  Work(job);
  for (int i = 0; i < count; ++i) pthread_join(helper[i], nullptr);
}

fxfuse_status RunPlan(const Plan& plan, int threads) {
  const int64_t elements = plan.rows * plan.columns;
  const int64_t work =
      elements > INT64_MAX / plan.element_cost ? INT64_MAX : elements * plan.element_cost;
  int64_t useful = work / kWorkPerThread;
  if (useful > plan.strip_count) useful = plan.strip_count;
  if (useful < threads) threads = useful < 1 ? 1 : static_cast<int>(useful);
  int64_t chunk = plan.strip_count / (threads * kChunksPerThread);
  if (threads == 1) chunk = plan.strip_count;
  Job job{plan, chunk < 1 ? 1 : chunk};
  const fxfuse_parallel parallel = current_parallel.load(std::memory_order_acquire);
  if (threads == 1) {
    Work(&job);
  } else if (parallel != nullptr) {
    parallel(Work, &job, static_cast<unsigned>(threads), 0);
  } else {
    WorkOnOwnThreads(&job, threads);
  }
  if (!job.is_out_of_memory) return FXFUSE_OK;
  return Fail(FXFUSE_RUNTIME_ERROR, "fxfuse_cpu_run: no memory for %d fragments of %d floats",
              plan.buffer_count, plan.fragment);
}

}  // namespace
}  // namespace fxfuse

extern "C" {

const char* fxfuse_build_info(void) { return FXFUSE_BUILD_INFO; }

void fxfuse_cpu_set_parallel(fxfuse_parallel parallel) {
  fxfuse::current_parallel.store(parallel, std::memory_order_release);
}

const char* fxfuse_cpu_isa(void) { return fxfuse::CurrentIsa().name; }

fxfuse_status fxfuse_cpu_set_isa(const char* name) {
  if (name == nullptr) {
    return fxfuse::Fail(FXFUSE_BAD_ARGUMENT, "fxfuse_cpu_set_isa: name=null, expected a name");
  }
  for (const fxfuse::Isa& isa : fxfuse::kIsas) {
    if (strcmp(isa.kernels->name, name) != 0) continue;
    if (!isa.is_supported()) break;
    fxfuse::current_isa.store(isa.kernels, std::memory_order_release);
    return FXFUSE_OK;
  }
  return fxfuse::Fail(FXFUSE_UNSUPPORTED,
                      "fxfuse_cpu_set_isa: name=%s, expected baseline or what this CPU has of "
                      "avx2 and avx512 (best here: %s)",
                      name, fxfuse::BestIsa()->name);
}

fxfuse_status fxfuse_cpu_run(const fxfuse_problem* problem, void* const* pointers, int threads) {
  const fxfuse_status status = fxfuse::CheckProblem("fxfuse_cpu_run", problem, pointers, true);
  if (status != FXFUSE_OK) return status;
  if (problem->has_gemm) {
    return fxfuse::Fail(FXFUSE_BAD_ARGUMENT, "fxfuse_cpu_run: has_gemm=1, expected 0");
  }
  if (fxfuse::IsDouble(*problem)) {
    return fxfuse::Fail(FXFUSE_UNSUPPORTED,
                        "fxfuse_cpu_run: a tensor is f64 (%d), which only libfxfuse_cuda takes",
                        FXFUSE_F64);
  }
  if (threads < 1) {
    return fxfuse::Fail(FXFUSE_BAD_ARGUMENT, "fxfuse_cpu_run: threads=%d, expected 1 or more",
                        threads);
  }
  if (problem->m == 0 || problem->n == 0) return FXFUSE_OK;
  fxfuse::Plan plan;
  fxfuse::MakePlan(*problem, pointers, fxfuse::CurrentIsa(), &plan);
  return fxfuse::RunPlan(plan, threads);
}

fxfuse_status fxfuse_cpu_partials(const fxfuse_problem* problem, int64_t* p, int64_t* q) {
  constexpr const char* kCall = "fxfuse_cpu_partials";
  const fxfuse_status status = fxfuse::CheckProblem(kCall, problem, nullptr, false);
  if (status != FXFUSE_OK) return status;
  if (p == nullptr || q == nullptr) {
    return fxfuse::Fail(FXFUSE_BAD_ARGUMENT, "%s: %s=null, expected an address", kCall,
                        p == nullptr ? "p" : "q");
  }
  *p = *q = 0;
  if (problem->m > 0 && problem->n > 0) fxfuse::PartialSums(*problem, p, q);
  return FXFUSE_OK;
}

}  // extern "C"
