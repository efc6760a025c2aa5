// The CUDA kernels, run on the host (see emulation.h) with HostMath for the device's, against plain
// loops in double: index arithmetic, swizzles, barriers, ragged edges, every kind of operand.

#include "emulation.h"
//
#define FXFUSE_ISA emulated
#include "../math_host.h"
#define FXFUSE_CUDA_MATH_DEVICE_CUH_  // in place of math_device.cuh:
namespace fxfuse {
using emulated::HostMath;
// With what only gradients of chains take.
struct DeviceMath : HostMath {
  static Normal normal(float x) {
    return {0.5f * std::erfc(-x * 0.70710678f), std::exp(-0.5f * x * x)};
  }
  static Normal normal_unit(float x) { return normal(x); }
};
using DeviceHalfMath = DeviceMath;
using DeviceFastMath = DeviceMath;
}  // namespace fxfuse
#include "chain.cuh"
#include "choose.h"
#include "pointwise_f32.cu"
#include "pointwise_f64.cu"
#include "portable_gemm.cuh"
#include "skinny_gemm.cuh"
//
#include "emulation_f64.h"

namespace fxfuse {
namespace {

constexpr float kUntouched = 77.0f;
constexpr int64_t kRepeat = 2, kPeriod = 3;  // of the periodic operand
int failures = 0;

template <class T>
constexpr int kDtype = sizeof(T) == 8   ? FXFUSE_F64
                       : sizeof(T) == 4 ? FXFUSE_F32
                                        : (std::is_same_v<T, __half> ? FXFUSE_F16 : FXFUSE_BF16);

template <class T>
std::vector<T> Random(int64_t count) {
  static std::mt19937 random(7);
  std::vector<T> values(count);
  using Real = std::conditional_t<sizeof(T) == 8, double, float>;
  for (T& value : values) value = T(std::uniform_real_distribution<Real>(-1, 1)(random));
  return values;
}

fxfuse_instruction Instruction(Opcode opcode, std::vector<std::pair<int, int>> arguments,
                               int store = -1, int save = -1, float immediate = 0) {
  fxfuse_instruction instruction = {};
  instruction.opcode = static_cast<uint16_t>(opcode);
  instruction.arity = static_cast<uint8_t>(arguments.size());
  for (size_t i = 0; i < arguments.size(); ++i) {
    instruction.source[i] = static_cast<uint8_t>(arguments[i].first);
    instruction.index[i] = static_cast<uint8_t>(arguments[i].second);
  }
  instruction.store = static_cast<int8_t>(store);
  instruction.save = static_cast<int8_t>(save);
  instruction.immediate[0] = immediate;
  return instruction;
}

// A program with every source and every kind of operand, its data, and its meaning in double. Of
// double outputs, operands are double, too, but those of 16 bits and bools.
template <class Out>
class Case {
 public:
  using Wide = std::conditional_t<sizeof(Out) == 8, double, float>;

  Case(int64_t m, int64_t n, int64_t padding)
      : m_(m),
        n_(n),
        stride_(n + padding),
        row_(Random<Wide>(n)),
        column_(Random<Wide>(m)),
        table_(Random<Wide>(kPeriod * n)),
        full_(Random<__half>(m * stride_)),
        mask_(m * n),
        output_{std::vector<Out>(m * stride_, Out(kUntouched)),
                std::vector<Out>(m * stride_, Out(kUntouched))} {
    for (size_t i = 0; i < mask_.size(); ++i) mask_[i] = i * 2654435761u >> 9 & 1;
    problem.m = m, problem.n = n;
    fxfuse_program& program = problem.program;
    program.operand_count = 6, program.output_count = 2, program.slot_count = 2;
    program.operand[0] = {0, 1, 1, m, kDtype<Wide>, 0};
    program.operand[1] = {n, 1, 1, m, FXFUSE_BOOL, 0};
    program.operand[2] = {stride_, 1, 1, m, FXFUSE_F16, 0};
    program.operand[3] = {n, 1, kRepeat, kPeriod, kDtype<Wide>, 0};
    program.operand[4] = {1, 0, 1, m, kDtype<Wide>, 0};
    program.operand[5] = {0, 0, 1, m, FXFUSE_F32, 0};
    program.output[0] = program.output[1] = {stride_, kDtype<Out>, 0};
    const void* data[] = {row_.data(),   mask_.data(),   full_.data(),
                          table_.data(), column_.data(), &condition_};
    for (int i = 0; i < 6; ++i) pointers[FXFUSE_PTR_OPERAND + i] = const_cast<void*>(data[i]);
    for (int i = 0; i < 2; ++i) pointers[FXFUSE_PTR_OUTPUT + i] = output_[i].data();
    const std::pair<int, int> previous{FXFUSE_FROM_PREVIOUS, 0}, slot{FXFUSE_FROM_SLOT, 1},
        immediate{FXFUSE_FROM_IMMEDIATE, 0};
    const auto operand = [](int i) { return std::make_pair(int{FXFUSE_FROM_OPERAND}, i); };
    const fxfuse_instruction instructions[] = {
        Instruction(Opcode::copy, {previous}, -1, 1),
        Instruction(Opcode::add, {previous, operand(0)}),
        Instruction(Opcode::mul, {previous, operand(1)}),
        Instruction(Opcode::add, {operand(2), previous}),
        Instruction(Opcode::sub, {operand(3), previous}, 0),
        Instruction(Opcode::maximum, {previous, slot}),
        Instruction(Opcode::pow, {previous, immediate}, -1, -1, 1.0f),  // runs in the compact loop
        Instruction(Opcode::add, {previous, operand(4)}),
        Instruction(Opcode::where, {operand(5), previous, immediate}, 1, -1, 0.5f)};
    for (const fxfuse_instruction& i : instructions) {
      program.immediate_f64[program.instruction_count][0] = i.immediate[0];
      program.instruction[program.instruction_count++] = i;
    }
  }

