// Typed loads and stores of the epilogue: memory of any fxfuse_dtype but fp64, registers of fp32;
// at the end, memory of any fxfuse_dtype, registers of fp64.
//
// The dtype is uniform over the grid, so each switch below is one uniform branch.

#ifndef FXFUSE_CUDA_MEMORY_CUH_
#define FXFUSE_CUDA_MEMORY_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include "include/fxfuse.h"

namespace fxfuse {

// `kWidth` adjacent elements of `kBytes` bytes each as 32-bit words, moved by the widest
// instructions that fit. Plain loads: the matrix may be overwritten in place by its own thread.
template <int kWords>
__device__ __forceinline__ void LoadWords(const void* from, uint32_t (&word)[kWords]) {
  if constexpr (kWords % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
      const uint4 four = reinterpret_cast<const uint4*>(from)[i / 4];
      word[i] = four.x, word[i + 1] = four.y, word[i + 2] = four.z, word[i + 3] = four.w;
    }
  } else if constexpr (kWords == 2) {
    const uint2 two = *reinterpret_cast<const uint2*>(from);
    word[0] = two.x, word[1] = two.y;
  } else {
    static_assert(kWords == 1, "no such access");
    word[0] = *reinterpret_cast<const uint32_t*>(from);
  }
}

template <int kWords>
__device__ __forceinline__ void StoreWords(void* to, const uint32_t (&word)[kWords]) {
  if constexpr (kWords % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
      reinterpret_cast<uint4*>(to)[i / 4] =
          make_uint4(word[i], word[i + 1], word[i + 2], word[i + 3]);
    }
  } else if constexpr (kWords == 2) {
    *reinterpret_cast<uint2*>(to) = make_uint2(word[0], word[1]);
  } else {
    static_assert(kWords == 1, "no such access");
    *reinterpret_cast<uint32_t*>(to) = word[0];
  }
}

__device__ __forceinline__ float2 UnpackF16(uint32_t word) {
  return __half22float2(*reinterpret_cast<const __half2*>(&word));
}

// Two values as fp16 or bf16, the first in the lower half.
__device__ __forceinline__ uint32_t PackHalves(int dtype, float low, float high) {
  if (dtype == FXFUSE_F16) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// A bf16 is the upper half of an fp32: two integer operations, and NaN payloads survive.
__device__ __forceinline__ float2 UnpackBf16(uint32_t word) {
  return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
}

template <int kWidth>
__device__ __forceinline__ void UnpackHalves(int dtype, const uint32_t (&word)[kWidth / 2],
                                             float* values) {
  if (dtype == FXFUSE_F16) {
#pragma unroll
    for (int i = 0; i < kWidth / 2; ++i) {
      const float2 pair = UnpackF16(word[i]);
      values[2 * i] = pair.x, values[2 * i + 1] = pair.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kWidth / 2; ++i) {
      const float2 pair = UnpackBf16(word[i]);
      values[2 * i] = pair.x, values[2 * i + 1] = pair.y;
    }
  }
}

template <int kWidth>
__device__ __forceinline__ void UnpackBools(const uint32_t (&word)[kWidth / 4], float* values) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    values[i] = (word[i / 4] >> (8 * (i % 4)) & 0xff) != 0 ? 1.0f : 0.0f;
  }
}

// Bytes of an element.
__host__ __device__ __forceinline__ constexpr int DtypeSize(int dtype) {
  return dtype == FXFUSE_F32 ? 4 : (dtype == FXFUSE_BOOL ? 1 : 2);
}

// `kGroups` vectors of `kWidth` elements, offsets in elements; all loads are issued before the
// first is used.
template <int kWidth, int kGroups>
__device__ __forceinline__ void LoadVectors(const void* data, int dtype,
                                            const int64_t (&offset)[kGroups],
                                            float (&values)[kWidth * kGroups]) {
  if (dtype == FXFUSE_F32) {
    uint32_t word[kGroups][kWidth];
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      LoadWords(static_cast<const float*>(data) + offset[g], word[g]);
    }
#pragma unroll
    for (int i = 0; i < kWidth * kGroups; ++i) {
      values[i] = __uint_as_float(word[i / kWidth][i % kWidth]);
    }
  } else if (dtype == FXFUSE_BOOL) {
    uint32_t word[kGroups][kWidth / 4];
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      LoadWords(static_cast<const uint8_t*>(data) + offset[g], word[g]);
    }
#pragma unroll
    for (int g = 0; g < kGroups; ++g) UnpackBools<kWidth>(word[g], values + g * kWidth);
  } else {
    uint32_t word[kGroups][kWidth / 2];
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      LoadWords(static_cast<const uint16_t*>(data) + offset[g], word[g]);
    }
#pragma unroll
    for (int g = 0; g < kGroups; ++g) UnpackHalves<kWidth>(dtype, word[g], values + g * kWidth);
  }
}

