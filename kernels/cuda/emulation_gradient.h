// Tests of emulation_test.cc of gradients of chains: what GradientOfChain makes of a program
// against what Interpreter makes of it.

#ifndef FXFUSE_CUDA_EMULATION_GRADIENT_H_
#define FXFUSE_CUDA_EMULATION_GRADIENT_H_

namespace fxfuse {
namespace {

using Code = GradientCode;
constexpr std::pair<int, int> kPrevious{FXFUSE_FROM_PREVIOUS, 0};
constexpr std::pair<int, int> Slot(int i) { return {FXFUSE_FROM_SLOT, i}; }
constexpr std::pair<int, int> Operand(int i) { return {FXFUSE_FROM_OPERAND, i}; }

fxfuse_instruction Bounded(fxfuse_instruction instruction, float p0, float p1) {
  instruction.immediate[0] = p0, instruction.immediate[1] = p1;
  return instruction;
}

// The operand `incoming` is a matrix, the others are rows. Outputs but the first are summed over
// rows.
struct GradientCase {
  const char* name;
  std::vector<fxfuse_instruction> instructions;
  int incoming, outputs;
  std::vector<Code> expected;  // empty: no gradient of a chain
};

std::vector<GradientCase> GradientCases() {
  const std::pair<int, int> half{FXFUSE_FROM_IMMEDIATE, 0};
  const auto copy = [](int store, int save) {
    return Instruction(Opcode::copy, {kPrevious}, store, save);
  };
  return {
      {"relu",
       {Instruction(Opcode::threshold_grad, {Operand(0), kPrevious}, 0), copy(1, -1)},
       0,
       2,
       {Code::operand, Code::relu, Code::store, Code::store}},
      {"add, silu, tanh, gelu, hardtanh",
       {Instruction(Opcode::add, {kPrevious, Operand(0)}, -1, 0),
        Instruction(Opcode::silu, {kPrevious}), Instruction(Opcode::tanh, {kPrevious}, -1, 1),
        Instruction(Opcode::gelu, {kPrevious}),
        Bounded(Instruction(Opcode::hardtanh_grad, {Operand(1), kPrevious}), -0.1f, 0.2f),
        Instruction(Opcode::gelu_grad, {kPrevious, Slot(1)}),
        Instruction(Opcode::tanh_grad, {kPrevious, Slot(1)}),
        Instruction(Opcode::silu_grad, {kPrevious, Slot(0)}, 0), copy(1, -1)},
       1,
       2,
       {Code::operand, Code::operand, Code::silu, Code::tanh, Code::gelu_unit, Code::hardtanh,
        Code::store, Code::store}},
      {"silu, mul, clamp, tanh",
       {copy(-1, 0), Instruction(Opcode::silu, {kPrevious}),
        Instruction(Opcode::mul, {kPrevious, half}, -1, 1, 0.5f),
        Bounded(Instruction(Opcode::clamp, {kPrevious}), -0.2f, 0.3f),
        Instruction(Opcode::tanh, {kPrevious}),
        Instruction(Opcode::tanh_grad, {Operand(0), kPrevious}),
        Bounded(Instruction(Opcode::clamp_grad, {kPrevious, Slot(1)}), -0.2f, 0.3f),
        Instruction(Opcode::mul, {kPrevious, half}, -1, -1, 0.5f),
        Instruction(Opcode::silu_grad, {kPrevious, Slot(0)}, 0)},
       0,
       1,
       {Code::operand, Code::scale, Code::silu, Code::scale, Code::clamp, Code::tanh, Code::store}},
      {"clamp, sigmoid",
       {Bounded(Instruction(Opcode::clamp, {kPrevious}), -0.5f, 0.5f),
        Instruction(Opcode::sigmoid, {kPrevious}),
        Instruction(Opcode::sigmoid_grad, {Operand(0), kPrevious}, -1, 0),
        Bounded(Instruction(Opcode::clamp_grad, {Slot(0), kPrevious}), -0.5f, 0.5f)},
       0,
       0,
       {}},
      {"tanh of its result",
       {Instruction(Opcode::tanh_grad, {Operand(0), kPrevious}, 0), copy(1, -1)},
       0,
       2,
       {Code::operand, Code::tanh_result, Code::store, Code::store}},
      {"gelu_tanh, sum on the way, mul, sigmoid",
       {copy(-1, 0), Instruction(Opcode::gelu_tanh, {kPrevious}, -1, 1),
        Instruction(Opcode::mul, {kPrevious, Operand(0)}),
        Instruction(Opcode::sigmoid, {kPrevious}),
        Instruction(Opcode::sigmoid_grad, {Operand(1), kPrevious}, -1, 2),
        Instruction(Opcode::mul, {kPrevious, Slot(1)}, 1),
        Instruction(Opcode::mul, {Operand(0), Slot(2)}),
        Instruction(Opcode::gelu_tanh_grad, {kPrevious, Slot(0)}, 0)},
       1,
       2,
       {Code::begin, Code::gelu_tanh, Code::keep_value, Code::operand, Code::keep_product,
        Code::operand, Code::sigmoid, Code::store_times, Code::operand, Code::times_slot,
        Code::store}},
      {"mul by a parameter alone",
       {Instruction(Opcode::mul, {kPrevious, Operand(1)}, 1),
        Instruction(Opcode::mul, {Operand(0), Operand(1)}, 0)},
       1,
       2,
       {Code::keep_value, Code::operand, Code::store_times, Code::operand, Code::store}},
      {"norm, mul, add, silu, mul, silu",
       {copy(-1, 0), Bounded(Instruction(Opcode::normalize, {kPrevious}, -1, 1), 16.0f, 1e-5f),
        Instruction(Opcode::mul, {kPrevious, Operand(0)}),
        Instruction(Opcode::add, {kPrevious, Operand(1)}, -1, 2),
        Instruction(Opcode::silu, {kPrevious}, -1, 3),
        Instruction(Opcode::mul, {kPrevious, Operand(2)}),
        Instruction(Opcode::silu_grad, {Operand(3), kPrevious}, -1, 4),
        Instruction(Opcode::mul, {kPrevious, Operand(2)}),
        Instruction(Opcode::silu_grad, {kPrevious, Slot(2)}, 3, 5),
        Instruction(Opcode::mul, {Slot(4), Slot(3)}, 4),
        Instruction(Opcode::mul, {Slot(5), Operand(0)}),
        Bounded(Instruction(Opcode::normalize_grad, {kPrevious, Slot(0)}, 0), 16.0f, 1e-5f),
        copy(1, -1), Instruction(Opcode::mul, {Slot(5), Slot(1)}, 2)},
       3,
       5,
       {Code::normalize,   Code::keep_product, Code::keep_value,     Code::operand,
        Code::operand,     Code::begin,        Code::silu,           Code::keep_value,
        Code::operand,     Code::keep_product, Code::operand,        Code::silu,
        Code::store_times, Code::operand,      Code::times_slot,     Code::store,
        Code::store_times, Code::operand,      Code::normalize_back, Code::store,
        Code::store}},
      {"relu before a parameter",  // infinite gradients would become NaN
       {Instruction(Opcode::relu, {kPrevious}, -1, 0),
        Instruction(Opcode::mul, {Slot(0), Operand(1)}, 1),
        Instruction(Opcode::threshold_grad, {Operand(1), Slot(0)}, 0)},
       1,
       2,
       {}},
      {"two incoming gradients",
       {Instruction(Opcode::silu_grad, {Operand(0), kPrevious}),
        Instruction(Opcode::add, {kPrevious, Operand(1)}, 0)},
       0,
       1,
       {}},
  };
}

bool Near(float a, float b) {
  return a == b || (a != a && b != b) || std::abs(a - b) <= 2e-5f * (1 + std::abs(b));
}

// odd_z: some of z is not finite, else some of what comes in. Where z is not, a masked gradient is
// 0, which Interpreter multiplies by the NaN that a slope before it is.
template <int kWidth, int kGroups>
void TestGradient(const GradientCase& test, int64_t m, int64_t n, int resident, bool odd_z) {
  using Config = PointwiseConfig<DeviceMath, kWidth, kGroups, kWidth == 8>;
  fxfuse_problem problem = {};
  problem.m = m, problem.n = problem.lda = n, problem.input_dtype = FXFUSE_F32;
  fxfuse_program& program = problem.program;
  program.instruction_count = static_cast<int32_t>(test.instructions.size());
  std::copy(test.instructions.begin(), test.instructions.end(), program.instruction);
  program.operand_count = 4, program.output_count = test.outputs;
  program.slot_count = FXFUSE_MAX_SLOTS;

  std::vector<float> acc = Random<float>(m * n), incoming = Random<float>(m * n);
  for (float& value : acc) value *= 2;
  constexpr float kOdd[] = {INFINITY, -INFINITY, NAN};
  for (size_t i = 0; i < acc.size(); i += 97) (odd_z ? acc : incoming)[i] = kOdd[i / 97 % 3];
  std::vector<std::vector<float>> rows;
  void* pointers[FXFUSE_PTR_COUNT] = {};
  pointers[FXFUSE_PTR_A] = acc.data();
  for (int i = 0; i < 4; ++i) {
    rows.push_back(Random<float>(n));
    const bool whole = i == test.incoming;
    program.operand[i] = {whole ? n : 0, 1, 1, m, FXFUSE_F32, 0};
    pointers[FXFUSE_PTR_OPERAND + i] = whole ? incoming.data() : rows[i].data();
  }
  for (int i = 0; i < test.outputs; ++i) {
    program.output[i] = {n, FXFUSE_F32, i == 0 ? FXFUSE_SUM_NONE : FXFUSE_SUM_ROWS};
  }

  DeviceProgram translated;
  TranslateProgram(problem, pointers, &translated);
  bool good = TranslateGradient(problem, &translated) == !test.expected.empty();
  std::vector<Code> codes;
  for (int i = 0; good && !test.expected.empty() && i < translated.step_count; ++i) {
    codes.push_back(static_cast<Code>(translated.step[i].code));
  }
  good = good && codes == test.expected;

  std::vector<float> output[2][FXFUSE_MAX_OUTPUTS];
  for (const bool gradient : {false, true}) {
    if (test.expected.empty()) break;
    const PointwiseKind kind = gradient ? PointwiseKind::kGradient : PointwiseKind::kSums;
    const PointwiseKernel kernel = {"", nullptr, MathLevel::kExact, kind, kWidth, kGroups};
    const PointwiseGrid grid = DividePointwise(kernel, kMostPointwiseThreads, m, n);
    const PointwiseStrips strips = DivideSums(grid, resident);
    for (int i = 0; i < test.outputs; ++i) {
      output[gradient][i].assign((i == 0 ? m : strips.p) * n, kUntouched);
      pointers[FXFUSE_PTR_OUTPUT + i] = output[gradient][i].data();
    }
    auto arguments = DescribePointwise<PointwiseArguments>(problem, pointers, kind, grid);
    arguments.strips = strips.p;
    emulation::Launch(static_cast<int>(grid.column_blocks * strips.p), grid.threads, [&] {
      gradient ? PointwiseSums<Config, true>(arguments) : PointwiseSums<Config, false>(arguments);
    });
  }
  size_t wrong = 0;
  for (int i = 0; i < (odd_z ? 1 : test.outputs); ++i) {
    for (size_t j = 0; j < output[0][i].size(); ++j) {
      const bool masked = odd_z && !std::isfinite(acc[j]) && output[1][i][j] == 0;
      wrong += !masked && !Near(output[1][i][j], output[0][i][j]);
    }
  }
  good = good && wrong == 0;
  failures += !good;
  printf("%-6s gradient of %-40s %4ld x %-5ld %zu wrong\n", good ? "ok" : "FAILED", test.name,
         static_cast<long>(m), static_cast<long>(n), wrong);
  if (!good) {
    for (const Code code : codes) printf(" %d", static_cast<int>(code));
    printf("\n");
  }
}

void TestGradients() {
  for (const GradientCase& test : GradientCases()) {
    TestGradient<4, 4>(test, 37, 528, 5, false);
    TestGradient<8, 2>(test, 130, 48, 3, true);
    TestGradient<8, 2>(test, 33, 144, 3, false);
  }
}

}  // namespace
}  // namespace fxfuse

#endif  // FXFUSE_CUDA_EMULATION_GRADIENT_H_