  // Compares both outputs, given the accumulator; nothing may be written beyond column n.
  template <class Accumulator>
  void Check(const char* name, Accumulator accumulator) {
    double worst = 0;
    for (int64_t i = 0; i < m_; ++i) {
      for (int64_t j = 0; j < stride_; ++j) {
        double expected[2] = {kUntouched, kUntouched};
        if (j < n_) {
          const double z = accumulator(i, j);
          double t = z + row_[j];
          t = static_cast<float>(full_[i * stride_ + j]) + t * mask_[i * n_ + j];
          expected[0] = table_[i / kRepeat % kPeriod * n_ + j] - t;
          expected[1] = condition_ != 0 ? std::max(expected[0], z) + column_[i] : 0.5;
        }
        for (int o = 0; o < 2; ++o) {
          const double found = static_cast<Wide>(output_[o][i * stride_ + j]);
          // An infinity, or a NaN, must be the same one.
          const bool same = found == expected[o] || (std::isnan(found) && std::isnan(expected[o]));
          const double error =
              same ? 0 : std::abs(found - expected[o]) / (1 + std::abs(expected[o]));
          worst = error <= worst ? worst : error;  // NaN is worse than anything
        }
      }
    }
    const double limit = sizeof(Out) == 8   ? 1e-15
                         : sizeof(Out) == 4 ? 1e-5
                                            : (kDtype<Out> == FXFUSE_F16 ? 1e-3 : 8e-3);
    const bool good = worst <= limit && emulation::bank_conflicts == 0;
    failures += !good;
    printf("%-6s %-24s %4ld x %-5ld error %.1e, %ld bank conflicts in %ld\n",
           good ? "ok" : "FAILED", name, static_cast<long>(m_), static_cast<long>(n_), worst,
           emulation::bank_conflicts, emulation::matrices_read);
  }

  fxfuse_problem problem = {};
  void* pointers[FXFUSE_PTR_COUNT] = {};

 private:
  int64_t m_, n_, stride_;
  std::vector<Wide> row_, column_, table_;
  std::vector<__half> full_;
  std::vector<uint8_t> mask_;
  float condition_ = 1;
  std::vector<Out> output_[2];
};

// `shift` elements off 16-byte alignment; `k_padding` and `n_padding` between rows.
template <class Input, class Tile, int kWidth, class Out>
void TestPortable(const char* name, int64_t m, int64_t n, int64_t k, int64_t k_padding = 0,
                  int64_t n_padding = 0, int64_t shift = 0) {
  using Config = PortableConfig<Input, Tile, HostMath, kWidth>;
  const int64_t ld = k + k_padding;
  const std::vector<Input> a = Random<Input>(m * ld + shift), b = Random<Input>(n * ld + shift);
  const std::vector<Input> bias = Random<Input>(n);
  Case<Out> test(m, n, n_padding);
  test.problem.k = k, test.problem.lda = test.problem.ldb = ld;
  test.problem.input_dtype = test.problem.bias_dtype = kDtype<Input>;
  test.problem.has_gemm = test.problem.has_bias = 1;
  test.pointers[FXFUSE_PTR_BIAS] = const_cast<Input*>(bias.data());

  PortableArguments arguments = {};
  arguments.a = a.data() + shift, arguments.b = b.data() + shift;
  arguments.lda = arguments.ldb = ld;
  arguments.m = m, arguments.n = n, arguments.k = k;
  arguments.tiles_m = (m + Tile::kM - 1) / Tile::kM;
  arguments.tiles_n = (n + Tile::kN - 1) / Tile::kN;
  arguments.whole_words = RowsAligned(arguments.a, ld, m, kDtype<Input>, 4) &&
                          RowsAligned(arguments.b, ld, n, kDtype<Input>, 4);
  TranslateProgram(test.problem, test.pointers, &arguments.program);
  emulation::matrices_read = emulation::bank_conflicts = 0;
  emulation::Launch(arguments.tiles_m * arguments.tiles_n, Config::kThreads,
                    [&] { PortableGemm<Config>(arguments); });

  const auto value = [](Input x) -> double {
    const float f = static_cast<float>(x);
    return sizeof(Input) == 4 ? __uint_as_float(round_to_tf32(__float_as_uint(f))) : f;
  };
  test.Check(name, [&](int64_t i, int64_t j) {
    double sum = static_cast<float>(bias[j]);
    for (int64_t l = 0; l < k; ++l) {
      sum += value(a[shift + i * ld + l]) * value(b[shift + j * ld + l]);
    }
    return sum;
  });
}

// K is divided by `groups` groups of warps and by `split` blocks; `k_padding` and `n_padding`
// between rows, which hold NaN.
template <int kRows, int kColumns, class Out>
void TestSkinny(const char* name, int64_t m, int64_t n, int64_t k, int groups, int split, int depth,
                int64_t k_padding = 0, int64_t n_padding = 0) {
  using Config = SkinnyConfig<kRows, kColumns, HostMath>;
  const SkinnyKernel kernel = {"", nullptr, MathLevel::kExact, kRows, kColumns};
  const int64_t ld = k + k_padding;
  std::vector<float> a = Random<float>(m * ld), b = Random<float>(n * ld);
  const std::vector<float> bias = Random<float>(n);
  for (std::vector<float>* matrix : {&a, &b}) {
    for (size_t i = 0; i < matrix->size(); ++i) {
      if (static_cast<int64_t>(i) % ld >= k) (*matrix)[i] = NAN;
    }
  }
  Case<Out> test(m, n, n_padding);
  test.problem.k = k, test.problem.lda = test.problem.ldb = ld;
  test.problem.has_gemm = test.problem.has_bias = 1;
  test.pointers[FXFUSE_PTR_BIAS] = const_cast<float*>(bias.data());

  SkinnyArguments arguments = {};
  arguments.a = a.data(), arguments.b = b.data();
  arguments.lda = arguments.ldb = ld;
  arguments.m = m, arguments.n = n, arguments.k = k;
  arguments.split = split, arguments.depth = depth;
  arguments.range = kernel.Range(k, groups, split);
  while (1 << arguments.log2_groups < groups) ++arguments.log2_groups;
  TranslateProgram(test.problem, test.pointers, &arguments.program);
  emulation::matrices_read = emulation::bank_conflicts = 0;
  const int tiles = static_cast<int>(CeilDivide(n, kernel.TileColumns(groups)));
  emulation::Launch(tiles * split, kSkinnyThreads, [&] { SkinnyGemm<Config>(arguments); }, split);
  test.Check(name, [&](int64_t i, int64_t j) {
    double sum = bias[j];
    for (int64_t l = 0; l < k; ++l) sum += static_cast<double>(a[i * ld + l]) * b[j * ld + l];
    return sum;
  });
}

// Planes of a matrix [rows, k], K adjacent, and what fxfuse_cuda_split leaves beside them; made up,
// so that the low plane is as large as the high one.
struct TestPlanes {
  TestPlanes(int64_t rows, int64_t k, const std::vector<int64_t>& special_rows)
      : stride((k + 7) / 8 * 8),
        size((rows + FXFUSE_PLANE_ROWS - 1) / FXFUSE_PLANE_ROWS * FXFUSE_PLANE_ROWS * stride),
        plane(Random<__half>(2 * size)),
        root(rows),
        special(rows) {
    for (int64_t i = 0; i < 2 * size; ++i) {
      const int64_t row = i % size / stride;
      if (row >= rows) plane[i] = __half(NAN);
      if (i % stride >= k) plane[i] = __half(0.0f);
    }
    for (int64_t i = 0; i < rows; ++i) root[i] = std::ldexp(1.0f, -static_cast<int>(i % 3));
    for (const int64_t row : special_rows) {
      special[row] = 1;
      plane[row * stride + row % k] = __half(INFINITY);
      plane[size + row * stride + row % k] = __half(0.0f);
    }
  }
  double At(int p, int64_t row, int64_t column) const {
    return static_cast<float>(plane[p * size + row * stride + column]);
  }

