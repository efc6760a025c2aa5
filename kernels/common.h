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

}  // namespace fxfuse

#endif  // FXFUSE_COMMON_H_
