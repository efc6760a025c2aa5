// The PTX instructions of sm_90a that the Hopper mainloop is made of, one thin function each:
// mbarriers, bulk tensor copies, warpgroup multiply-adds, register reallocation, clusters.

#ifndef FXFUSE_CUDA_PTX_HOPPER_CUH_
#define FXFUSE_CUDA_PTX_HOPPER_CUH_

#include <cuda.h>
#include <stdint.h>

#include "ptx.cuh"

namespace fxfuse {

// mbarriers. Phases alternate between parity 0 and 1; waiting for parity 1 of a barrier nobody has
// arrived at returns at once, as if the phase before the first were complete.

__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the copy engine and to the other blocks of the cluster.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "WAIT:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra DONE;\n"
      "bra WAIT;\n"
      "DONE:\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Arrives where `condition` holds; a branch around the arrival would cost more than it does.
__device__ __forceinline__ void barrier_arrive(uint32_t barrier, bool condition = true) {
  asm volatile(
      "{\n"
      ".reg .pred arrives;\n"
      "setp.ne.b32 arrives, %1, 0;\n"
      "@arrives mbarrier.arrive.shared::cta.b64 _, [%0];\n"
      "}" ::"r"(barrier),
      "r"(static_cast<int>(condition))
      : "memory");
}

// Arrives, and announces `bytes` that bulk copies will yet bring in this phase.
__device__ __forceinline__ void barrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// Bulk tensor copies: a box of a tensor of 2, 3 or 5 dimensions to shared memory, its inner
// coordinate first. What lies outside the tensor arrives as zeros and counts as bytes brought.
// blocks: 0, or a bit for each block of the cluster that gets the box, at the same place as this
// one and counted at the same barrier of its own.

__device__ __forceinline__ void prefetch_tensor_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

#define FXFUSE_COPY_BOX(dimensions, coordinates, ...)                                      \
  do {                                                                                     \
    if (blocks == 0) {                                                                     \
      asm volatile("cp.async.bulk.tensor." dimensions                                      \
                   ".shared::cluster.global.tile.mbarrier::complete_tx::bytes"             \
                   " [%0], [%1, " coordinates "], [%2];" ::"r"(to),                        \
                   "l"(map), "r"(barrier), "h"(blocks), __VA_ARGS__                        \
                   : "memory");                                                            \
    } else {                                                                               \
      asm volatile("cp.async.bulk.tensor." dimensions                                      \
                   ".shared::cluster.global.tile.mbarrier::complete_tx::bytes"             \
                   ".multicast::cluster [%0], [%1, " coordinates "], [%2], %3;" ::"r"(to), \
                   "l"(map), "r"(barrier), "h"(blocks), __VA_ARGS__                        \
                   : "memory");                                                            \
    }                                                                                      \
  } while (false)

__device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap* map, uint32_t barrier,
                                         uint16_t blocks, int x, int y) {
  FXFUSE_COPY_BOX("2d", "{%4, %5}", "r"(x), "r"(y));
}
__device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap* map, uint32_t barrier,
                                         uint16_t blocks, int x, int y, int z) {
  FXFUSE_COPY_BOX("3d", "{%4, %5, %6}", "r"(x), "r"(y), "r"(z));
}
__device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap* map, uint32_t barrier,
                                         uint16_t blocks, int x, int y, int z, int u, int v) {
  FXFUSE_COPY_BOX("5d", "{%4, %5, %6, %7, %8}", "r"(x), "r"(y), "r"(z), "r"(u), "r"(v));
}
#undef FXFUSE_COPY_BOX

// Asks for the cache line of an address to be brought near.
__device__ __forceinline__ void prefetch_line(const void* from) {
  asm volatile("prefetch.global.L1 [%0];" ::"l"(from) : "memory");
}

