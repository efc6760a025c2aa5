// A program that is the gradient of a chain, in the order of the chain.
//
// Reverse-mode differentiation of z = v0 -> v1 -> ... -> vn gives
//
//   dz = ((dy * f_n'(v_{n-1})) * ...) * f_1'(v0)
//
// which Interpreter computes as it is written: the chain first, keeping every value a factor is
// taken at, and then back. But the factors may be multiplied in any order. GradientOfChain takes
// each where the chain has the value it is at, and a function and its derivative, which share most
// of their arithmetic, in one step. Only two values live from step to step: `v` of the chain, and
// the product `s` of the factors so far, which begins with dy.
//
// A mask (relu's, say) drops what is in the product so far: an infinite dy, as Interpreter does,
// but where v is not finite also the NaN of a slope before it, which Interpreter would multiply its
// zero by.
//
// Sums for parameters in the middle of a chain want products that end there, and so do the
// gradients of norms. At such places the product is cut: parts after the one that begins with dy
// begin with 1, are kept in slots on the way, and are multiplied in the end, in reverse order.

#ifndef FXFUSE_CUDA_GRADIENT_H_
#define FXFUSE_CUDA_GRADIENT_H_

#include "device_program.h"

namespace fxfuse {

// What a DeviceStep's code means to GradientOfChain. `index` is a slot or an operand.
enum class GradientCode : uint8_t {
  // s = s * f'(v), v = f(v)
  relu,      // s is 0 where v <= p0
  clamp,     // to [p0, p1]; s stays at the bounds, and is 0 where v is NaN, which v is no longer
  hardtanh,  // the same; s is 0 at the bounds, and stays where v is NaN
  silu,
  gelu,
  gelu_unit,  // of v in [-1, 1]
  gelu_tanh,
  tanh,
  sigmoid,
  // s = s * f'(x), where v is f(x)
  tanh_result,
  sigmoid_result,
  shift,           // v = v + p0
  scale,           // v = v * p0, s = s * p1
  operand,         // an operand: see OperandUse, in `result`
  normalize,       // v = normalize(v) over p0 columns, with eps p1; s = rstd
  normalize_back,  // s = the gradient of what was normalized, whose results v and s of the step
                   // above lie in slots `index` and `result`; p0 columns
  begin,           // s = 1
  keep_value,      // slot = v
  keep_product,    // slot = s
  times_slot,      // s = s * slot
  store,           // output `result` = s
  store_times      // output `result` = s * slot
};

enum class OperandUse : uint8_t { add_to_value, times_value, times_product, begin };

// Fills the steps and slots of `device`, which TranslateProgram has filled, for GradientOfChain;
// returns false, and leaves it as it was, where the program is no gradient of a chain. The answer
// does not depend on addresses.
bool TranslateGradient(const fxfuse_problem& problem, DeviceProgram* device);

}  // namespace fxfuse

#endif  // FXFUSE_CUDA_GRADIENT_H_
