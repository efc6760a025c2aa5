#include "common.h"

#include <stdarg.h>
#include <stdio.h>

#include "pointwise.h"

namespace fxfuse {
namespace {

constexpr int kMessageSize = 512;
thread_local char last_error[kMessageSize] = "";

const char* const kOpcodeNames[] = {
#define FXFUSE_OP(name, arity, params) #name,
#define FXFUSE_GROUP_OP FXFUSE_OP
#include "opcodes.def"
#undef FXFUSE_GROUP_OP
#undef FXFUSE_OP
};

const char* const kSourceNames[] = {"previous", "slot", "operand", "immediate"};

// What an accumulator or an output may be.
constexpr const char* kMatrixDtypes = "f32 (0), f16 (1), bf16 (2) or f64 (4)";
bool IsMatrixDtype(int dtype) {
  return (dtype >= FXFUSE_F32 && dtype <= FXFUSE_BF16) || dtype == FXFUSE_F64;
}

// Checks one problem; `call` names the entry point in messages.
class Checker {
 public:
  Checker(const char* call, const fxfuse_problem& problem, void* const* pointers)
      : call_(call), problem_(problem), program_(problem.program), pointers_(pointers) {}

  fxfuse_status Run() {
    fxfuse_status status = CheckShape();
    if (status == FXFUSE_OK) status = CheckCounts();
    for (int i = 0; status == FXFUSE_OK && i < program_.operand_count; ++i) {
      status = CheckOperand(i);
    }
    for (int i = 0; status == FXFUSE_OK && i < program_.output_count; ++i) {
      status = CheckOutput(i);
    }
    for (int i = 0; status == FXFUSE_OK && i < program_.instruction_count; ++i) {
      status = CheckInstruction(i);
    }
    if (status == FXFUSE_OK && pointers_ != nullptr) status = CheckPointers();
    return status;
  }

 private:
  // "call: field=value, expected limit"
  fxfuse_status Bad(const char* field, int64_t value, const char* limit) {
    return Fail(FXFUSE_BAD_ARGUMENT, "%s: %s=%lld, expected %s", call_, field,
                static_cast<long long>(value), limit);
  }

  fxfuse_status BadItem(const char* array, int i, const char* field, int64_t value,
                        const char* limit) {
    char name[64];
    snprintf(name, sizeof(name), "%s[%d].%s", array, i, field);
    return Bad(name, value, limit);
  }

  fxfuse_status BadRange(const char* field, int64_t value, int64_t low, int64_t high) {
    char limit[64];
    snprintf(limit, sizeof(limit), "%lld to %lld", static_cast<long long>(low),
             static_cast<long long>(high));
    return Bad(field, value, limit);
  }

  fxfuse_status BadItemRange(const char* array, int i, const char* field, int64_t value,
                             int64_t high) {
    char name[64];
    snprintf(name, sizeof(name), "%s[%d].%s", array, i, field);
    return BadRange(name, value, 0, high);
  }

  fxfuse_status NoDouble(const char* array, int i) {
    return Fail(FXFUSE_UNSUPPORTED, "%s: %s[%d].dtype=%d (f64), a problem with a GEMM takes none",
                call_, array, i, FXFUSE_F64);
  }

  // Rows of a stored matrix must not run into each other.
  bool RowsOverlap(int64_t row_stride, int64_t width) const {
    return problem_.m > 1 && row_stride < width;
  }