  int64_t stride, size;
  std::vector<__half> plane;
  std::vector<float> root;
  std::vector<int32_t> special;
};

// Three products of planes; rows that are special get an infinity.
template <class Tile, class Out>
void TestPortablePlanes(const char* name, int64_t m, int64_t n, int64_t k,
                        const std::vector<int64_t>& special_a = {},
                        const std::vector<int64_t>& special_b = {}) {
  using Config = PortableConfig<__half, Tile, HostMath, 4, 2>;
  const TestPlanes a(m, k, special_a), b(n, k, special_b);
  const std::vector<float> bias = Random<float>(n);
  Case<Out> test(m, n, 0);
  test.problem.k = k, test.problem.lda = test.problem.ldb = a.stride;
  test.problem.input_dtype = FXFUSE_F16, test.problem.bias_dtype = FXFUSE_F32;
  test.problem.has_gemm = test.problem.has_bias = 1, test.problem.planes = 2;
  test.pointers[FXFUSE_PTR_BIAS] = const_cast<float*>(bias.data());

  PortableArguments arguments = {};
  arguments.a = a.plane.data(), arguments.b = b.plane.data();
  arguments.lda = arguments.ldb = a.stride;
  arguments.m = m, arguments.n = n, arguments.k = k;
  arguments.tiles_m = (m + Tile::kM - 1) / Tile::kM;
  arguments.tiles_n = (n + Tile::kN - 1) / Tile::kN;
  arguments.plane_bytes_a = a.size * 2, arguments.plane_bytes_b = b.size * 2;
  arguments.root_a = a.root.data(), arguments.root_b = b.root.data();
  arguments.special_a = a.special.data(), arguments.special_b = b.special.data();
  TranslateProgram(test.problem, test.pointers, &arguments.program);
  emulation::matrices_read = emulation::bank_conflicts = 0;
  emulation::Launch(arguments.tiles_m * arguments.tiles_n, Config::kThreads,
                    [&] { PortableGemm<Config>(arguments); });
  test.Check(name, [&](int64_t i, int64_t j) {
    double sum = 0;
    for (int64_t l = 0; l < k; ++l) {
      const double high_a = a.At(0, i, l), high_b = b.At(0, j, l);
      sum += high_a * high_b;
      if (a.special[i] || b.special[j]) continue;
      sum += a.At(1, i, l) * high_b + high_a * b.At(1, j, l);
    }
    const double factor = a.root[i] * b.root[j];
    return bias[j] + sum * factor * factor;
  });
}

double Exact(double value) { return value; }
double Exact(__half value) { return static_cast<float>(value); }
double Exact(__nv_bfloat16 value) { return static_cast<float>(value); }

// The arithmetic of a pointwise kernel for tensors of these types.
template <class... T>
using MathFor = std::conditional_t<((sizeof(T) == 8) || ...), DeviceDoubleMath, HostMath>;

template <class In, class Out, int kWidth, int kGroups>
void TestPointwise(int64_t m, int64_t n, int64_t padding, int resident) {
  using Config = PointwiseConfig<MathFor<In, Out>, kWidth, kGroups, kWidth == 8>;
  const int64_t stride = n + padding;
  const std::vector<In> accumulator = Random<In>(m * stride);
  Case<Out> test(m, n, padding);
  const PointwiseGrid grid =
      DividePointwise({"", nullptr, MathLevel::kExact, PointwiseKind::kPlain, kWidth, kGroups},
                      m % 2 == 0 ? kMostPointwiseThreads : kFewestPointwiseThreads, m, n);
  test.problem.lda = stride, test.problem.input_dtype = kDtype<In>;
  test.pointers[FXFUSE_PTR_A] = const_cast<In*>(accumulator.data());
  const auto arguments = DescribePointwise<typename Config::Arguments>(test.problem, test.pointers,
                                                                       PointwiseKind::kPlain, grid);
  emulation::matrices_read = emulation::bank_conflicts = 0;
  const int blocks = static_cast<int>(grid.column_blocks * grid.row_blocks);
  emulation::Launch(std::min(blocks, resident), grid.threads,
                    [&] { PointwiseProgram<Config>(arguments); });
  test.Check("pointwise", [&](int64_t i, int64_t j) { return Exact(accumulator[i * stride + j]); });
}

struct Op {
  Opcode opcode;
  float p0 = 0, p1 = 0;
  bool constant = false;  // p0 is a second argument
};

// The codes of the chain that these ops are, on 8 columns of bf16.
void TestChain(const char* name, std::vector<Op> ops, std::vector<ChainCode> expected) {
  fxfuse_problem problem = {};
  problem.m = problem.n = 8;
  problem.program.output_count = 1;
  problem.program.output[0] = {8, FXFUSE_BF16, 0};
  for (const Op& op : ops) {
    std::vector<std::pair<int, int>> arguments = {{FXFUSE_FROM_PREVIOUS, 0}};
    if (op.constant) arguments.push_back({FXFUSE_FROM_IMMEDIATE, 0});
    const bool last = &op == &ops.back();
    fxfuse_instruction& next = problem.program.instruction[problem.program.instruction_count++];
    next = Instruction(op.opcode, arguments, last ? 0 : -1, -1, op.p0);
    next.immediate[1] = op.p1;
  }
  void* const pointers[FXFUSE_PTR_COUNT] = {};
  DeviceProgram program = {};
  TranslateProgram(problem, pointers, &program);
  bool good = program.chain_count > 0;
  expected.push_back(ChainCode::store);
  for (size_t i = 0; i < expected.size(); ++i) {
    const uint32_t word = program.chain_codes[i / kChainCodesPerWord];
    const uint32_t code = word >> (kChainCodeBits * (i % kChainCodesPerWord)) % 32 & 31;
    good = good && code == static_cast<uint32_t>(expected[i]);
  }
  failures += !good;
  printf("%-6s chain of %s\n", good ? "ok" : "FAILED", name);
}

void TestChains() {
  const Op clamp = {Opcode::clamp, -1.0f, 1.0f}, tanh = {Opcode::tanh}, gelu = {Opcode::gelu};
  const Op twice = {Opcode::mul, 2.0f, 0.0f, true}, half = {Opcode::mul, -0.5f, 0.0f, true};
  const Op one_more = {Opcode::add, 1.0f, 0.0f, true}, relu = {Opcode::relu};
  using C = ChainCode;
  TestChain("clamp, tanh, gelu", {clamp, tanh, gelu}, {C::clamp, C::tanh_unit, C::gelu_unit});
  TestChain("gelu, tanh", {gelu, tanh}, {C::gelu, C::tanh});
  TestChain("tanh, mul by 2, gelu", {tanh, twice, gelu}, {C::tanh, C::mul_constant, C::gelu});
  TestChain("relu, clamp, mul by -1/2, add 1, gelu", {relu, clamp, half, one_more, gelu},
            {C::relu, C::clamp, C::mul_constant, C::add_constant, C::gelu_unit});
  TestChain("clamp to 2, gelu", {{Opcode::clamp, -1.0f, 2.0f}, gelu}, {C::clamp, C::gelu});
  TestChain("clamp to NaN, gelu", {{Opcode::clamp, -1.0f, NAN}, gelu}, {C::clamp, C::gelu});
  TestChain("copy, tanh, copy, silu", {{Opcode::copy}, tanh, {Opcode::copy}, {Opcode::silu}},
            {C::tanh, C::silu});
  TestChain("tanh, gelu, clamp", {tanh, gelu, clamp}, {C::tanh, C::gelu_unit});
  TestChain("tanh, silu, clamp", {tanh, {Opcode::silu}, clamp}, {C::tanh, C::silu, C::clamp});
  TestChain("copy", {{Opcode::copy}}, {});
  TestChain("ten steps", std::vector<Op>(10, relu), std::vector<C>(10, C::relu));
}

// The columns of a group, from the one that holds column `j` on, in double.
template <class T>
struct Group {
  Group(const std::vector<T>& matrix, int64_t n, int width, int64_t i, int64_t j)
      : at(matrix.begin() + i * n + j / width * width), width(width) {}
  double operator[](int c) const { return static_cast<float>(at[c]); }
  template <class Term>
  double Mean(const Term& term) const {
    double sum = 0;
    for (int c = 0; c < width; ++c) sum += term(c);
    return sum / width;
  }
  double Mean() const {
    return Mean([&](int c) { return (*this)[c]; });
  }
  double Rstd(double eps) const {
    const double mean = Mean();
    const auto square = [&](int c) { return ((*this)[c] - mean) * ((*this)[c] - mean); };
    return 1 / std::sqrt(Mean(square) + eps);
  }
  double Normalized(int c, double eps) const { return ((*this)[c] - Mean()) * Rstd(eps); }

