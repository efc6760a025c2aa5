#include "device_program.h"

#include <string.h>

#include <algorithm>

#include "pointwise.h"

namespace fxfuse {
namespace {

constexpr int64_t kIndexLimit = INT32_MAX;

int DtypeBytes(int dtype) { return dtype == FXFUSE_F32 ? 4 : (dtype == FXFUSE_BOOL ? 1 : 2); }

DeviceOperand TranslateOperand(const fxfuse_operand& operand, const void* data, int64_t rows) {
  DeviceOperand device = {};
  device.data = data;
  device.row_stride = operand.row_stride;
  device.column_stride = operand.column_stride;
  device.repeat = static_cast<uint32_t>(std::min(operand.repeat, kIndexLimit));
  device.period = static_cast<uint32_t>(std::min(operand.period, kIndexLimit));
  device.dtype = static_cast<uint8_t>(operand.dtype);
  device.periodic = operand.row_stride != 0 && (operand.repeat > 1 || operand.period < rows);
  // Eight elements are one load of 8 bytes (bool), one of 16 or two of 16 (fp32).
  const int bytes = operand.dtype == FXFUSE_BOOL ? 8 : 16;
  if (operand.column_stride == 0) {
    device.access = Access::kBroadcast;
  } else if (operand.column_stride == 1 &&
             RowsAligned(data, operand.row_stride, rows, operand.dtype, bytes)) {
    device.access = Access::kVector;
  } else {
    device.access = Access::kElement;
  }
  return device;
}

// acc + bias, as the program's first instruction.
fxfuse_instruction AddBias() {
  fxfuse_instruction add = {};
  add.opcode = static_cast<uint16_t>(Opcode::add);
  add.save = -1;
  add.store = -1;
  add.arity = 2;
  add.source[0] = FXFUSE_FROM_PREVIOUS;
  add.source[1] = FXFUSE_FROM_OPERAND;
  add.index[1] = kBiasOperand;
  return add;
}

}  // namespace

bool RowsAligned(const void* data, int64_t row_stride, int64_t rows, int dtype, int bytes) {
  const int64_t stride_bytes = rows > 1 ? row_stride * DtypeBytes(dtype) : 0;
  return reinterpret_cast<uintptr_t>(data) % bytes == 0 && stride_bytes % bytes == 0;
}

bool VectorAligned(const void* data, int64_t row_stride, int64_t rows, int dtype) {
  return RowsAligned(data, row_stride, rows, dtype, 16);
}

void TranslateProgram(const fxfuse_problem& problem, void* const* pointers, DeviceProgram* device) {
  const fxfuse_program& program = problem.program;
  device->rows = static_cast<uint32_t>(problem.m);
  device->columns = static_cast<uint32_t>(problem.n);
  fxfuse_instruction* next = device->instruction;
  if (problem.has_bias) {
    const fxfuse_operand row = {0, 1, 1, kIndexLimit, problem.input_dtype, 0};
    device->operand[kBiasOperand] = TranslateOperand(row, pointers[FXFUSE_PTR_BIAS], problem.m);
    *next++ = AddBias();
  }
  memcpy(next, program.instruction, program.instruction_count * sizeof(fxfuse_instruction));
  next += program.instruction_count;
  device->instruction_count = static_cast<int32_t>(next - device->instruction);
  for (int i = 0; i < program.operand_count; ++i) {
    device->operand[i] =
        TranslateOperand(program.operand[i], pointers[FXFUSE_PTR_OPERAND + i], problem.m);
  }
  for (int i = 0; i < program.output_count; ++i) {
    const fxfuse_output& output = program.output[i];
    DeviceOutput& to = device->output[i];
    to.data = pointers[FXFUSE_PTR_OUTPUT + i];
    to.row_stride = output.row_stride;
    to.dtype = static_cast<uint8_t>(output.dtype);
    to.vector = VectorAligned(to.data, output.row_stride, problem.m, output.dtype);
  }
}

MathLevel RequiredMath(const fxfuse_program& program) {
  MathLevel level = MathLevel::kFast;
  for (int i = 0; i < program.output_count; ++i) {
    if (program.output[i].dtype == FXFUSE_F32) return MathLevel::kExact;
    if (program.output[i].dtype == FXFUSE_F16) level = MathLevel::kHalf;
  }
  return level;
}

}  // namespace fxfuse
