// Lists of compiled kernels, and the choice among them, as both GEMM routes make it.

#ifndef FXFUSE_CUDA_KERNEL_LIST_H_
#define FXFUSE_CUDA_KERNEL_LIST_H_

#include <stdint.h>

#include <initializer_list>

#include "device_program.h"

namespace fxfuse {

template <class Kernel>
struct KernelList {
  const Kernel* kernel;
  int count;
};

// The kernels of several lists in one.
template <class Kernel, int kCapacity>
class KernelTable {
 public:
  KernelTable(std::initializer_list<KernelList<Kernel>> lists) {
    for (const KernelList<Kernel>& some : lists) {
      for (int i = 0; i < some.count && count_ < kCapacity; ++i) {
        kernel_[count_++] = some.kernel[i];
      }
    }
  }
  KernelList<Kernel> List() const { return {kernel_, count_}; }

 private:
  Kernel kernel_[kCapacity];
  int count_ = 0;
};

inline int64_t CeilDivide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The best kernel for outputs that need `math` among those `serves` admits, or null: of two exact
// enough the cheaper arithmetic, of one arithmetic the lower `cost`.
template <class Kernel, class Serves, class Cost>
const Kernel* BestKernel(const KernelList<Kernel>& all, MathLevel math, Serves serves, Cost cost) {
  const Kernel* best = nullptr;
  decltype(cost(*all.kernel)) best_cost = {};
  for (int i = 0; i < all.count; ++i) {
    const Kernel& kernel = all.kernel[i];
    if (kernel.math < math || !serves(kernel)) continue;
    const auto own = cost(kernel);
    if (best == nullptr || kernel.math < best->math ||
        (kernel.math == best->math && own < best_cost)) {
      best = &kernel;
      best_cost = own;
    }
  }
  return best;
}

}  // namespace fxfuse

#endif  // FXFUSE_CUDA_KERNEL_LIST_H_
