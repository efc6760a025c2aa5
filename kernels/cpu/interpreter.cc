#include "interpreter.h"

#include <stdlib.h>
#include <string.h>

#include <algorithm>

namespace fxfuse {
namespace {

constexpr int kAlignment = 64;

// Whether the tile's elements are adjacent in a matrix of this row stride.
template <class Tile>
bool IsContiguous(const Tile& tile, int64_t row_stride) {
  return tile.rows == 1 || row_stride == tile.columns;
}

// The row of memory that serves row m, stepped along without a division per row.
class RowCursor {
 public:
  RowCursor(const OperandPlan& operand, int64_t m)
      : repeat_(operand.repeat),
        period_(operand.period),
        within_(m % operand.repeat),
        row_(m / operand.repeat % operand.period) {}

  int64_t row() const { return row_; }
  void Next() {
    if (++within_ < repeat_) return;
    within_ = 0;
    if (++row_ == period_) row_ = 0;
  }

 private:
  const int64_t repeat_, period_;
  int64_t within_, row_;
};

}  // namespace

void Interpreter::Free::operator()(void* memory) const { free(memory); }

Interpreter::Interpreter(const Plan& plan) : plan_(plan) {
  const size_t floats = static_cast<size_t>(plan.buffer_count) * static_cast<size_t>(plan.fragment);
  memory_.reset(malloc(floats * sizeof(float) + kAlignment));
  if (memory_ == nullptr) return;
  const uintptr_t start = reinterpret_cast<uintptr_t>(memory_.get());
  buffers_ = reinterpret_cast<float*>((start + kAlignment - 1) / kAlignment * kAlignment);
  // Whole vectors are computed, so the lanes behind a tile's last element need some value; zero is
  // one that no op is slow on.
  memset(buffers_, 0, floats * sizeof(float));
  for (int i = 0; i < plan.constant_count; ++i) {
    std::fill_n(Buffer(plan.constant[i].buffer), plan.fragment, plan.constant[i].value);
  }
}

Interpreter::Tile Interpreter::TileAt(int64_t row_tile, int64_t column_tile) const {
  Tile tile;
  tile.row = row_tile * plan_.tile_rows;
  tile.column = column_tile * plan_.tile_columns;
  tile.rows = static_cast<int>(std::min(plan_.tile_rows, plan_.rows - tile.row));
  tile.columns = static_cast<int>(std::min(plan_.tile_columns, plan_.columns - tile.column));
  return tile;
}

void Interpreter::RunStrip(int64_t index) {
  const int64_t strip_row = index / plan_.column_tiles;
  const int64_t column = index % plan_.column_tiles;
  const int64_t first = strip_row * plan_.strip_tiles;
  const int64_t last = std::min(first + plan_.strip_tiles, plan_.row_tiles);
  for (int i = 0; i < plan_.output_count; ++i) {
    if (plan_.output[i].buffer == 0) continue;
    std::fill_n(Totals(plan_.output[i]), plan_.fragment, 0.0);
  }
  for (int64_t i = first; i < last; ++i) RunTile(TileAt(i, column));
  for (int i = 0; i < plan_.output_count; ++i) {
    if (plan_.output[i].buffer == 0) continue;
    StoreSum(plan_.output[i], strip_row, TileAt(first, column));
  }
}

void Interpreter::RunTile(const Tile& tile) {
  const int vectors = (tile.count() + kLane - 1) / kLane * kLane;

  const float* operand[FXFUSE_MAX_OPERANDS];
  for (int i = 0; i < FXFUSE_MAX_OPERANDS; ++i) operand[i] = LoadOperand(i, tile);
  const float* previous = nullptr;
  if (plan_.reads_accumulator) {
    const MatrixPlan& a = plan_.accumulator;
    const char* data = a.data + (tile.row * a.row_stride + tile.column) * ElementSize(a.dtype);
    previous = LoadPlain(data, a.dtype, a.row_stride, Buffer(0), tile);
  }

  for (int i = 0; i < plan_.step_count; ++i) {
    const StepPlan& step = plan_.step[i];
    const float* argument[3] = {nullptr, nullptr, nullptr};
    for (int j = 0; j < step.arity; ++j) {
      if (step.operand[j] >= 0) {
        argument[j] = operand[step.operand[j]];
      } else {
        argument[j] = step.argument[j] == kPreviousValue ? previous : Buffer(step.argument[j]);
      }
    }
    float* direct = DirectOutput(step, tile);
    if (step.is_copy && !step.is_saved && direct == nullptr) {
      previous = argument[0];
    } else {
      float* result = direct != nullptr ? direct : Buffer(step.result);
      step.run(result, argument[0], argument[1], argument[2], step.p0, step.p1, vectors);
      previous = result;
    }
    if (step.output >= 0 && direct == nullptr) Store(plan_.output[step.output], previous, tile);
  }
}

// Where a result may be computed in the output itself: whole vectors of adjacent floats.
float* Interpreter::DirectOutput(const StepPlan& step, const Tile& tile) const {
  if (step.output < 0 || step.is_saved) return nullptr;
  const MatrixPlan& matrix = plan_.output[step.output];
  if (matrix.dtype != FXFUSE_F32 || tile.count() % kLane != 0) return nullptr;
  if (matrix.sum != FXFUSE_SUM_NONE) return nullptr;
  if (!IsContiguous(tile, matrix.row_stride)) return nullptr;
  return reinterpret_cast<float*>(matrix.data) + tile.row * matrix.row_stride + tile.column;
}

// The operand's values over the tile: in its buffer, or in place where they lie there as needed.
const float* Interpreter::LoadOperand(int index, const Tile& tile) {
  const OperandPlan& o = plan_.operand[index];
  switch (o.kind) {
    case Broadcast::kUnused:
      return nullptr;
    case Broadcast::kScalar:
      return Buffer(o.buffer);
    case Broadcast::kRow:
      return LoadRow(o, index, tile);
    case Broadcast::kColumn:
      FillColumn(o, tile);
      return Buffer(o.buffer);
    case Broadcast::kMatrix:
      break;
  }
  const RowCursor cursor(o, tile.row);
  const bool is_plain = o.repeat == 1 && cursor.row() + tile.rows <= o.period;
  if (o.column_stride == 1 && (is_plain || tile.rows == 1)) {
    const char* data = o.data + (cursor.row() * o.row_stride + tile.column) * ElementSize(o.dtype);
    return LoadPlain(data, o.dtype, o.row_stride, Buffer(o.buffer), tile);
  }
  GatherRows(o, tile);
  return Buffer(o.buffer);
}

const float* Interpreter::LoadRow(const OperandPlan& o, int index, const Tile& tile) {
  float* buffer = Buffer(o.buffer);
  const bool is_whole_row = plan_.column_tiles == 1 && plan_.rows > 1;
  if (is_whole_row && (row_is_ready_ >> index & 1u) != 0) return buffer;
  const char* data = o.data + tile.column * o.column_stride * ElementSize(o.dtype);
  const bool is_direct =
      o.dtype == FXFUSE_F32 && o.column_stride == 1 && tile.rows == 1 && tile.columns % kLane == 0;
  if (is_direct) return reinterpret_cast<const float*>(data);
  LoadStrided(o, data, buffer, tile.columns);
  if (is_whole_row) {
    for (int64_t i = 1; i < plan_.tile_rows; ++i) {
      memcpy(buffer + i * tile.columns, buffer, sizeof(float) * static_cast<size_t>(tile.columns));
    }
    row_is_ready_ |= 1u << index;
  }
  return buffer;
}

void Interpreter::FillColumn(const OperandPlan& o, const Tile& tile) {
  float* out = Buffer(o.buffer);
  const int64_t step = o.row_stride * ElementSize(o.dtype);
  RowCursor cursor(o, tile.row);
  for (int i = 0; i < tile.rows; ++i, cursor.Next()) {
    float value;
    plan_.kernels->load[o.dtype](&value, o.data + cursor.row() * step, 1);
    for (int j = 0; j < tile.columns; ++j) *out++ = value;
  }
}

// Loads rows that follow each other in memory. `data` is the tile's first element.
const float* Interpreter::LoadPlain(const char* data, int dtype, int64_t row_stride, float* buffer,
                                    const Tile& tile) {
  const LoadLoop load = plan_.kernels->load[dtype];
  if (IsContiguous(tile, row_stride)) {
    if (dtype == FXFUSE_F32 && tile.count() % kLane == 0) {
      return reinterpret_cast<const float*>(data);
    }
    load(buffer, data, tile.count());
    return buffer;
  }
  const int64_t step = row_stride * ElementSize(dtype);
  for (int i = 0; i < tile.rows; ++i)
    load(buffer + i * tile.columns, data + i * step, tile.columns);
  return buffer;
}

void Interpreter::GatherRows(const OperandPlan& o, const Tile& tile) {
  const int64_t size = ElementSize(o.dtype);
  float* out = Buffer(o.buffer);
  RowCursor cursor(o, tile.row);
  for (int i = 0; i < tile.rows; ++i, cursor.Next()) {
    const int64_t first = cursor.row() * o.row_stride + tile.column * o.column_stride;
    LoadStrided(o, o.data + first * size, out + i * tile.columns, tile.columns);
  }
}

void Interpreter::LoadStrided(const OperandPlan& o, const char* data, float* out, int count) const {
  const LoadLoop load = plan_.kernels->load[o.dtype];
  if (o.column_stride == 1) return load(out, data, count);
  const int64_t step = o.column_stride * ElementSize(o.dtype);
  for (int i = 0; i < count; ++i) load(out + i, data + i * step, 1);
}

// Over columns a row of the tile is added up at once, over rows element by element in a buffer.
void Interpreter::AddToSum(const MatrixPlan& sum, const float* value, const Tile& tile) const {
  if (sum.sum == FXFUSE_SUM_COLUMNS) {
    float* to = reinterpret_cast<float*>(sum.data) + tile.row * plan_.column_tiles +
                tile.column / plan_.tile_columns;
    for (int i = 0; i < tile.rows; ++i) {
      to[i * plan_.column_tiles] = plan_.kernels->sum(value + i * tile.columns, tile.columns);
    }
    return;
  }
  plan_.kernels->add_to(Totals(sum), value, tile.count());
}

// Writes the sums of a strip whose first tile is `first`.
void Interpreter::StoreSum(const MatrixPlan& sum, int64_t strip_row, const Tile& first) const {
  const double* from = Totals(sum);
  float* to = reinterpret_cast<float*>(sum.data);
  if (sum.sum == FXFUSE_SUM_ALL) {
    double total = 0.0;
    for (int i = 0; i < first.count(); ++i) total += from[i];
    to[strip_row * plan_.column_tiles + first.column / plan_.tile_columns] =
        static_cast<float>(total);
    return;
  }
  to += strip_row * plan_.columns + first.column;
  for (int j = 0; j < first.columns; ++j) {
    double total = from[j];
    for (int i = 1; i < first.rows; ++i) total += from[i * first.columns + j];
    to[j] = static_cast<float>(total);
  }
}

void Interpreter::Store(const MatrixPlan& matrix, const float* value, const Tile& tile) const {
  if (matrix.sum != FXFUSE_SUM_NONE) return AddToSum(matrix, value, tile);
  const StoreLoop store = plan_.kernels->store[matrix.dtype];
  const int64_t size = ElementSize(matrix.dtype);
  char* data = matrix.data + (tile.row * matrix.row_stride + tile.column) * size;
  if (IsContiguous(tile, matrix.row_stride)) return store(data, value, tile.count());
  for (int i = 0; i < tile.rows; ++i) {
    store(data + i * matrix.row_stride * size, value + i * tile.columns, tile.columns);
  }
}

}  // namespace fxfuse