  typename std::vector<T>::const_iterator at;
  int width;
};

constexpr float kEps = 1e-3f;

// A problem [m, n] of one output for each op, taken of the accumulator, and a gradient as operand.
fxfuse_problem GroupProblem(int64_t m, int64_t n, int dtype, int width, std::vector<Opcode> ops) {
  fxfuse_problem problem = {};
  problem.m = m, problem.n = n, problem.lda = n, problem.input_dtype = dtype;
  fxfuse_program& program = problem.program;
  program.operand_count = program.slot_count = 1;
  program.operand[0] = {n, 1, 1, m, dtype, 0};
  program.instruction[0] = Instruction(Opcode::copy, {{FXFUSE_FROM_PREVIOUS, 0}}, -1, 0);
  program.instruction_count = 1;
  for (const Opcode opcode : ops) {
    std::vector<std::pair<int, int>> arguments = {{FXFUSE_FROM_SLOT, 0}};
    if (opcode == Opcode::normalize_grad) arguments.insert(arguments.begin(), {2, 0});
    fxfuse_instruction& op = program.instruction[program.instruction_count++];
    op = Instruction(opcode, arguments, program.output_count, -1, static_cast<float>(width));
    op.immediate[1] = kEps;
    program.output[program.output_count++] = {n, dtype, 0};
  }
  return problem;
}

// Every op over groups, by the pointwise kernel.
template <class T, int kWidth, int kGroups>
void TestGroups(int64_t m, int64_t n, int width, int resident) {
  using Config = PointwiseConfig<HostMath, kWidth, kGroups, kWidth == 8>;
  std::vector<T> x = Random<T>(m * n), g = Random<T>(m * n);
  for (T& value : x) value = T(static_cast<float>(value) + 3.0f);
  std::vector<T> output[3];
  fxfuse_problem problem = GroupProblem(
      m, n, kDtype<T>, width, {Opcode::normalize, Opcode::normalize_grad, Opcode::group_mean});
  void* pointers[FXFUSE_PTR_COUNT] = {};
  pointers[FXFUSE_PTR_A] = x.data();
  pointers[FXFUSE_PTR_OPERAND] = g.data();
  for (int i = 0; i < 3; ++i) {
    output[i].assign(m * n, T(kUntouched));
    pointers[FXFUSE_PTR_OUTPUT + i] = output[i].data();
  }
  const PointwiseGrid grid =
      DividePointwise({"", nullptr, MathLevel::kExact, PointwiseKind::kPlain, kWidth, kGroups},
                      kMostPointwiseThreads, m, n);
  const auto arguments =
      DescribePointwise<PointwiseArguments>(problem, pointers, PointwiseKind::kPlain, grid);
  const int blocks = static_cast<int>(grid.column_blocks * grid.row_blocks);
  emulation::Launch(std::min(blocks, resident), grid.threads,
                    [&] { PointwiseProgram<Config>(arguments); });
  double worst = 0;
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      const Group<T> a(x, n, width, i, j), b(g, n, width, i, j);
      const auto slope = [&](int c) { return b[c] * a.Normalized(c, kEps); };
      const double normalized = a.Normalized(j % width, kEps);
      const double expected[] = {
          normalized, a.Rstd(kEps) * (b[j % width] - b.Mean() - normalized * b.Mean(slope)),
          a.Mean()};
      for (int o = 0; o < 3; ++o) {
        const double found = static_cast<float>(output[o][i * n + j]);
        const double error = std::abs(found - expected[o]) / (1 + std::abs(expected[o]));
        worst = error <= worst ? worst : error;
      }
    }
  }
  const bool good = LanesCoverGroups(problem, kWidth) && worst <= (sizeof(T) == 4 ? 5e-6 : 8e-3);
  failures += !good;
  printf("%-6s groups of %-14d %4ld x %-5ld error %.1e\n", good ? "ok" : "FAILED", width,
         static_cast<long>(m), static_cast<long>(n), worst);
}

