// Runs CUDA kernels' own source on the host, for tests on machines without a GPU.
//
// Every thread of a block is a fiber; collectives (barriers, ldmatrix, mma) meet by yielding. What
// would be a race on a GPU is made to fail here: warps run in random order between barriers, and a
// cp.async destination holds NaN until its group has been waited for. Of a cluster, one block runs
// until it waits for the others.

#ifndef FXFUSE_CUDA_EMULATION_H_
#define FXFUSE_CUDA_EMULATION_H_

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <random>
#include <vector>

#undef __launch_bounds__
#undef __global__
#undef __shared__
#undef __grid_constant__
#define __launch_bounds__(...)
#define __global__ static
#define __shared__
#define __grid_constant__

// The part of CUDA's host-less vocabulary that the kernels use.
using std::max;
using std::min;
inline float __uint_as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}
inline dim3 threadIdx, blockIdx, gridDim;

namespace fxfuse {

// The block's shared memory; the kernels' `extern __shared__ shared[]` refers to it.
constexpr uint32_t kSharedBytes = 256 * 1024;
alignas(1024) uint8_t shared[kSharedBytes];

namespace emulation {

[[noreturn]] inline void Die(const char* what) {
  fprintf(stderr, "emulation: %s\n", what);
  abort();
}

struct Copy {
  uint32_t to;
  const void* from;
  int size, valid;
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(128 * 1024);
  bool done = true;
  std::vector<std::vector<Copy>> groups;  // committed and not yet complete
  std::vector<Copy> open;
};

struct Barrier {
  int arrived = 0;
  int generation = 0;
};

// A block of a cluster, and its shared memory while another one runs.
struct Block {
  std::vector<Fiber> fibers;
  Barrier barrier;
  std::vector<Barrier> warp_barriers;
  std::vector<uint8_t> memory = std::vector<uint8_t>(kSharedBytes);
  int waiting = 0;  // fibers at the cluster's barrier
};

inline std::vector<Block> blocks;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline int current_block, current, block_threads;
inline Barrier cluster_barrier;
inline long matrices_read, bank_conflicts;

inline Fiber& Current() { return blocks[current_block].fibers[current]; }

inline void Meet(Barrier& barrier, int threads) {
  const int generation = barrier.generation;
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
  while (barrier.generation == generation) swapcontext(&Current().context, &scheduler);
}

inline void Enter() {
  body();
  Current().done = true;
  swapcontext(&Current().context, &scheduler);
}

inline bool RunWarp(int warp) {
  bool alive = false;
  for (int i = warp * 32; i < warp * 32 + 32; ++i) {
    Fiber& fiber = blocks[current_block].fibers[i];
    if (fiber.done) continue;
    alive = true;
    current = i;
    threadIdx.x = i;
    swapcontext(&scheduler, &fiber.context);
  }
  return alive;
}

inline void Start(Block& block) {
  std::fill(block.memory.begin(), block.memory.end(), 0xff);
  block.barrier = Barrier();
  block.warp_barriers.assign(block_threads / 32, Barrier());
  block.waiting = 0;
  block.fibers.resize(block_threads);
  for (Fiber& fiber : block.fibers) {
    fiber.done = false;
    fiber.groups.clear();
    fiber.open.clear();
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    makecontext(&fiber.context, Enter, 0);
  }
}

// Runs the current block until it is done, or waits for the others of its cluster; returns whether
// it is done.
inline bool RunBlock(std::mt19937& random) {
  Block& block = blocks[current_block];
  memcpy(shared, block.memory.data(), kSharedBytes);
  std::vector<int> order(block_threads / 32);
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int>(i);
  bool alive = true;
  while (alive && block.waiting < block_threads) {
    alive = false;
    std::shuffle(order.begin(), order.end(), random);
    for (int warp : order) {
      for (int turns = random() % 40 + 1; turns > 0 && RunWarp(warp); --turns) alive = true;
    }
  }
  memcpy(block.memory.data(), shared, kSharedBytes);
  return !alive;
}

// kernel<<<count, threads>>>() in clusters of `split` blocks, where `kernel` calls it with its
// arguments.
inline void Launch(int count, int threads, std::function<void()> kernel, int split = 1) {
  std::mt19937 random(1);
  body = std::move(kernel);
  gridDim.x = count;
  block_threads = threads;
  blocks.resize(split);
  for (int first = 0; first < count; first += split) {
    cluster_barrier = Barrier();
    for (Block& block : blocks) Start(block);
    for (int done = 0; done < split;) {
      done = 0;
      for (current_block = 0; current_block < split; ++current_block) {
        blockIdx.x = first + current_block;
        done += RunBlock(random);
      }
    }
  }
}

}  // namespace emulation
}  // namespace fxfuse

inline void __syncthreads() {
  using namespace fxfuse::emulation;
  Meet(blocks[current_block].barrier, block_threads);
}
inline int __syncthreads_or(int value) {
  static int any;
  any |= value;
  __syncthreads();
  const int result = any;
  __syncthreads();
  if (threadIdx.x == 0) any = 0;
  __syncthreads();
  return result;
}
inline void __syncwarp() {
  using namespace fxfuse::emulation;
  Meet(blocks[current_block].warp_barriers[current / 32], 32);
}
template <class Value>
Value __shfl_xor_sync(uint32_t, Value value, int flip) {
  static Value sent[32][32];  // [warp][lane]
  const int warp = fxfuse::emulation::current / 32, lane = fxfuse::emulation::current % 32;
  sent[warp][lane] = value;
  __syncwarp();
  const Value received = sent[warp][lane ^ flip];
  __syncwarp();
  return received;
}

