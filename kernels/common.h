// What both libraries share on the host: the error message of the calling thread, and the check
// that a problem keeps to the limits fxfuse.h states.

#ifndef FXFUSE_COMMON_H_
#define FXFUSE_COMMON_H_

#include "include/fxfuse.h"

namespace fxfuse {

// Records what fxfuse_last_error() says on this thread, formatted as printf does, and returns
// `status`, so that a failure is one line at its place.
__attribute__((format(printf, 2, 3))) fxfuse_status Fail(fxfuse_status status, const char* format,
                                                         ...);

// Checks every field of `problem` and every address the problem needs. `function` is the entry
// point to name in the message. FXFUSE_OK, or FXFUSE_BAD_ARGUMENT with the message recorded.
// `pointers` may be null where only the problem's shape matters (fxfuse_cuda_choose).
fxfuse_status CheckProblem(const char* function, const fxfuse_problem* problem,
                           void* const* pointers, bool need_pointers);

// Whether a problem is computed in double precision: where any of its tensors is F64.
inline bool IsDouble(const fxfuse_problem& problem) {
  const fxfuse_program& program = problem.program;
  bool found = problem.input_dtype == FXFUSE_F64;
  for (int i = 0; i < program.operand_count; ++i) {
    found = found || program.operand[i].dtype == FXFUSE_F64;
  }
  for (int i = 0; i < program.output_count; ++i) {
    found = found || program.output[i].dtype == FXFUSE_F64;
  }
  return found;
}

}  // namespace fxfuse

#endif  // FXFUSE_COMMON_H_