// Chains take what is known to lie in [-1, 1] by forms of its own.
struct ChainMath : HostMath {
  static float gelu_unit(float x) { return gelu(x); }
  static float tanh_unit(float x) { return tanh(x); }
};

// A chain that normalizes, multiplies by a row and adds a matrix, over the accumulators of a warp
// or, of several parts, of the four whose rows fill them.
template <int kDtype, class T, int kBlocks, int kParts = 1>
void TestChainGroups(int64_t n, int width, bool adjacent) {
  constexpr int64_t kRows = 64 * (kParts - 1) + 13;  // of 16 in the last part
  const std::vector<T> x = Random<T>(kRows * n), row = Random<T>(n), full = Random<T>(kRows * n);
  std::vector<T> output(kRows * n, T(kUntouched));
  fxfuse_problem problem = {};
  problem.m = kRows, problem.n = n;
  fxfuse_program& described = problem.program;
  described.instruction_count = 3, described.operand_count = 2, described.output_count = 1;
  described.operand[0] = {0, 1, 1, kRows, kDtype, 0};
  described.operand[1] = {n, 1, 1, kRows, kDtype, 0};
  described.output[0] = {n, kDtype, 0};
  described.instruction[0] = Instruction(Opcode::normalize, {{FXFUSE_FROM_PREVIOUS, 0}}, -1, -1,
                                         static_cast<float>(width));
  described.instruction[0].immediate[1] = kEps;
  described.instruction[1] =
      Instruction(Opcode::mul, {{FXFUSE_FROM_PREVIOUS, 0}, {FXFUSE_FROM_OPERAND, 0}}, -1, -1);
  described.instruction[2] =
      Instruction(Opcode::add, {{FXFUSE_FROM_PREVIOUS, 0}, {FXFUSE_FROM_OPERAND, 1}}, 0, -1);
  void* pointers[FXFUSE_PTR_COUNT] = {};
  pointers[FXFUSE_PTR_OPERAND] = const_cast<T*>(row.data());
  pointers[FXFUSE_PTR_OPERAND + 1] = const_cast<T*>(full.data());
  pointers[FXFUSE_PTR_OUTPUT] = output.data();
  DeviceProgram program = {};
  TranslateProgram(problem, pointers, &program);
  emulation::Launch(1, kParts > 1 ? 128 : 32, [&] {
    using Run = Chain<ChainMath, kDtype, kBlocks, true, kParts>;
    Run chain(program);
    typename Run::Values v = {};
    const int first_row = threadIdx.x / 32 * 16, quad = threadIdx.x % 4;
    for (int r = 0; r < 2 * kParts; ++r) {
      for (int b = 0; b < kBlocks; ++b) {
        for (int w = 0; w < 8; ++w) {
          const int i = first_row + threadIdx.x % 32 / 4 + r / 2 * 64 + r % 2 * 8;
          const int column = 32 * b + (adjacent ? 8 * quad + w : 8 * (w / 2) + 2 * quad + w % 2);
          if (i >= kRows || column >= n) continue;
          v[Run::Index(r / 2, b, r % 2, w)] = static_cast<float>(x[i * n + column]);
        }
      }
    }
    chain.Run(first_row, 0, adjacent, v);
  });
  double worst = program.chain_count > 0 ? 0 : INFINITY;
  for (int64_t i = 0; i < kRows; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      const double normalized = Group<T>(x, n, width, i, j).Normalized(j % width, kEps);
      const double expected =
          normalized * static_cast<float>(row[j]) + static_cast<float>(full[i * n + j]);
      const double error = std::abs(static_cast<float>(output[i * n + j]) - expected);
      worst = error <= worst ? worst : error;
    }
  }
  const bool good = worst <= (sizeof(T) == 4 ? 4e-6 : 3.2e-2);
  failures += !good;
  printf("%-6s chain, groups of %-7d %4ld x %-5ld error %.1e\n", good ? "ok" : "FAILED", width,
         static_cast<long>(kRows), static_cast<long>(n), worst);
}