__device__ __forceinline__ float LoadElement(const void* data, int dtype, int64_t offset) {
  switch (dtype) {
    case FXFUSE_F32:
      return static_cast<const float*>(data)[offset];
    case FXFUSE_F16:
      return __half2float(static_cast<const __half*>(data)[offset]);
    case FXFUSE_BF16:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[offset]);
    default:
      return static_cast<const uint8_t*>(data)[offset] != 0 ? 1.0f : 0.0f;
  }
}

// `kCount` elements, wherever they are; all loads are issued before the first is used.
template <int kCount>
__device__ __forceinline__ void LoadElements(const void* data, int dtype,
                                             const int64_t (&offset)[kCount],
                                             float (&values)[kCount]) {
  if (dtype == FXFUSE_F32) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = static_cast<const float*>(data)[offset[i]];
  } else if (dtype == FXFUSE_BOOL) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      values[i] = static_cast<const uint8_t*>(data)[offset[i]] != 0 ? 1.0f : 0.0f;
    }
  } else {
    uint32_t half[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) half[i] = static_cast<const uint16_t*>(data)[offset[i]];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      values[i] = dtype == FXFUSE_F16 ? UnpackF16(half[i]).x : UnpackBf16(half[i]).x;
    }
  }
}

template <int kWidth>
__device__ __forceinline__ void StoreVector(void* data, int dtype, int64_t offset,
                                            const float* values) {
  if (dtype == FXFUSE_F32) {
    uint32_t word[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) word[i] = __float_as_uint(values[i]);
    StoreWords(static_cast<float*>(data) + offset, word);
    return;
  }
  uint32_t word[kWidth / 2];
#pragma unroll
  for (int i = 0; i < kWidth / 2; ++i) {
    word[i] = PackHalves(dtype, values[2 * i], values[2 * i + 1]);
  }
  StoreWords(static_cast<uint16_t*>(data) + offset, word);
}

__device__ __forceinline__ void StoreElement(void* data, int dtype, int64_t offset, float value) {
  if (dtype == FXFUSE_F32) {
    static_cast<float*>(data)[offset] = value;
  } else if (dtype == FXFUSE_F16) {
    static_cast<__half*>(data)[offset] = __float2half_rn(value);
  } else {
    static_cast<__nv_bfloat16*>(data)[offset] = __float2bfloat16_rn(value);
  }
}

// The same for fp64. What is narrower than fp64 is exact in fp32, and is read by way of that.

template <int kWidth, int kGroups>
__device__ __forceinline__ void LoadVectors(const void* data, int dtype,
                                            const int64_t (&offset)[kGroups],
                                            double (&values)[kWidth * kGroups]) {
  if (dtype == FXFUSE_F64) {
#pragma unroll
    for (int i = 0; i < kWidth * kGroups; i += 2) {
      const double* from = static_cast<const double*>(data) + offset[i / kWidth];
      const double2 pair = reinterpret_cast<const double2*>(from)[i % kWidth / 2];
      values[i] = pair.x, values[i + 1] = pair.y;
    }
    return;
  }
  float narrow[kWidth * kGroups];
  LoadVectors<kWidth, kGroups>(data, dtype, offset, narrow);
#pragma unroll
  for (int i = 0; i < kWidth * kGroups; ++i) values[i] = narrow[i];
}

template <int kCount>
__device__ __forceinline__ void LoadElements(const void* data, int dtype,
                                             const int64_t (&offset)[kCount],
                                             double (&values)[kCount]) {
  if (dtype == FXFUSE_F64) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = static_cast<const double*>(data)[offset[i]];
    return;
  }
  float narrow[kCount];
  LoadElements<kCount>(data, dtype, offset, narrow);
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = narrow[i];
}

// Each value is rounded once, and so 16-bit ones are not by way of fp32.
__device__ __forceinline__ void StoreElement(void* data, int dtype, int64_t offset, double value) {
  if (dtype == FXFUSE_F64) {
    static_cast<double*>(data)[offset] = value;
  } else if (dtype == FXFUSE_F32) {
    static_cast<float*>(data)[offset] = static_cast<float>(value);
  } else if (dtype == FXFUSE_F16) {
    static_cast<__half*>(data)[offset] = __double2half(value);
  } else {
    static_cast<__nv_bfloat16*>(data)[offset] = __double2bfloat16(value);
  }
}

template <int kWidth>
__device__ __forceinline__ void StoreVector(void* data, int dtype, int64_t offset,
                                            const double* values) {
  if (dtype == FXFUSE_F64) {
#pragma unroll
    for (int i = 0; i < kWidth; i += 2) {
      double* to = static_cast<double*>(data) + offset;
      reinterpret_cast<double2*>(to)[i / 2] = make_double2(values[i], values[i + 1]);
    }
  } else if (dtype == FXFUSE_F32) {
    float narrow[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) narrow[i] = static_cast<float>(values[i]);
    StoreVector<kWidth>(data, FXFUSE_F32, offset, narrow);
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) StoreElement(data, dtype, offset + i, values[i]);
  }
}

}  // namespace fxfuse

#endif  // FXFUSE_CUDA_MEMORY_CUH_