#define FXFUSE_CUDA_PTX_CUH_  // in place of ptx.cuh and ptx_hopper.cuh:
#define FXFUSE_CUDA_PTX_HOPPER_CUH_
namespace fxfuse {

inline void await_turn() {}

inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const uint8_t*>(pointer) - shared);
}

inline void CopyAsync(uint32_t to, const void* from, int size, int valid) {
  if (to % size != 0 || to + size > kSharedBytes) emulation::Die("cp.async: bad destination");
  if (valid < 0 || valid > size) emulation::Die("cp.async: bad source size");
  if (valid > 0 && reinterpret_cast<uintptr_t>(from) % size != 0) {
    emulation::Die("cp.async: misaligned source");
  }
  memset(shared + to, 0xff, size);
  emulation::Current().open.push_back({to, from, size, valid});
}
inline void copy_async_16(uint32_t to, const void* from, uint32_t inside) {
  CopyAsync(to, from, 16, inside != 0 ? 16 : 0);
}
inline void copy_async_4(uint32_t to, const void* from, int valid) {
  CopyAsync(to, from, 4, valid);
}
inline void copy_async_commit() {
  emulation::Fiber& fiber = emulation::Current();
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}
template <int kPending>
void copy_async_wait() {
  emulation::Fiber& fiber = emulation::Current();
  while (fiber.groups.size() > kPending) {
    for (const emulation::Copy& copy : fiber.groups.front()) {
      memset(shared + copy.to, 0, copy.size);
      if (copy.valid > 0) memcpy(shared + copy.to, copy.from, copy.valid);
    }
    fiber.groups.erase(fiber.groups.begin());
  }
}
inline float4 load_shared(uint32_t from) {
  if (from % 16 != 0 || from + 16 > kSharedBytes) emulation::Die("ld.shared: bad address");
  float4 value;
  memcpy(&value, shared + from, 16);
  return value;
}
inline void store_shared(uint32_t to, float4 value) {
  if (to % 16 != 0 || to + 16 > kSharedBytes) emulation::Die("st.shared: bad address");
  memcpy(shared + to, &value, 16);
}
inline void cluster_sync() {
  using namespace emulation;
  const int threads = block_threads * static_cast<int>(blocks.size());
  ++blocks[current_block].waiting;
  if (cluster_barrier.arrived + 1 == threads) {
    for (Block& block : blocks) block.waiting = 0;
  }
  Meet(cluster_barrier, threads);
}
inline void store_remote(uint32_t to, uint32_t rank, float4 value) {
  if (to % 16 != 0 || to + 16 > kSharedBytes) emulation::Die("st.shared: bad address");
  const bool own = static_cast<int>(rank) == emulation::current_block;
  memcpy((own ? shared : emulation::blocks[rank].memory.data()) + to, &value, 16);
}
inline void store_shared_32(uint32_t to, uint32_t value) { memcpy(shared + to, &value, 4); }
template <int kSecond, int kThird, int kFourth, int kVectors>
void store_vectors(void* to, int end, const uint32_t (&v)[kVectors][4]) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0) emulation::Die("st.global: misaligned");
  const int offset[] = {0, kSecond, kThird, kFourth};
  for (int i = 0; i < kVectors; ++i) {
    if (offset[i] < end) memcpy(static_cast<char*>(to) + offset[i], v[i], 16);
  }
}

inline void load_matrix_x4(uint32_t (&r)[4], uint32_t address) {
  static uint32_t row[32][32];  // [warp][lane]
  if (address % 16 != 0) emulation::Die("ldmatrix: misaligned row");
  const int warp = emulation::current / 32, lane = emulation::current % 32;
  row[warp][lane] = address;
  __syncwarp();
  for (int i = 0; i < 4; ++i) {
    memcpy(&r[i], shared + row[warp][8 * i + lane / 4] + lane % 4 * 4, 4);
    uint32_t banks = 0;  // of 16 bytes
    for (int j = 0; j < 8; ++j) banks |= 1u << (row[warp][8 * i + j] / 16 % 8);
    if (lane == 0) ++emulation::matrices_read;
    if (lane == 0 && banks != 0xff) ++emulation::bank_conflicts;
  }
  __syncwarp();
}

// Element `i` of a register.
template <class Input>
float RegisterElement(uint32_t bits, int i) {
  if constexpr (sizeof(Input) == 4) {
    return __uint_as_float(bits);
  } else {
    const uint16_t half = static_cast<uint16_t>(bits >> (16 * i));
    Input value;
    memcpy(static_cast<void*>(&value), &half, 2);
    return static_cast<float>(value);
  }
}

template <class Input>
void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  static uint32_t all_a[32][32][4], all_b[32][32][2];  // [warp][lane]
  const int warp = emulation::current / 32, lane = emulation::current % 32;
  memcpy(all_a[warp][lane], a, sizeof(a));
  all_b[warp][lane][0] = b0, all_b[warp][lane][1] = b1;
  __syncwarp();
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int word = 0; word < 8; ++word) {  // of 4 bytes along K
      const uint32_t x = all_a[warp][row % 8 * 4 + word % 4][row / 8 + word / 4 * 2];
      const uint32_t y = all_b[warp][column * 4 + word % 4][word / 4];
      for (size_t e = 0; e < 4 / sizeof(Input); ++e) {
        d[i] += RegisterElement<Input>(x, e) * RegisterElement<Input>(y, e);
      }
    }
  }
  __syncwarp();
}

// To nearest, ties away from zero.
inline uint32_t round_to_tf32(uint32_t bits) { return (bits + 0x1000u) & 0xffffe000u; }

}  // namespace fxfuse

#endif  // FXFUSE_CUDA_EMULATION_H_
