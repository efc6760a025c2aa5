// A developer's program, not part of the library: times every kernel of the tables, whichever the
// library would choose, and checks it against a plain one. The numbers are what choose.cc's cost
// table is made from. fp32 matrices also go as two planes each, split beforehand.
//
//   fxfuse_tune [m n k]...      defaults to a few shapes that matter

#include <cuda_runtime.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "choose.h"
#include "launch.h"
#include "memory.cuh"
#include "pointwise.h"

namespace fxfuse {
namespace {

void Check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  exit(1);
}

void Check(fxfuse_status status) {
  if (status == FXFUSE_OK) return;
  fprintf(stderr, "%s\n", fxfuse_last_error());
  exit(1);
}

// Deterministic values in [-0.5, 0.5).
__global__ void Fill(void* data, int dtype, int64_t count, uint32_t seed) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * blockDim.x) {
    uint32_t x = static_cast<uint32_t>(i) * 2654435761u + seed;
    x ^= x >> 15, x *= 2246822519u, x ^= x >> 13;
    StoreElement(data, dtype, i, (x >> 8) * (1.0f / (1 << 24)) - 0.5f);
  }
}

// Rows 0, step, 2 * step, ... of relu(A @ B^T + bias), one warp to an element.
__global__ void Reference(const void* a, const void* b, const void* bias, int dtype, float* out,
                          int64_t step, int64_t n, int64_t k) {
  const int64_t column = blockIdx.x * int64_t{blockDim.x / 32} + threadIdx.x / 32;
  const int64_t row = blockIdx.y * step;
  if (column >= n) return;
  float sum = 0.0f;
  for (int64_t i = threadIdx.x % 32; i < k; i += 32) {
    sum += LoadElement(a, dtype, row * k + i) * LoadElement(b, dtype, column * k + i);
  }
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
  if (threadIdx.x % 32 != 0) return;
  out[blockIdx.y * n + column] = fmaxf(sum + LoadElement(bias, dtype, column), 0.0f);
}

fxfuse_instruction Instruction(Opcode opcode, int store = -1) {
  fxfuse_instruction instruction = {};
  instruction.opcode = static_cast<uint16_t>(opcode);
  instruction.arity = kArity[instruction.opcode];
  instruction.save = -1;
  instruction.store = static_cast<int8_t>(store);
  instruction.source[1] = FXFUSE_FROM_OPERAND;
  instruction.immediate[0] = -1.0f, instruction.immediate[1] = 1.0f;
  return instruction;
}

// The program that runs `chain`, its binary operations against operand 0, and stores to output 0.
void SetChain(const std::vector<Opcode>& chain, fxfuse_program* program) {
  program->instruction_count = static_cast<int32_t>(chain.size());
  for (size_t i = 0; i < chain.size(); ++i) {
    program->instruction[i] = Instruction(chain[i], i + 1 == chain.size() ? 0 : -1);
  }
}

const std::vector<Opcode> kRelu = {Opcode::relu};
const std::vector<Opcode> kAddRelu = {Opcode::add, Opcode::relu};
const std::vector<Opcode> kFiveOps = {Opcode::add, Opcode::silu, Opcode::tanh, Opcode::gelu,
                                      Opcode::clamp};

struct Buffer {
  explicit Buffer(int64_t bytes) { Check(cudaMalloc(&data, bytes), "cudaMalloc"); }
  ~Buffer() { cudaFree(data); }
  Buffer(const Buffer&) = delete;
  void* data;
};

// Two planes each of `sets` matrices [rows, k], a multiple of 8, as fxfuse_cuda_split leaves them.
struct Planes {
  Planes(const void* matrices, int sets, int64_t rows, int64_t k)
      : size(CeilDivide(rows, FXFUSE_PLANE_ROWS) * FXFUSE_PLANE_ROWS * k * 4),
        rows(rows),
        plane(sets * size),
        root(sets * CeilDivide(rows, 4) * 16),
        special(sets * CeilDivide(rows, 4) * 16) {
    for (int i = 0; i < sets; ++i) {
      const fxfuse_split split = {
          rows,     k,       k,         1,
          k,        2,       0,         static_cast<const float*>(matrices) + i * rows * k,
          Plane(i), Root(i), Special(i)};
      Check(fxfuse_cuda_split(&split, 1, nullptr));
    }
  }
  void* Plane(int set) const { return static_cast<char*>(plane.data) + set * size; }
  float* Root(int set) const { return static_cast<float*>(root.data) + set * Padded(); }
  int32_t* Special(int set) const { return static_cast<int32_t*>(special.data) + set * Padded(); }

