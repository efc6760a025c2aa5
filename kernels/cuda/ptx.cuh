// Every PTX instruction of the CUDA library that has no intrinsic, one thin function each.

#ifndef FXFUSE_CUDA_PTX_CUH_
#define FXFUSE_CUDA_PTX_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace fxfuse {

// To be called before anything is read from or written to global memory. On sm_90 and newer a
// kernel may be set up while the one before it in the stream still runs (see Launch): this waits
// until that one is done and what it wrote can be seen, and then lets the next one be set up.
__device__ __forceinline__ void await_turn() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// The 32-bit address of a shared-memory object, as the instructions below take it.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ float4 load_shared(uint32_t address) {
  float4 value;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
               : "r"(address)
               : "memory");
  return value;
}

__device__ __forceinline__ void store_shared(uint32_t address, float4 value) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(value.x),
               "f"(value.y), "f"(value.z), "f"(value.w)
               : "memory");
}

// Stores four vectors of 16 bytes to global memory, at `to` and so many bytes behind it: those that
// begin before `end` bytes. As one statement, for then each has registers of its own: stores that
// share them wait for each other, some 150 cycles each.
template <int kSecond, int kThird, int kFourth>
__device__ __forceinline__ void store_vectors(void* to, int end, const uint32_t (&v)[4][4]) {
  asm volatile(
      "{\n"
      ".reg .pred p, q, r, s;\n"
      "setp.gt.s32 p, %1, 0;\n"
      "setp.gt.s32 q, %1, %2;\n"
      "setp.gt.s32 r, %1, %3;\n"
      "setp.gt.s32 s, %1, %4;\n"
      "@p st.global.v4.b32 [%0], {%5, %6, %7, %8};\n"
      "@q st.global.v4.b32 [%0 + %2], {%9, %10, %11, %12};\n"
      "@r st.global.v4.b32 [%0 + %3], {%13, %14, %15, %16};\n"
      "@s st.global.v4.b32 [%0 + %4], {%17, %18, %19, %20};\n"
      "}" ::"l"(__cvta_generic_to_global(to)),
      "r"(end), "n"(kSecond), "n"(kThird), "n"(kFourth), "r"(v[0][0]), "r"(v[0][1]), "r"(v[0][2]),
      "r"(v[0][3]), "r"(v[1][0]), "r"(v[1][1]), "r"(v[1][2]), "r"(v[1][3]), "r"(v[2][0]),
      "r"(v[2][1]), "r"(v[2][2]), "r"(v[2][3]), "r"(v[3][0]), "r"(v[3][1]), "r"(v[3][2]),
      "r"(v[3][3])
      : "memory");
}

// The same of two vectors.
template <int kSecond, int, int>
__device__ __forceinline__ void store_vectors(void* to, int end, const uint32_t (&v)[2][4]) {
  asm volatile(
      "{\n"
      ".reg .pred p, q;\n"
      "setp.gt.s32 p, %1, 0;\n"
      "setp.gt.s32 q, %1, %2;\n"
      "@p st.global.v4.b32 [%0], {%3, %4, %5, %6};\n"
      "@q st.global.v4.b32 [%0 + %2], {%7, %8, %9, %10};\n"
      "}" ::"l"(__cvta_generic_to_global(to)),
      "r"(end), "n"(kSecond), "r"(v[0][0]), "r"(v[0][1]), "r"(v[0][2]), "r"(v[0][3]), "r"(v[1][0]),
      "r"(v[1][1]), "r"(v[1][2]), "r"(v[1][3])
      : "memory");
}

// Asynchronous copy of 16 bytes from global to shared memory; zeros, with nothing read, where
// `inside` is 0. It bypasses L1 (.cg): a tile is read once per block and reused out of shared
// memory.
__device__ __forceinline__ void copy_async_16(uint32_t shared, const void* global,
                                              uint32_t inside) {
  asm volatile(
      "{\n"
      ".reg .pred outside;\n"
      "setp.eq.u32 outside, %2, 0;\n"
      "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, outside;\n"
      "}" ::"r"(shared),
      "l"(global), "r"(inside)
      : "memory");
}

// The same of 4 bytes, of which the first `valid` are read and the rest is zero-filled.
__device__ __forceinline__ void copy_async_4(uint32_t shared, const void* global, int valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared), "l"(global), "r"(valid)
               : "memory");
}

// Closes the group of copies issued since the last commit.
__device__ __forceinline__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most `kPending` of this thread's groups are still under way.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Loads four 8x8 matrices of 16-bit elements (equally: 8x4 of 32-bit ones). Lane 8*i + r gives the
// address of row r of matrix i; lane l receives element pair l % 4 of row l / 4 of each.
__device__ __forceinline__ void load_matrix_x4(uint32_t (&r)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared)
               : "memory");
}

__device__ __forceinline__ void store_shared_32(uint32_t shared, uint32_t value) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(shared), "r"(value) : "memory");
}

// d += a * b over one 16x8 tile and 32 bytes of K: 16 elements of 16 bits or 8 of 32.
// Not volatile: the compiler may move these among the loads, it knows all they touch.
template <class Input>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1);

#define FXFUSE_MMA(type, shape)                                                                 \
  template <>                                                                                   \
  __device__ __forceinline__ void mma<type>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, \
                                            uint32_t b1) {                                      \
    asm("mma.sync.aligned." shape                                                               \
        " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                      \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                        \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                        \
  }

FXFUSE_MMA(__half, "m16n8k16.row.col.f32.f16.f16.f32")
FXFUSE_MMA(__nv_bfloat16, "m16n8k16.row.col.f32.bf16.bf16.f32")
FXFUSE_MMA(float, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef FXFUSE_MMA

// fp32 bits to what the tensor core, which ignores the lower 13 of them, takes for the nearest TF32
// number: half a unit in the last place is added, away from zero. Infinities and NaN stay what they
// are. Two instructions without a predicate, where cvt.rna.tf32 is three with one.
__device__ __forceinline__ uint32_t round_to_tf32(uint32_t bits) {
  const float binade = __uint_as_float(bits & 0xff800000u);
  return __float_as_uint(__fmaf_rn(binade, 4.8828125e-4f, __uint_as_float(bits)));
}

}  // namespace fxfuse

#endif  // FXFUSE_CUDA_PTX_CUH_