  fxfuse_status CheckShape() {
    const fxfuse_problem& p = problem_;
    if (p.m < 0) return Bad("m", p.m, "0 or more");
    if (p.n < 0) return Bad("n", p.n, "0 or more");
    if (p.n > 0 && p.m > INT64_MAX / 8 / p.n) return Bad("m", p.m, "m * n below 2^60");
    if (!IsMatrixDtype(p.input_dtype)) return Bad("input_dtype", p.input_dtype, kMatrixDtypes);
    if (p.has_gemm != 0 && p.has_gemm != 1) return Bad("has_gemm", p.has_gemm, "0 or 1");
    if (p.has_bias != 0 && p.has_bias != 1) return Bad("has_bias", p.has_bias, "0 or 1");
    if (p.route < FXFUSE_ROUTE_AUTO || p.route > FXFUSE_ROUTE_SKINNY) {
      return BadRange("route", p.route, FXFUSE_ROUTE_AUTO, FXFUSE_ROUTE_SKINNY);
    }
    if (p.tile < 0) return Bad("tile", p.tile, "0 or more");
    if (!p.has_gemm) {
      if (p.has_bias) return Bad("has_bias", p.has_bias, "0 in a problem without GEMM");
      if (RowsOverlap(p.lda, p.n)) return Bad("lda", p.lda, "n or more");
      return FXFUSE_OK;
    }
    if (p.k < 0) return Bad("k", p.k, "0 or more");
    if (RowsOverlap(p.lda, p.k)) return Bad("lda", p.lda, "k or more");
    if (p.input_dtype == FXFUSE_F64) {
      return Fail(FXFUSE_UNSUPPORTED, "%s: input_dtype=%d (f64), a problem with a GEMM takes none",
                  call_, p.input_dtype);
    }
    if (p.bias_dtype < FXFUSE_F32 || p.bias_dtype > FXFUSE_BF16) {
      return Bad("bias_dtype", p.bias_dtype, "f32 (0), f16 (1) or bf16 (2)");
    }
    if (p.planes < 0 || p.planes > 2) return BadRange("planes", p.planes, 0, 2);
    if (p.planes > 0 && p.input_dtype != FXFUSE_F16) {
      return Bad("input_dtype", p.input_dtype, "f16 (1) of planes");
    }
    if (p.b_transposed != 0 && p.b_transposed != 1) {
      return Bad("b_transposed", p.b_transposed, "0 or 1");
    }
    if (p.b_transposed && p.k > 1 && p.ldb < p.n) return Bad("ldb", p.ldb, "n or more");
    if (!p.b_transposed && p.n > 1 && p.ldb < p.k) return Bad("ldb", p.ldb, "k or more");
    return FXFUSE_OK;
  }

  fxfuse_status CheckCounts() {
    const fxfuse_program& p = program_;
    if (p.instruction_count < 1 || p.instruction_count > FXFUSE_MAX_INSTRUCTIONS) {
      return BadRange("instruction_count", p.instruction_count, 1, FXFUSE_MAX_INSTRUCTIONS);
    }
    if (p.operand_count < 0 || p.operand_count > FXFUSE_MAX_OPERANDS) {
      return BadRange("operand_count", p.operand_count, 0, FXFUSE_MAX_OPERANDS);
    }
    if (p.output_count < 1 || p.output_count > FXFUSE_MAX_OUTPUTS) {
      return BadRange("output_count", p.output_count, 1, FXFUSE_MAX_OUTPUTS);
    }
    if (p.slot_count < 0 || p.slot_count > FXFUSE_MAX_SLOTS) {
      return BadRange("slot_count", p.slot_count, 0, FXFUSE_MAX_SLOTS);
    }
    return FXFUSE_OK;
  }

  fxfuse_status CheckOperand(int i) {
    const fxfuse_operand& o = program_.operand[i];
    if (!IsMatrixDtype(o.dtype) && o.dtype != FXFUSE_BOOL) {
      return BadItem("operand", i, "dtype", o.dtype,
                     "f32 (0), f16 (1), bf16 (2), bool (3) or f64 (4)");
    }
    if (problem_.has_gemm && o.dtype == FXFUSE_F64) return NoDouble("operand", i);
    if (o.row_stride < 0) return BadItem("operand", i, "row_stride", o.row_stride, "0 or more");
    if (o.column_stride < 0) {
      return BadItem("operand", i, "column_stride", o.column_stride, "0 or more");
    }
    if (o.repeat < 1) return BadItem("operand", i, "repeat", o.repeat, "1 or more");
    if (o.period < 1) return BadItem("operand", i, "period", o.period, "1 or more");
    return FXFUSE_OK;
  }