 private:
  int64_t Padded() const { return CeilDivide(rows, 4) * 4; }

  int64_t size, rows;
  Buffer plane, root, special;
};

// Milliseconds of one call, the median of several after a warm-up.
template <class Call>
float Time(Call call) {
  constexpr int kRepeats = 11;
  cudaEvent_t start, stop;
  Check(cudaEventCreate(&start), "event");
  Check(cudaEventCreate(&stop), "event");
  std::vector<float> times(kRepeats);
  for (int i = 0; i < 3; ++i) call();
  for (float& ms : times) {
    Check(cudaEventRecord(start), "record");
    call();
    Check(cudaEventRecord(stop), "record");
    Check(cudaEventSynchronize(stop), "kernel");
    Check(cudaEventElapsedTime(&ms, start, stop), "elapsed");
  }
  std::sort(times.begin(), times.end());
  return times[kRepeats / 2];
}

void TunePortable(int dtype, int64_t m, int64_t n, int64_t k) {
  const int size = DtypeSize(dtype);
  // Several operands in turn, so that small ones are not read out of L2 alone.
  constexpr int kSets = 3;
  const int64_t rows = std::min<int64_t>(m, 64), step = m / rows;
  Buffer a(kSets * m * k * size), b(kSets * n * k * size), bias(n * size), out(m * n * 4);
  Buffer reference(rows * n * 4);
  Fill<<<1024, 256>>>(a.data, dtype, kSets * m * k, 1);
  Fill<<<1024, 256>>>(b.data, dtype, kSets * n * k, 2);
  Fill<<<1024, 256>>>(bias.data, dtype, n, 3);
  const dim3 grid(static_cast<unsigned>((n + 3) / 4), static_cast<unsigned>(rows));
  Reference<<<grid, 128>>>(a.data, b.data, bias.data, dtype, static_cast<float*>(reference.data),
                           step, n, k);
  std::vector<float> expected(rows * n);
  Check(cudaMemcpy(expected.data(), reference.data, rows * n * 4, cudaMemcpyDefault), "reference");

  fxfuse_problem problem = {};
  problem.m = m, problem.n = n, problem.k = k, problem.lda = k, problem.ldb = k;
  problem.input_dtype = problem.bias_dtype = dtype;
  problem.has_gemm = 1, problem.has_bias = 1;
  problem.program.operand_count = problem.program.output_count = 1;
  problem.program.operand[0] = {0, 1, 1, m, dtype, 0};
  void* pointers[FXFUSE_PTR_COUNT] = {a.data, b.data, bias.data};
  pointers[FXFUSE_PTR_OPERAND] = bias.data;
  pointers[FXFUSE_PTR_OUTPUT] = out.data;

  const bool aligned = VectorAligned(nullptr, k, 2, dtype);
  const bool splits = dtype == FXFUSE_F32 && k % 8 == 0;
  const Planes planes_a(a.data, splits ? kSets : 0, m, k),
      planes_b(b.data, splits ? kSets : 0, n, k);

  const Device* device;
  Check(CurrentDevice("tune", &device));
  const PortableKernels all = AllPortableKernels();
  for (const PortableKernel* next = all.kernel; next != all.kernel + all.count; ++next) {
    const PortableKernel& kernel = *next;
    if (kernel.planes > 0 ? !splits : kernel.input_dtype != dtype) continue;
    if (!aligned && kernel.tile != TileKind::kRagged) continue;
    problem.planes = kernel.planes;
    problem.input_dtype = kernel.input_dtype;
    const int out_dtype = kernel.math == MathLevel::kExact ? int{FXFUSE_F32} : dtype;
    problem.program.output[0] = {n, out_dtype, 0};
    int turn = 0;
    const auto call = [&] {
      const int set = turn++ % kSets;
      pointers[FXFUSE_PTR_A] = static_cast<char*>(a.data) + set * m * k * size;
      pointers[FXFUSE_PTR_B] = static_cast<char*>(b.data) + set * n * k * size;
      if (kernel.planes > 0) {
        const Planes* const planes[] = {&planes_a, &planes_b};
        for (int i = 0; i < 2; ++i) {
          pointers[FXFUSE_PTR_A + i] = planes[i]->Plane(set);
          pointers[FXFUSE_PTR_ROOT_A + i] = planes[i]->Root(set);
          pointers[FXFUSE_PTR_SPECIAL_A + i] = planes[i]->Special(set);
        }
      }
      Check(LaunchPortable("tune", problem, pointers, device->limits, kernel, nullptr));
    };
    SetChain(kFiveOps, &problem.program);
    const float five_ms = Time(call);
    SetChain(kRelu, &problem.program);
    const float ms = Time(call);
    Check(cudaMemset(out.data, 0xff, m * n * 4), "memset");
    turn = 0;
    call();

    std::vector<uint8_t> raw(m * n * DtypeSize(out_dtype));
    Check(cudaMemcpy(raw.data(), out.data, raw.size(), cudaMemcpyDefault), "result");
    double error = 0.0, norm = 0.0;
    for (int64_t i = 0; i < rows * n; ++i) {
      const int64_t j = i / n * step * n + i % n;
      const float value =
          out_dtype == FXFUSE_F32
              ? reinterpret_cast<const float*>(raw.data())[j]
              : (out_dtype == FXFUSE_F16
                     ? __half2float(reinterpret_cast<const __half*>(raw.data())[j])
                     : __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(raw.data())[j]));
      error += std::pow(value - double{expected[i]}, 2);
      norm += std::pow(double{expected[i]}, 2);
    }
    printf("%6lld %6lld %6lld  %-36s %9.1f us %7.1f TFLOP/s  five ops %9.1f us  error %.1e\n",
           static_cast<long long>(m), static_cast<long long>(n), static_cast<long long>(k),
           kernel.name, ms * 1e3, 2e-9 * m * n * k / ms, five_ms * 1e3, std::sqrt(error / norm));
  }
}

