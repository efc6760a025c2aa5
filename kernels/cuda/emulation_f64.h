// Every opcode of the kernel in double precision, run on the host, against long double.

#ifndef FXFUSE_CUDA_EMULATION_F64_H_
#define FXFUSE_CUDA_EMULATION_F64_H_

#include <math.h>

#include <vector>

namespace fxfuse {
namespace {

// `x` rounded to `bits` significant bits and multiples of 2^(lowest - bits + 1), ties to even;
// infinite from 2^(highest + 1) on.
inline long double Rounded(long double x, int bits, int lowest, int highest) {
  if (x == 0 || !std::isfinite(x)) return x;
  const int exponent = std::max(std::ilogb(x), lowest) - bits + 1;
  const long double rounded = std::ldexp(std::rint(std::ldexp(x, -exponent)), exponent);
  return std::ilogb(rounded) > highest ? std::copysign(INFINITY, x) : rounded;
}

inline long double Phi(long double x) { return std::erfc(-x * std::sqrt(0.5L)) / 2; }

inline long double Sigmoid(long double x) { return 1 / (1 + std::exp(-x)); }

inline long double Tanhshrink(long double x) {
  if (std::abs(x) > 0.05L) return x - std::tanh(x);
  const long double u = x * x;  // the series of tanh
  return x * u *
         (1 / 3.0L + u * (-2 / 15.0L + u * (17 / 315.0L +
                                            u * (-62 / 2835.0L + u * (1382 / 155925.0L -
                                                                      u * (21844 / 6081075.0L))))));
}

inline long double Clamp(long double x, long double low, long double high) {
  return std::isnan(x) ? x : std::min(high, std::max(low, x));
}

inline long double Either(long double a, long double b, long double chosen) {
  return std::isnan(a) ? a : (std::isnan(b) ? b : chosen);
}

// What torch says the op is.
inline long double Expected(Opcode op, long double a, long double b, long double c, long double p0,
                            long double p1) {
  constexpr long double kSeluScale = 1.0507009873554804934193349852946L;
  constexpr long double kSeluAlpha = 1.6732632423543772848170429916717L;
  const long double two_beta = 2 * std::sqrt(2 / std::acos(-1.0L)), cubic = 0.044715L;
  const long double gate = two_beta * (a + cubic * a * a * a);
  const long double slope = two_beta * (1 + 3 * cubic * b * b);
  const long double gate_b = two_beta * (b + cubic * b * b * b);
  switch (op) {
    case Opcode::copy:
      return a;
    case Opcode::cast_f32:
      return Rounded(a, 24, -126, 127);
    case Opcode::cast_f16:
      return Rounded(a, 11, -14, 15);
    case Opcode::cast_bf16:
      return Rounded(a, 8, -126, 127);
    case Opcode::relu:
      return a < 0 ? 0 : a;
    case Opcode::relu6:
      return Clamp(a, 0, 6);
    case Opcode::leaky_relu:
      return a > 0 ? a : a * p0;
    case Opcode::prelu:
      return a > 0 ? a : a * b;
    case Opcode::elu:
      return a > 0 ? a : p0 * std::expm1(a);
    case Opcode::selu:
      return kSeluScale * (a > 0 ? a : kSeluAlpha * std::expm1(a));
    case Opcode::celu:
      return a > 0 ? a : p0 * std::expm1(a / p0);
    case Opcode::gelu:
      return a * Phi(a);
    case Opcode::gelu_tanh:
      return a * Sigmoid(gate);
    case Opcode::silu:
      return a * Sigmoid(a);
    case Opcode::mish:
      return a * std::tanh(std::log1p(std::exp(a)));
    case Opcode::softplus:
      return a * p0 > p1 ? a : std::log1p(std::exp(a * p0)) / p0;
    case Opcode::softsign:
      return a / (1 + std::abs(a));
    case Opcode::sigmoid:
      return Sigmoid(a);
    case Opcode::logsigmoid:
      return a < 0 ? a - std::log1p(std::exp(a)) : -std::log1p(std::exp(-a));
    case Opcode::hardsigmoid:
      return Clamp(a + 3, 0, 6) / 6;
    case Opcode::hardswish:
      return a * Clamp(a + 3, 0, 6) / 6;
    case Opcode::clamp:
      return Clamp(a, p0, p1);
    case Opcode::hardshrink:
      return std::abs(a) <= p0 ? 0 : a;
    case Opcode::softshrink:
      return a > p0 ? a - p0 : (a < -p0 ? a + p0 : 0 * a);
    case Opcode::tanhshrink:
      return Tanhshrink(a);
    case Opcode::threshold:
      return a <= p0 ? p1 : a;
    case Opcode::tanh:
      return std::tanh(a);
    case Opcode::abs:
      return std::abs(a);
    case Opcode::neg:
      return -a;
    case Opcode::sign:
      return (a > 0) - (a < 0);
    case Opcode::exp:
      return std::exp(a);
    case Opcode::exp2:
      return std::exp2(a);
    case Opcode::expm1:
      return std::expm1(a);
    case Opcode::log:
      return std::log(a);
    case Opcode::log2:
      return std::log2(a);
    case Opcode::log10:
      return std::log10(a);
    case Opcode::log1p:
      return std::log1p(a);
    case Opcode::sqrt:
      return std::sqrt(a);
    case Opcode::rsqrt:
      return 1 / std::sqrt(a);
    case Opcode::reciprocal:
      return 1 / a;
    case Opcode::square:
      return a * a;
    case Opcode::sin:
      return std::sin(a);
    case Opcode::cos:
      return std::cos(a);
    case Opcode::erf:
      return std::erf(a);
    case Opcode::floor:
      return std::floor(a);
    case Opcode::ceil:
      return std::ceil(a);
    case Opcode::round:
      return std::rint(a);
    case Opcode::trunc:
      return std::trunc(a);
    case Opcode::add:
      return a + b;
    case Opcode::sub:
      return a - b;
    case Opcode::mul:
      return a * b;
    case Opcode::div:
      return a / b;
    case Opcode::minimum:
      return Either(a, b, std::min(a, b));
    case Opcode::maximum:
      return Either(a, b, std::max(a, b));
    case Opcode::pow:
      return std::pow(a, b);
    case Opcode::eq:
      return a == b;
    case Opcode::ne:
      return a != b;
    case Opcode::lt:
      return a < b;
    case Opcode::le:
      return a <= b;
    case Opcode::gt:
      return a > b;
    case Opcode::ge:
      return a >= b;
    case Opcode::where:
      return a != 0 ? b : c;
    case Opcode::lerp:
      return std::abs(c) < 0.5L ? a + c * (b - a) : b - (b - a) * (1 - c);
    case Opcode::gelu_grad:
      return a * (Phi(b) + b * std::exp(-b * b / 2) / std::sqrt(2 * std::acos(-1.0L)));
    case Opcode::gelu_tanh_grad:
      return a * (Sigmoid(gate_b) + b * Sigmoid(gate_b) * Sigmoid(-gate_b) * slope);
    case Opcode::silu_grad:
      return a * (Sigmoid(b) + b * Sigmoid(b) * Sigmoid(-b));
    case Opcode::clamp_grad:
      return b >= p0 && b <= p1 ? a : 0;
    case Opcode::hardtanh_grad:
      return b <= p0 || b >= p1 ? 0 : a;
    case Opcode::threshold_grad:
      return b <= p0 ? 0 : a;
    case Opcode::tanh_grad:
      return a * (1 - b * b);
    case Opcode::sigmoid_grad:
      return a * (1 - b) * b;
  }
  return NAN;
}

// Relative error that rounding to double leaves to a result whose terms are as large as itself.
inline double Tolerance(Opcode op, double expected) {
  switch (op) {
    case Opcode::softplus:
    case Opcode::logsigmoid:
    case Opcode::gelu_tanh:
    case Opcode::gelu_tanh_grad:  // `expected` of a gradient of one
      // Of an exponential with a rounded argument, as large as the result's logarithm.
      return 2e-15 + 5e-16 * std::abs(std::log(std::abs(expected) + 1e-300));
    default:
      return 2e-15;
  }
}

// What cancels, and so is added to the result when its error is judged.
inline double Terms(Opcode op, double a, double b, double c) {
  switch (op) {
    case Opcode::lerp:
      return (std::abs(a) + std::abs(b)) * (1 + std::abs(c));
    case Opcode::tanh_grad:
    case Opcode::sigmoid_grad:
      return std::abs(a) * (1 + b * b);
    case Opcode::gelu_grad:
    case Opcode::gelu_tanh_grad:
    case Opcode::silu_grad:
      return b < -3 ? 0 : std::abs(a);
    default:
      return 0;
  }
}

// Runs one opcode over a[i], b[i], c[i], [rows, columns], by the kernel.
inline std::vector<double> RunDouble(Opcode op, int64_t rows, int64_t columns,
                                     const std::vector<double>& a, const std::vector<double>& b,
                                     const std::vector<double>& c, double p0, double p1) {
  using Config = PointwiseConfig<DeviceDoubleMath, 4, 2, false>;
  fxfuse_problem problem = {};
  problem.m = rows, problem.n = problem.lda = columns, problem.input_dtype = FXFUSE_F64;
  fxfuse_program& program = problem.program;
  program.instruction_count = program.output_count = 1;
  program.operand_count = 2;
  program.operand[0] = program.operand[1] = {columns, 1, 1, rows, FXFUSE_F64, 0};
  program.output[0] = {columns, FXFUSE_F64, 0};
  fxfuse_instruction& instruction = program.instruction[0];
  instruction.opcode = static_cast<uint16_t>(op);
  instruction.arity = kArity[instruction.opcode];
  instruction.save = -1;
  instruction.source[1] = instruction.source[2] = FXFUSE_FROM_OPERAND;
  instruction.index[2] = 1;
  instruction.immediate[0] = instruction.immediate[1] = NAN;  // not what a double program reads
  program.immediate_f64[0][0] = p0, program.immediate_f64[0][1] = p1;
  std::vector<double> out(a.size());
  void* pointers[FXFUSE_PTR_COUNT] = {};
  pointers[FXFUSE_PTR_A] = const_cast<double*>(a.data());
  pointers[FXFUSE_PTR_OPERAND] = const_cast<double*>(b.data());
  pointers[FXFUSE_PTR_OPERAND + 1] = const_cast<double*>(c.data());
  pointers[FXFUSE_PTR_OUTPUT] = out.data();

  const PointwiseGrid grid =
      DividePointwise(PointwiseF64()[0], kFewestPointwiseThreads, rows, columns);
  const DoubleArguments arguments =
      DescribePointwise<DoubleArguments>(problem, pointers, PointwiseKind::kPlain, grid);
  emulation::Launch(static_cast<int>(grid.column_blocks * grid.row_blocks), grid.threads,
                    [&] { PointwiseProgram<Config>(arguments); });
  return out;
}

// Returns how many ops are not what they should be.
inline int TestDoubleOps() {
  const std::vector<double> some = {
      0.0, 5e-324, 1e-310, 1e-300, 1e-20, 1e-8, 1e-3, 0.1, 0.3, 0.5, 0.7518, 1.0 - 1e-9, 1.0, 1.5,
      2.5, 3.0, 3.7, 6.0, 8.3, 19.9, 20.1, 26.5, 37.4, 41.0, 300.1, 708.1, 745.2, 1e5, 65504, 65520,
      1e10, 1e38, 3.5e38,
      // Just above what lies between two of bf16, fp16 and fp32.
      1 + 0x1p-8 + 0x1p-40, 1 + 0x1p-11 + 0x1p-40, 1 + 0x1p-24 + 0x1p-50, 0x1p-25 + 0x1p-70,
      0x1p-134 + 0x1p-170, 1e100, 1e300, INFINITY, NAN};
  std::vector<double> values = some;
  for (const double value : some) values.push_back(-value);
  for (double x = -40; x < 40; x += 0.37) values.push_back(x);
  const int64_t n = static_cast<int64_t>(values.size());
  std::vector<double> a(n * n), b(n * n), c(n * n);
  for (int64_t i = 0; i < n * n; ++i) {
    a[i] = values[i / n], b[i] = values[i % n], c[i] = values[i * 31 % n] / 7;
  }
  int failures = 0;
  for (int opcode = 0; opcode < kPointwiseOpcodeCount; ++opcode) {
    const Opcode op = static_cast<Opcode>(opcode);
    const double p0 = op == Opcode::clamp || op == Opcode::clamp_grad ? -1.1 : 0.7, p1 = 20.1;
    // Steps that overflow, or underflow, where the result does not are no error of these.
    const bool steps = Terms(op, 1, 1, 1) > 0;
    const std::vector<double> found = RunDouble(op, n, n, a, b, c, p0, p1);
    double worst = 0;
    for (int64_t i = 0; i < n * n; ++i) {
      const double most = std::max({std::abs(a[i]), std::abs(b[i]), std::abs(c[i])});
      if (steps && !(most < 1e60)) continue;
      const double expected = static_cast<double>(Expected(op, a[i], b[i], c[i], p0, p1));
      if (found[i] == expected || (std::isnan(found[i]) && std::isnan(expected))) continue;
      const double size = std::abs(expected) + Terms(op, a[i], b[i], c[i]);
      // Subnormal numbers, of which a factor may be one, have fewer digits.
      const double least = 1e-290 * (steps ? std::max(1.0, most) : 1.0);
      const double error = std::abs(found[i] - expected) / (size + least);
      const double of_one = op == Opcode::gelu_tanh_grad ? expected / a[i] : expected;
      const double of_tolerance = error / Tolerance(op, of_one);
      if (!(of_tolerance <= 1) && worst <= 1) {
        printf("       a %.17g, b %.17g, c %.17g: %.17g, expected %.17g\n", a[i], b[i], c[i],
               found[i], expected);
      }
      worst = of_tolerance <= worst ? worst : of_tolerance;
    }
    failures += !(worst <= 1);
    printf("%-6s f64 opcode %-2d error %.2f of its tolerance\n", worst <= 1 ? "ok" : "FAILED",
           opcode, worst);
  }
  return failures;
}

}  // namespace
}  // namespace fxfuse

#endif  // FXFUSE_CUDA_EMULATION_F64_H_