  fxfuse_status CheckOutput(int i) {
    const fxfuse_output& o = program_.output[i];
    if (!IsMatrixDtype(o.dtype)) return BadItem("output", i, "dtype", o.dtype, kMatrixDtypes);
    if (problem_.has_gemm && o.dtype == FXFUSE_F64) return NoDouble("output", i);
    if (o.sum < FXFUSE_SUM_NONE || o.sum > FXFUSE_SUM_ALL) {
      return BadItemRange("output", i, "sum", o.sum, FXFUSE_SUM_ALL);
    }
    if (o.sum != FXFUSE_SUM_NONE) {
      if (!problem_.has_gemm) return FXFUSE_OK;
      return Fail(FXFUSE_UNSUPPORTED, "%s: output[%d].sum=%d, a problem with a GEMM takes none",
                  call_, i, o.sum);
    }
    if (RowsOverlap(o.row_stride, problem_.n)) {
      return BadItem("output", i, "row_stride", o.row_stride, "n or more");
    }
    return FXFUSE_OK;
  }

  fxfuse_status CheckInstruction(int i) {
    const fxfuse_instruction& op = program_.instruction[i];
    if (op.opcode >= kOpcodeCount) {
      return BadItemRange("instruction", i, "opcode", op.opcode, kOpcodeCount - 1);
    }
    if (op.arity != kArity[op.opcode]) {
      char limit[64];
      snprintf(limit, sizeof(limit), "%d for %s", kArity[op.opcode], kOpcodeNames[op.opcode]);
      return BadItem("instruction", i, "arity", op.arity, limit);
    }
    if (IsGroupOp(static_cast<Opcode>(op.opcode))) {
      const fxfuse_status status = CheckWidth(i);
      if (status != FXFUSE_OK) return status;
    }
    if (op.save < -1 || op.save >= program_.slot_count) {
      return BadItem("instruction", i, "save", op.save, "-1 or a slot below slot_count");
    }
    if (op.store < -1 || op.store >= program_.output_count) {
      return BadItem("instruction", i, "store", op.store, "-1 or an output below output_count");
    }
    for (int j = 0; j < op.arity; ++j) {
      const fxfuse_status status = CheckArgument(i, j);
      if (status != FXFUSE_OK) return status;
    }
    if (op.save >= 0) written_slots_ |= 1u << op.save;
    if (op.store >= 0) stored_outputs_ |= 1u << op.store;
    return FXFUSE_OK;
  }

  // The columns of a group op's groups.
  fxfuse_status CheckWidth(int i) {
    const float width = program_.instruction[i].immediate[0];
    const bool whole = width >= 1.0f && width <= FXFUSE_MAX_GROUP_WIDTH;
    const int64_t columns = whole ? static_cast<int64_t>(width) : 0;
    if (whole && static_cast<float>(columns) == width && problem_.n % columns == 0) {
      return FXFUSE_OK;
    }
    return Fail(FXFUSE_BAD_ARGUMENT,
                "%s: instruction[%d].immediate[0]=%g, expected a divisor of n=%lld, up to %d",
                call_, i, static_cast<double>(width), static_cast<long long>(problem_.n),
                FXFUSE_MAX_GROUP_WIDTH);
  }

  fxfuse_status CheckArgument(int i, int j) {
    const fxfuse_instruction& op = program_.instruction[i];
    const int index = op.index[j];
    static const char* const kSourceField[] = {"source[0]", "source[1]", "source[2]"};
    static const char* const kIndexField[] = {"index[0]", "index[1]", "index[2]"};
    if (op.source[j] > FXFUSE_FROM_IMMEDIATE) {
      return BadItemRange("instruction", i, kSourceField[j], op.source[j], FXFUSE_FROM_IMMEDIATE);
    }
    int count = 1;
    if (op.source[j] == FXFUSE_FROM_SLOT) count = program_.slot_count;
    if (op.source[j] == FXFUSE_FROM_OPERAND) count = program_.operand_count;
    if (op.source[j] == FXFUSE_FROM_IMMEDIATE) {
      if (kParameterCount[op.opcode] > 0) {
        return BadItem("instruction", i, kSourceField[j], op.source[j],
                       "no immediate argument: the op's parameters take their place");
      }
      count = 2;
    }
    if (op.source[j] != FXFUSE_FROM_PREVIOUS && index >= count) {
      char limit[64];
      snprintf(limit, sizeof(limit), "below %d (%s)", count, kSourceNames[op.source[j]]);
      return BadItem("instruction", i, kIndexField[j], index, limit);
    }
    if (op.source[j] == FXFUSE_FROM_SLOT && (written_slots_ >> index & 1u) == 0) {
      return BadItem("instruction", i, kIndexField[j], index,
                     "a slot an earlier instruction saved to");
    }
    if (op.source[j] == FXFUSE_FROM_OPERAND) used_operands_ |= 1u << index;
    return FXFUSE_OK;
  }