void TunePointwise(int dtype, int64_t m, int64_t n) {
  const int size = DtypeSize(dtype);
  // Several matrices in turn, so that none is still in L2 when its turn comes again.
  constexpr int kMatrices = 8;
  Buffer in(kMatrices * m * n * size), out(kMatrices * m * n * size), row(n * size);
  Fill<<<1024, 256>>>(in.data, dtype, kMatrices * m * n, 1);
  Fill<<<1024, 256>>>(row.data, dtype, n, 2);
  fxfuse_problem problem = {};
  problem.m = m, problem.n = n, problem.lda = n;
  problem.input_dtype = problem.bias_dtype = dtype;
  fxfuse_program& program = problem.program;
  program.operand_count = program.output_count = 1;
  program.operand[0] = {0, 1, 1, m, dtype, 0};
  program.output[0] = {n, dtype, 0};

  for (const std::vector<Opcode>& chain : {kRelu, kAddRelu, kFiveOps}) {
    SetChain(chain, &program);
    int turn = 0;
    const float ms = Time([&] {
      void* pointers[FXFUSE_PTR_COUNT] = {};
      const int64_t offset = (turn++ % kMatrices) * m * n * size;
      pointers[FXFUSE_PTR_A] = static_cast<char*>(in.data) + offset;
      pointers[FXFUSE_PTR_OPERAND] = row.data;
      pointers[FXFUSE_PTR_OUTPUT] = static_cast<char*>(out.data) + offset;
      Check(fxfuse_cuda_run(&problem, pointers, nullptr));
    });
    printf("%6lld %6lld  pointwise, dtype %d, %zu ops %9.1f us %7.2f TB/s\n",
           static_cast<long long>(m), static_cast<long long>(n), dtype, chain.size(), ms * 1e3,
           2e-9 * m * n * size / ms);
  }
}

}  // namespace
}  // namespace fxfuse

int main(int argc, char** argv) {
  fxfuse::Check(fxfuse_cuda_init());
  std::vector<std::vector<int64_t>> shapes;
  for (int i = 1; i + 2 < argc; i += 3) {
    shapes.push_back({atoll(argv[i]), atoll(argv[i + 1]), atoll(argv[i + 2])});
  }
  if (shapes.empty()) {
    shapes = {{1024, 8192, 8192}, {128, 8192, 8192},  {16, 8192, 8192},   {1, 4096, 4096},
              {512, 1024, 1024},  {4096, 4096, 1024}, {1001, 1001, 1001}, {7, 33, 5}};
  }
  for (const int dtype : {FXFUSE_BF16, FXFUSE_F16, FXFUSE_F32}) {
    for (const auto& s : shapes) fxfuse::TunePortable(dtype, s[0], s[1], s[2]);
  }
  for (const int dtype : {FXFUSE_BF16, FXFUSE_F16, FXFUSE_F32}) {
    fxfuse::TunePointwise(dtype, 1024, 8192);
    fxfuse::TunePointwise(dtype, 8192, 1000);
  }
  return 0;
}