// Asks for `bytes` of global memory to be brought to the L2; both are multiples of 16.
__device__ __forceinline__ void prefetch_bytes(const void* from, uint32_t bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

// Clusters.

// Which cluster of the grid this is, and of how many. A block launched without is one of its own.
__device__ __forceinline__ int cluster_index() {
  int index;
  asm volatile("mov.u32 %0, %%clusterid.x;" : "=r"(index));
  return index;
}

__device__ __forceinline__ int cluster_count() {
  int count;
  asm volatile("mov.u32 %0, %%nclusterid.x;" : "=r"(count));
  return count;
}

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ void cluster_sync() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}

// The same, but of memory it publishes initialised barriers alone. The release of the one above
// waits until all of the GPU sees what this thread has written or asked for.
__device__ __forceinline__ void cluster_meet() {
  asm volatile(
      "barrier.cluster.arrive.relaxed.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}

// The address for the functions below of what lies at `address` in block `rank` of the cluster.
__device__ __forceinline__ uint32_t remote_address(uint32_t address, uint32_t rank) {
  uint32_t remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  return remote;
}

// The same at a remote barrier; publishes nothing.
__device__ __forceinline__ void barrier_arrive_remote(uint32_t barrier, bool condition = true) {
  asm volatile(
      "{\n"
      ".reg .pred arrives;\n"
      "setp.ne.b32 arrives, %1, 0;\n"
      "@arrives mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [%0];\n"
      "}" ::"r"(barrier),
      "r"(static_cast<int>(condition))
      : "memory");
}

// Writes to remote memory, and counts 16 bytes at a barrier beside it, where they are expected.
__device__ __forceinline__ void send(uint32_t to, uint32_t barrier, float4 value) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%2, %3, %4, %5}, "
      "[%1];" ::"r"(to),
      "r"(barrier), "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w)
      : "memory");
}

// Writes to the shared-memory offset `to` of block `rank` of the cluster.
__device__ __forceinline__ void store_remote(uint32_t to, uint32_t rank, float4 value) {
  asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(remote_address(to, rank)),
               "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w)
               : "memory");
}

// True for one thread of a warp that is together.
__device__ __forceinline__ bool elect_thread() {
  uint32_t elected;
  asm volatile(
      "{\n"
      ".reg .pred chosen;\n"
      "elect.sync _|chosen, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, chosen;\n"
      "}"
      : "=r"(elected));
  return elected != 0;
}

// Waits for `kThreads` threads of the block at one of its barriers 1 to 15.
template <int kThreads>
__device__ __forceinline__ void barrier_sync(int barrier) {
  asm volatile("barrier.sync.aligned %0, %1;" ::"r"(barrier), "n"(kThreads) : "memory");
}

// Registers: the producer gives up what the consumers take.

template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Warpgroup multiply-adds.

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// How an operand of wgmma lies in shared memory, with 128-byte swizzle at a multiple of 1024.
enum class Major {
  kK,  // rows of 64 along K, 128 bytes each
  kMN  // blocks of 64 along M or N: 64 rows, one for each k, of 128 bytes
};

// Describes to wgmma an operand at so many times 16 bytes in shared memory: where a row begins, or
// a multiple of 32 bytes below 128 along it.
template <Major kMajor>
__device__ __forceinline__ uint64_t describe(uint32_t units) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kEightRows = uint64_t{1024 >> 4} << 32;
  // From one block of 64 along N to the next; the swizzle fixes what it is along K.
  constexpr uint64_t kBlock = uint64_t{kMajor == Major::kMN ? 64 * 128 >> 4 : 1} << 16;
  return kSwizzle128 | kEightRows | kBlock | units;
}

// What 16 elements further along K add to a descriptor.
template <Major kMajor>
constexpr uint64_t kDescriptorStep = (kMajor == Major::kMN ? 16 * 128 : 32) >> 4;

#define FXFUSE_D4(i) "+f"(d[i]), "+f"(d[(i) + 1]), "+f"(d[(i) + 2]), "+f"(d[(i) + 3])
#define FXFUSE_D16(i) FXFUSE_D4(i), FXFUSE_D4((i) + 4), FXFUSE_D4((i) + 8), FXFUSE_D4((i) + 12)
#define FXFUSE_D64(i) \
  FXFUSE_D16(i), FXFUSE_D16((i) + 16), FXFUSE_D16((i) + 32), FXFUSE_D16((i) + 48)