  fxfuse_status CheckPointers() {
    if (problem_.m == 0 || problem_.n == 0) return FXFUSE_OK;  // nothing is read or written
    const bool reads_a = !problem_.has_gemm || problem_.k > 0;
    if (reads_a && pointers_[FXFUSE_PTR_A] == nullptr) return Null("A");
    if (problem_.has_gemm && problem_.k > 0 && pointers_[FXFUSE_PTR_B] == nullptr) {
      return Null("B");
    }
    if (problem_.has_bias && pointers_[FXFUSE_PTR_BIAS] == nullptr) return Null("bias");
    if (problem_.planes > 0 && pointers_[FXFUSE_PTR_ROOT_A] == nullptr) return Null("root_a");
    if (problem_.planes > 1 && pointers_[FXFUSE_PTR_SPECIAL_A] == nullptr) return Null("special_a");
    if (!problem_.b_transposed) {
      if (problem_.planes > 0 && pointers_[FXFUSE_PTR_ROOT_B] == nullptr) return Null("root_b");
      if (problem_.planes > 1 && pointers_[FXFUSE_PTR_SPECIAL_B] == nullptr) {
        return Null("special_b");
      }
    }
    for (int i = 0; i < program_.operand_count; ++i) {
      if ((used_operands_ >> i & 1u) != 0 && pointers_[FXFUSE_PTR_OPERAND + i] == nullptr) {
        return Null("operand", i);
      }
    }
    for (int i = 0; i < program_.output_count; ++i) {
      if ((stored_outputs_ >> i & 1u) != 0 && pointers_[FXFUSE_PTR_OUTPUT + i] == nullptr) {
        return Null("output", i);
      }
    }
    return FXFUSE_OK;
  }

  fxfuse_status Null(const char* name, int i = 0) {
    return Fail(FXFUSE_BAD_ARGUMENT, "%s: pointer of %s[%d] is null, expected an address", call_,
                name, i);
  }

  const char* const call_;
  const fxfuse_problem& problem_;
  const fxfuse_program& program_;
  void* const* const pointers_;
  unsigned written_slots_ = 0;
  unsigned used_operands_ = 0;
  unsigned stored_outputs_ = 0;
};

}  // namespace

fxfuse_status Fail(fxfuse_status status, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(last_error, sizeof(last_error), format, arguments);
  va_end(arguments);
  return status;
}

fxfuse_status CheckProblem(const char* function, const fxfuse_problem* problem,
                           void* const* pointers, bool need_pointers) {
  if (problem == nullptr) {
    return Fail(FXFUSE_BAD_ARGUMENT, "%s: problem=null, expected an address", function);
  }
  if (need_pointers && pointers == nullptr) {
    return Fail(FXFUSE_BAD_ARGUMENT, "%s: pointers=null, expected an address", function);
  }
  return Checker(function, *problem, need_pointers ? pointers : nullptr).Run();
}

}  // namespace fxfuse

extern "C" {

int fxfuse_abi_version(void) { return FXFUSE_ABI_VERSION; }

int64_t fxfuse_problem_size(void) { return static_cast<int64_t>(sizeof(fxfuse_problem)); }

int fxfuse_opcode_count(void) { return fxfuse::kOpcodeCount; }

const char* fxfuse_opcode_name(int opcode) {
  return opcode >= 0 && opcode < fxfuse::kOpcodeCount ? fxfuse::kOpcodeNames[opcode] : nullptr;
}

const char* fxfuse_last_error(void) { return fxfuse::last_error; }

}  // extern "C"
