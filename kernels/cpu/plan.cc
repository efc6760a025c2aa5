#include "plan.h"

#include <string.h>

#include <algorithm>
#include <numeric>

namespace fxfuse {
namespace {

// The cost of an element in units of an addition, roughly as measured with AVX-512.
int Cost(Opcode op) {
  switch (op) {
    case Opcode::copy:
    case Opcode::cast_f32:
    case Opcode::cast_bf16:
    case Opcode::relu:
    case Opcode::relu6:
    case Opcode::leaky_relu:
    case Opcode::prelu:
    case Opcode::clamp:
    case Opcode::hardshrink:
    case Opcode::softshrink:
    case Opcode::threshold:
    case Opcode::abs:
    case Opcode::neg:
    case Opcode::sign:
    case Opcode::square:
    case Opcode::add:
    case Opcode::sub:
    case Opcode::mul:
    case Opcode::minimum:
    case Opcode::maximum:
    case Opcode::eq:
    case Opcode::ne:
    case Opcode::lt:
    case Opcode::le:
    case Opcode::gt:
    case Opcode::ge:
    case Opcode::where:
    case Opcode::lerp:
    case Opcode::clamp_grad:
    case Opcode::hardtanh_grad:
    case Opcode::threshold_grad:
    case Opcode::tanh_grad:
    case Opcode::sigmoid_grad:
      return 1;
    case Opcode::log:
    case Opcode::log2:
    case Opcode::log10:
    case Opcode::sin:
    case Opcode::cos:
    case Opcode::softplus:
    case Opcode::logsigmoid:
    case Opcode::mish:
      return 20;
    case Opcode::pow:
      return 50;
    case Opcode::normalize:
    case Opcode::normalize_grad:
    case Opcode::group_mean:
      return 6;
    default:
      return 8;
  }
}

float ReadScalar(const IsaKernels& kernels, const char* data, int dtype) {
  float value;
  kernels.load[dtype](&value, data, 1);
  return value;
}

int64_t RoundUp(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Drops strides that no element can feel, and names what remains.
OperandPlan SimplifyOperand(const fxfuse_operand& o, const void* data, int64_t m, int64_t n) {
  OperandPlan plan = {};
  plan.dtype = o.dtype;
  plan.data = static_cast<const char*>(data);
  const bool one_row = o.row_stride == 0 || m == 1 || o.period == 1 || o.repeat >= m;
  plan.row_stride = one_row ? 0 : o.row_stride;
  plan.column_stride = n == 1 ? 0 : o.column_stride;
  plan.repeat = one_row ? 1 : o.repeat;
  plan.period = one_row ? m : std::min(o.period, m);
  if (plan.row_stride == 0) {
    plan.kind = plan.column_stride == 0 ? Broadcast::kScalar : Broadcast::kRow;
  } else {
    plan.kind = plan.column_stride == 0 ? Broadcast::kColumn : Broadcast::kMatrix;
  }
  return plan;
}

// Whether the operand is a plain matrix without gaps, element (m, n) at m * N + n.
bool IsDense(const OperandPlan& o, int64_t m, int64_t n) {
  if (o.kind == Broadcast::kColumn && n != 1) return false;
  if (o.kind == Broadcast::kMatrix && o.column_stride != 1) return false;
  return o.row_stride == n && o.repeat == 1 && o.period == m;
}

bool HasSums(const fxfuse_program& program) {
  for (int i = 0; i < program.output_count; ++i) {
    if (program.output[i].sum != FXFUSE_SUM_NONE) return true;
  }
  return false;
}

// The columns that a part of a row must be a multiple of: whole vectors, and whole groups of all
// ops over groups of columns.
int64_t WholeGroups(const fxfuse_program& program) {
  int64_t columns = kLane;
  for (int i = 0; i < program.instruction_count; ++i) {
    const fxfuse_instruction& op = program.instruction[i];
    if (!IsGroupOp(static_cast<Opcode>(op.opcode))) continue;
    columns = std::lcm(columns, static_cast<int64_t>(op.immediate[0]));
  }
  return columns;
}

// Turns a problem in which everything is dense into a single long row.
void Flatten(const fxfuse_program& program, Plan* plan) {
  const int64_t m = plan->rows;
  const int64_t n = plan->columns;
  if (m == 1 || HasSums(program)) return;
  if (plan->reads_accumulator && plan->accumulator.row_stride != n) return;
  for (int i = 0; i < program.output_count; ++i) {
    if (plan->output[i].row_stride != n) return;
  }
  for (const OperandPlan& o : plan->operand) {
    const bool ready = o.kind == Broadcast::kUnused || o.kind == Broadcast::kScalar;
    if (!ready && (o.kind == Broadcast::kRow || !IsDense(o, m, n))) return;
  }
  for (OperandPlan& o : plan->operand) {
    if (o.kind == Broadcast::kUnused || o.kind == Broadcast::kScalar) continue;
    o.kind = Broadcast::kRow;
    o.row_stride = 0;
    o.column_stride = 1;
  }
  plan->rows = 1;
  plan->columns = m * n;
}

// Tiles and strips follow from the shape alone: sums must not depend on threads or instruction
// sets. A strip is as many tiles as leave sixteen parts, up to 64: few partial sums for those who
// add them up, many for accuracy and for threads.
constexpr int64_t kStrips = 16;
constexpr int64_t kMaxStripTiles = 64;

void ChooseTiles(const fxfuse_program& program, Plan* plan) {
  const int64_t columns = plan->columns;
  if (columns > kFragment) {
    const int64_t pieces = (columns + kFragment - 1) / kFragment;
    plan->tile_columns = RoundUp((columns + pieces - 1) / pieces, WholeGroups(program));
    plan->tile_rows = 1;
  } else {
    plan->tile_columns = columns;
    plan->tile_rows = std::min(plan->rows, kFragment / columns);
  }
  plan->column_tiles = (columns + plan->tile_columns - 1) / plan->tile_columns;
  plan->row_tiles = (plan->rows + plan->tile_rows - 1) / plan->tile_rows;
  plan->strip_tiles = 1;
  if (HasSums(program)) {
    plan->strip_tiles = std::min((plan->row_tiles + kStrips - 1) / kStrips, kMaxStripTiles);
  }
  plan->strip_count =
      plan->column_tiles * ((plan->row_tiles + plan->strip_tiles - 1) / plan->strip_tiles);
  plan->fragment = static_cast<int>(RoundUp(plan->tile_rows * plan->tile_columns, kLane));
}

int AddConstant(float value, Plan* plan) {
  for (int i = 0; i < plan->constant_count; ++i) {
    if (memcmp(&plan->constant[i].value, &value, sizeof(value)) == 0) {
      return plan->constant[i].buffer;
    }
  }
  plan->constant[plan->constant_count++] = {value, plan->buffer_count};
  return plan->buffer_count++;
}

// Buffers: the running value, the slots, then operands and constants as they come up.
void PlanSteps(const fxfuse_program& program, Plan* plan) {
  plan->buffer_count = 1 + program.slot_count;
  for (int i = 0; i < FXFUSE_MAX_OPERANDS; ++i) {
    OperandPlan& o = plan->operand[i];
    if (o.kind == Broadcast::kUnused) continue;
    o.buffer = o.kind == Broadcast::kScalar
                   ? AddConstant(ReadScalar(*plan->kernels, o.data, o.dtype), plan)
                   : plan->buffer_count++;
  }
  for (int i = 0; i < program.output_count; ++i) {
    MatrixPlan& output = plan->output[i];
    const bool adds_rows = output.sum == FXFUSE_SUM_ROWS || output.sum == FXFUSE_SUM_ALL;
    if (!adds_rows) continue;
    output.buffer = plan->buffer_count;
    plan->buffer_count += 2;
  }
  plan->step_count = program.instruction_count;
  plan->element_cost = 2;  // loading and storing
  for (int i = 0; i < program.instruction_count; ++i) {
    const fxfuse_instruction& op = program.instruction[i];
    StepPlan& step = plan->step[i];
    step.run = plan->kernels->op[op.opcode];
    step.p0 = op.immediate[0];
    step.p1 = op.immediate[1];
    step.arity = op.arity;
    step.result = op.save >= 0 ? 1 + op.save : 0;
    step.output = op.store;
    step.is_copy = op.opcode == static_cast<int>(Opcode::copy) ||
                   op.opcode == static_cast<int>(Opcode::cast_f32);
    step.is_saved = op.save >= 0;
    plan->element_cost += Cost(static_cast<Opcode>(op.opcode)) + (op.store >= 0 ? 1 : 0);
    for (int j = 0; j < 3; ++j) {
      step.argument[j] = kPreviousValue;
      step.operand[j] = -1;
      if (j >= op.arity) continue;
      if (op.source[j] == FXFUSE_FROM_SLOT) step.argument[j] = 1 + op.index[j];
      if (op.source[j] == FXFUSE_FROM_IMMEDIATE) {
        step.argument[j] = AddConstant(op.immediate[op.index[j]], plan);
      }
      if (op.source[j] == FXFUSE_FROM_OPERAND) {
        const OperandPlan& o = plan->operand[op.index[j]];
        step.argument[j] = o.buffer;
        step.operand[j] = o.kind == Broadcast::kScalar ? -1 : op.index[j];
      }
    }
  }
}

}  // namespace

int64_t ElementSize(int dtype) { return dtype == FXFUSE_F32 ? 4 : (dtype == FXFUSE_BOOL ? 1 : 2); }

void PartialSums(const fxfuse_problem& problem, int64_t* p, int64_t* q) {
  Plan plan;
  plan.rows = problem.m;
  plan.columns = problem.n;
  ChooseTiles(problem.program, &plan);
  *p = plan.strip_count / plan.column_tiles;
  *q = plan.column_tiles;
}

void MakePlan(const fxfuse_problem& problem, void* const* pointers, const IsaKernels& kernels,
              Plan* plan) {
  const fxfuse_program& program = problem.program;
  plan->kernels = &kernels;
  plan->rows = problem.m;
  plan->columns = problem.n;
  plan->constant_count = 0;
  plan->accumulator = {static_cast<char*>(pointers[FXFUSE_PTR_A]), problem.input_dtype,
                       problem.m == 1 ? problem.n : problem.lda, FXFUSE_SUM_NONE, 0};
  plan->reads_accumulator = false;
  bool used[FXFUSE_MAX_OPERANDS] = {};
  for (int i = 0; i < program.instruction_count; ++i) {
    const fxfuse_instruction& op = program.instruction[i];
    for (int j = 0; j < op.arity; ++j) {
      if (op.source[j] == FXFUSE_FROM_OPERAND) used[op.index[j]] = true;
      if (op.source[j] == FXFUSE_FROM_PREVIOUS && i == 0) plan->reads_accumulator = true;
    }
  }
  for (int i = 0; i < FXFUSE_MAX_OPERANDS; ++i) {
    plan->operand[i].kind = Broadcast::kUnused;
    if (!used[i]) continue;
    plan->operand[i] =
        SimplifyOperand(program.operand[i], pointers[FXFUSE_PTR_OPERAND + i], problem.m, problem.n);
  }
  plan->output_count = program.output_count;
  for (int i = 0; i < program.output_count; ++i) {
    plan->output[i] = {static_cast<char*>(pointers[FXFUSE_PTR_OUTPUT + i]), program.output[i].dtype,
                       problem.m == 1 ? problem.n : program.output[i].row_stride,
                       program.output[i].sum, 0};
  }
  Flatten(program, plan);
  ChooseTiles(program, plan);
  PlanSteps(program, plan);
}

}  // namespace fxfuse