// d = a * b (+ d where `accumulate`): 64 rows of A and 256, 128 or 64 rows of B over 16 of K. d is
// the accumulator of one warpgroup; A lies K-major, B as kMajor says.
template <class Input, Major kMajor>
struct Wgmma;

#define FXFUSE_WGMMA(type, ptx, major, transpose)                                            \
  template <>                                                                                \
  struct Wgmma<type, Major::major> {                                                         \
    static __device__ __forceinline__ void Multiply(float (&d)[128], uint64_t a, uint64_t b, \
                                                    int accumulate) {                        \
      asm volatile(                                                                          \
          "{\n"                                                                              \
          ".reg .pred add;\n"                                                                \
          "setp.ne.b32 add, %130, 0;\n"                                                      \
          "wgmma.mma_async.sync.aligned.m64n256k16.f32." ptx                                 \
          " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11,"                              \
          " %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23,"                     \
          " %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35,"                     \
          " %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47,"                     \
          " %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59,"                     \
          " %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71,"                     \
          " %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83,"                     \
          " %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95,"                     \
          " %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107,"             \
          " %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119,"         \
          " %120, %121, %122, %123, %124, %125, %126, %127},"                                \
          " %128, %129, add, 1, 1, 0, " transpose                                            \
          ";\n"                                                                              \
          "}"                                                                                \
          : FXFUSE_D64(0), FXFUSE_D64(64)                                                    \
          : "l"(a), "l"(b), "r"(accumulate));                                                \
    }                                                                                        \
    static __device__ __forceinline__ void Multiply(float (&d)[64], uint64_t a, uint64_t b,  \
                                                    int accumulate) {                        \
      asm volatile(                                                                          \
          "{\n"                                                                              \
          ".reg .pred add;\n"                                                                \
          "setp.ne.b32 add, %66, 0;\n"                                                       \
          "wgmma.mma_async.sync.aligned.m64n128k16.f32." ptx                                 \
          " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11,"                              \
          " %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23,"                     \
          " %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35,"                     \
          " %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47,"                     \
          " %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59,"                     \
          " %60, %61, %62, %63},"                                                            \
          " %64, %65, add, 1, 1, 0, " transpose                                              \
          ";\n"                                                                              \
          "}"                                                                                \
          : FXFUSE_D64(0)                                                                    \
          : "l"(a), "l"(b), "r"(accumulate));                                                \
    }                                                                                        \
    static __device__ __forceinline__ void Multiply(float (&d)[32], uint64_t a, uint64_t b,  \
                                                    int accumulate) {                        \
      asm volatile(                                                                          \
          "{\n"                                                                              \
          ".reg .pred add;\n"                                                                \
          "setp.ne.b32 add, %34, 0;\n"                                                       \
          "wgmma.mma_async.sync.aligned.m64n64k16.f32." ptx                                  \
          " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11,"                              \
          " %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23,"                     \
          " %24, %25, %26, %27, %28, %29, %30, %31},"                                        \
          " %32, %33, add, 1, 1, 0, " transpose                                              \
          ";\n"                                                                              \
          "}"                                                                                \
          : FXFUSE_D16(0), FXFUSE_D16(16)                                                    \
          : "l"(a), "l"(b), "r"(accumulate));                                                \
    }                                                                                        \
  }

FXFUSE_WGMMA(__nv_bfloat16, "bf16.bf16", kK, "0");
FXFUSE_WGMMA(__nv_bfloat16, "bf16.bf16", kMN, "1");
FXFUSE_WGMMA(__half, "f16.f16", kK, "0");
FXFUSE_WGMMA(__half, "f16.f16", kMN, "1");
#undef FXFUSE_WGMMA
#undef FXFUSE_D64
#undef FXFUSE_D16
#undef FXFUSE_D4

}  // namespace fxfuse

#endif  // FXFUSE_CUDA_PTX_HOPPER_CUH_