// x + row, stored, and its sums over rows, columns and all.
template <class In, int kWidth, int kGroups>
void TestSums(int64_t m, int64_t n, int resident) {
  using Config = PointwiseConfig<MathFor<In>, kWidth, kGroups, kWidth == 8>;
  using Value = typename Config::Value;
  const PointwiseKernel kernel = {"",     nullptr, MathLevel::kExact, PointwiseKind::kSums,
                                  kWidth, kGroups};
  const std::vector<In> accumulator = Random<In>(m * n);
  const std::vector<Value> row = Random<Value>(n);
  const int threads = m % 2 == 0 ? kMostPointwiseThreads : kFewestPointwiseThreads;
  const PointwiseGrid grid = DividePointwise(kernel, threads, m, n);
  const PointwiseStrips strips = DivideSums(grid, resident);

  fxfuse_problem problem = {};
  problem.m = m, problem.n = n, problem.lda = n, problem.input_dtype = kDtype<In>;
  fxfuse_program& program = problem.program;
  program.instruction_count = program.output_count = 4;
  program.operand_count = 1;
  program.operand[0] = {0, 1, 1, m, kDtype<Value>, 0};
  const fxfuse_sum kinds[] = {FXFUSE_SUM_ROWS, FXFUSE_SUM_NONE, FXFUSE_SUM_ALL, FXFUSE_SUM_COLUMNS};
  for (int i = 0; i < 4; ++i) {
    fxfuse_instruction& op = program.instruction[i];
    op.opcode = static_cast<uint16_t>(i == 0 ? Opcode::add : Opcode::copy);
    op.arity = i == 0 ? 2 : 1;
    op.source[1] = FXFUSE_FROM_OPERAND;
    op.save = -1, op.store = static_cast<int8_t>(i);
    program.output[i] = {n, kDtype<Value>, kinds[i]};
  }
  constexpr Value kUntouched = -12345.0f;
  using Values = std::vector<Value>;
  Values output[4] = {Values(strips.p * n, kUntouched), Values(m * n, kUntouched),
                      Values(strips.p * strips.q, kUntouched), Values(m * strips.q, kUntouched)};
  void* pointers[FXFUSE_PTR_COUNT] = {};
  pointers[FXFUSE_PTR_A] = const_cast<In*>(accumulator.data());
  pointers[FXFUSE_PTR_OPERAND] = const_cast<Value*>(row.data());
  for (int i = 0; i < 4; ++i) pointers[FXFUSE_PTR_OUTPUT + i] = output[i].data();

  auto arguments =
      DescribePointwise<typename Config::Arguments>(problem, pointers, PointwiseKind::kPlain, grid);
  arguments.strips = strips.p;
  emulation::Launch(static_cast<int>(grid.column_blocks * strips.p), grid.threads,
                    [&] { PointwiseSums<Config, false>(arguments); });

  const auto value = [&](int64_t i, int64_t j) -> double {
    return Exact(accumulator[i * n + j]) + row[j];
  };
  // Errors relative to the sum of magnitudes.
  double worst = 0;
  const auto compare = [&](double found, double expected, double size) {
    const double error = std::abs(found - expected) / size;
    worst = error <= worst ? worst : error;
  };
  double all = 0, size_of_all = 0, found_all = 0;
  for (int64_t j = 0; j < n; ++j) {
    double expected = 0, size = 0, found = 0;
    for (int64_t i = 0; i < m; ++i) {
      compare(output[1][i * n + j], value(i, j), 1);
      expected += value(i, j);
      size += std::abs(value(i, j));
    }
    for (int64_t i = 0; i < strips.p; ++i) found += output[0][i * n + j];
    compare(found, expected, size);
    all += expected;
    size_of_all += size;
  }
  for (int64_t i = 0; i < m; ++i) {
    double expected = 0, size = 0, found = 0;
    for (int64_t j = 0; j < n; ++j) {
      expected += value(i, j);
      size += std::abs(value(i, j));
    }
    for (int64_t j = 0; j < strips.q; ++j) found += output[3][i * strips.q + j];
    compare(found, expected, size);
  }
  for (const Value part : output[2]) found_all += part;
  compare(found_all, all, size_of_all);
  const bool good = worst <= (sizeof(Value) == 8 ? 2e-15 : 5e-7);
  failures += !good;
  printf("%-6s %-24s %4ld x %-5ld error %.1e, %u x %u parts\n", good ? "ok" : "FAILED", "sums",
         static_cast<long>(m), static_cast<long>(n), worst, strips.p, strips.q);
}

}  // namespace
}  // namespace fxfuse

