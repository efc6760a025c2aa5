// The inner loops of the CPU interpreter, compiled once per instruction set.
//
// isa_kernels.cc is built several times with different compiler flags; each build fills one table
// below. Everything else (tiling, addressing, threads) is ordinary code that picks a table at run
// time.

#ifndef FXFUSE_CPU_ISA_H_
#define FXFUSE_CPU_ISA_H_

#include <stdint.h>

#include "pointwise.h"

namespace fxfuse {

// The loops over fragments run whole vectors of this many floats, the widest there is.
constexpr int kLane = 16;

// out[i] = op(a[i], b[i], c[i]; p0, p1) for i < count, a multiple of kLane. `out` may be one of the
// arguments; those beyond the op's arity are not read. Ops over groups of p0 columns take the whole
// groups there are, the first from out[0] on, and leave the rest of `out`.
using OpLoop = void (*)(float* out, const float* a, const float* b, const float* c, float p0,
                        float p1, int count);
// Converts `count` adjacent elements of a stored type to floats, and back (to nearest even).
using LoadLoop = void (*)(float* out, const void* in, int count);
using StoreLoop = void (*)(void* out, const float* in, int count);

// The sum of `count` floats in doubles, in an order that is the same for every instruction set.
using SumLoop = float (*)(const float* in, int count);
// total[i] += in[i] for i < count.
using AddLoop = void (*)(double* total, const float* in, int count);

struct IsaKernels {
  const char* name;
  OpLoop op[kOpcodeCount];
  LoadLoop load[4];    // by fxfuse_dtype
  StoreLoop store[3];  // by fxfuse_dtype
  SumLoop sum;
  AddLoop add_to;
};

namespace baseline {
extern const IsaKernels kKernels;
}
#if defined(FXFUSE_X86)
namespace avx2 {
extern const IsaKernels kKernels;
}
namespace avx512 {
extern const IsaKernels kKernels;
}
#endif

}  // namespace fxfuse

#endif  // FXFUSE_CPU_ISA_H_