#include "emulation_gradient.h"

namespace fxfuse {
namespace {

void RunAll() {
  TestChains();
  TestGradients();
  using Bf16 = __nv_bfloat16;
  using F16 = __half;
  TestPortable<Bf16, SkinnyTile, 8, Bf16>("skinny bf16", 7, 72, 200);
  TestPortable<Bf16, SkinnyTile, 4, float>("skinny bf16 to fp32", 20, 33, 1000, 0, 3);
  TestPortable<Bf16, SmallTile, 8, Bf16>("small bf16", 70, 130, 328, 0, 8);
  TestPortable<F16, SmallTile, 4, float>("small fp16 to fp32", 64, 64, 512, 8);
  TestPortable<float, SmallTile, 4, float>("small tf32", 65, 60, 100, 4);
  TestPortable<Bf16, SmallTile, 8, Bf16>("small bf16, K = 0", 65, 60, 0);
  TestPortable<Bf16, SmallTile, 8, Bf16>("small bf16, padded rows", 65, 60, 104, 8);
  TestPortable<Bf16, RaggedTile, 8, Bf16>("ragged bf16, odd rows", 65, 71, 201);
  TestPortable<Bf16, RaggedTile, 8, Bf16>("ragged bf16, even rows", 65, 71, 202, 0, 1);
  TestPortable<Bf16, RaggedTile, 8, Bf16>("ragged bf16, K odd", 65, 71, 201, 1, 1);
  TestPortable<Bf16, RaggedTile, 8, Bf16>("ragged bf16, padded rows", 65, 60, 101, 3);
  TestPortable<F16, RaggedTile, 4, float>("ragged fp16, shifted", 33, 64, 64, 0, 0, 1);
  TestPortable<float, RaggedTile, 4, float>("ragged tf32, shifted", 65, 71, 101, 0, 0, 1);
  TestPortable<Bf16, MediumTile, 8, Bf16>("medium bf16", 200, 150, 456, 0, 2);
  TestPortable<float, MediumTile, 4, float>("medium tf32", 129, 128, 132);
  TestPortable<F16, LargeTile, 8, F16>("large fp16", 140, 300, 520);
  TestPortable<float, LargeTile, 4, F16>("large tf32 to fp16", 128, 256, 64);
  TestPortable<Bf16, SmallTile, 8, Bf16>("ten tile rows", 600, 70, 8);
  TestPortablePlanes<PlanesLargeTile, float>("large planes", 150, 200, 136);
  TestPortablePlanes<PlanesLargeTile, float>("large planes, special", 129, 140, 77, {3, 64, 128},
                                             {0, 70, 139});
  TestPortablePlanes<PlanesSmallTile, float>("small planes", 65, 131, 264);
  TestPortablePlanes<PlanesSmallTile, F16>("small planes to fp16", 70, 60, 1);
  TestPortablePlanes<PlanesSmallTile, float>("small planes, K = 0", 3, 5, 0);
  TestPortablePlanes<PlanesSmallTile, float>("small planes, special", 130, 66, 100, {129}, {});
  TestPortablePlanes<PlanesSkinnyTile, float>("skinny planes", 33, 130, 231);
  TestPortablePlanes<PlanesSkinnyTile, Bf16>("skinny planes to bf16", 20, 66, 33, {}, {65});
  TestSkinny<1, 8, float>("skinny fp32, 1 row", 1, 300, 4100, 1, 1, 6);
  TestSkinny<1, 8, float>("skinny fp32, 1 row", 1, 33, 4100, 8, 8, 6, 4, 3);
  TestSkinny<1, 8, float>("skinny fp32, K = 4", 1, 1, 4, 8, 8, 2);
  TestSkinny<4, 8, float>("skinny fp32, 3 rows", 3, 259, 1028, 2, 4, 4);
  TestSkinny<4, 8, Bf16>("skinny fp32 to bf16", 4, 64, 3000, 4, 1, 6);
  TestSkinny<8, 8, float>("skinny fp32, 5 rows", 5, 70, 2052, 8, 2, 4, 8);
  TestSkinny<8, 8, float>("skinny fp32, 8 rows", 8, 257, 260, 1, 8, 2);
  TestSkinny<16, 8, float>("skinny fp32, 16 rows", 16, 132, 1024, 2, 2, 6);
  TestSkinny<16, 8, float>("skinny fp32, 9 rows", 9, 65, 1500, 8, 4, 4, 0, 1);
  TestSkinny<32, 4, float>("skinny fp32, 17 rows", 17, 130, 516, 1, 2, 6);
  TestSkinny<32, 4, float>("skinny fp32, 32 rows", 32, 36, 1032, 4, 8, 4);
  TestSkinny<32, 4, F16>("skinny fp32 to fp16", 31, 17, 800, 8, 1, 2);
  TestPointwise<Bf16, Bf16, 8, 2>(37, 512, 0, 3);
  TestPointwise<Bf16, Bf16, 8, 2>(37, 515, 0, 3);
  TestPointwise<F16, F16, 8, 2>(5, 7, 0, 9);
  TestPointwise<float, float, 4, 4>(100, 132, 4, 5);
  TestPointwise<float, float, 4, 4>(65, 4097, 0, 7);
  TestPointwise<Bf16, float, 4, 4>(1, 3000, 0, 7);
  TestPointwise<float, Bf16, 8, 2>(300, 1, 0, 7);
  TestPointwise<Bf16, Bf16, 8, 2>(64, 6144, 0, 11);
  TestGroups<float, 4, 4>(37, 96, 32, 5);
  TestGroups<float, 4, 4>(9, 4, 4, 5);
  TestGroups<float, 4, 4>(70, 1280, 128, 2);
  TestGroups<Bf16, 8, 2>(33, 8, 8, 5);
  TestGroups<Bf16, 8, 2>(40, 1536, 256, 3);
  TestGroups<F16, 8, 2>(129, 320, 64, 3);
  TestChainGroups<FXFUSE_F32, float, 4>(128, 32, true);
  TestChainGroups<FXFUSE_F32, float, 4>(64, 64, true);
  TestChainGroups<FXFUSE_BF16, Bf16, 8>(256, 128, true);
  TestChainGroups<FXFUSE_BF16, Bf16, 8>(256, 256, false);
  TestChainGroups<FXFUSE_F16, F16, 2>(32, 32, false);
  TestChainGroups<FXFUSE_F32, float, 4, 2>(96, 32, true);
  TestChainGroups<FXFUSE_BF16, Bf16, 4, 2>(128, 128, true);
  TestChainGroups<FXFUSE_F16, F16, 4, 2>(128, 64, false);
  TestSums<float, 4, 4>(100, 132, 5);
  TestSums<float, 4, 4>(65, 4097, 7);
  TestSums<float, 4, 4>(700, 3, 4);
  TestSums<float, 4, 4>(9, 2048, 40);
  TestSums<__nv_bfloat16, 8, 2>(130, 520, 9);
  TestSums<__half, 8, 2>(1000, 24, 3);
  TestSums<__nv_bfloat16, 8, 2>(300, 1, 2);
  TestSums<__nv_bfloat16, 8, 2>(1, 6144, 7);
  TestSums<float, 4, 4>(5000, 8, 1);
  TestPointwise<double, double, 4, 2>(100, 132, 4, 5);
  TestPointwise<double, double, 4, 2>(65, 1027, 0, 7);
  TestPointwise<double, double, 4, 2>(33, 514, 1, 7);
  TestPointwise<float, double, 4, 2>(37, 512, 0, 3);
  TestPointwise<Bf16, double, 4, 2>(37, 515, 0, 3);
  TestPointwise<double, float, 4, 2>(70, 36, 0, 3);
  TestPointwise<double, F16, 4, 2>(70, 36, 0, 3);
  TestPointwise<double, Bf16, 4, 2>(70, 35, 0, 3);
  TestSums<double, 4, 2>(100, 132, 5);
  TestSums<double, 4, 2>(65, 1027, 7);
  TestSums<double, 4, 2>(700, 3, 4);
  TestSums<double, 4, 2>(9, 2048, 40);
  failures += TestDoubleOps();
}

}  // namespace
}  // namespace fxfuse

int main() {
  fxfuse::RunAll();
  if (fxfuse::failures > 0) printf("%d cases failed\n", fxfuse::failures);
  return fxfuse::failures > 0;
}
