// Runs the tiles of a plan on one thread.

#ifndef FXFUSE_CPU_INTERPRETER_H_
#define FXFUSE_CPU_INTERPRETER_H_

#include <stdint.h>

#include <memory>

#include "plan.h"

namespace fxfuse {

class Interpreter {
 public:
  // Needs memory for the plan's buffers; ok() says whether it was to be had.
  explicit Interpreter(const Plan& plan);
  bool ok() const { return memory_ != nullptr; }

  // Runs strip `index` of plan.strip_count.
  void RunStrip(int64_t index);

 private:
  // Rows [row, row + rows) and columns [column, column + columns) of the matrix.
  struct Tile {
    int64_t row, column;
    int rows, columns;
    int count() const { return rows * columns; }
  };

  void RunTile(const Tile& tile);
  float* Buffer(int i) const { return buffers_ + static_cast<int64_t>(i) * plan_.fragment; }
  const float* LoadOperand(int index, const Tile& tile);
  const float* LoadRow(const OperandPlan& operand, int index, const Tile& tile);
  void FillColumn(const OperandPlan& operand, const Tile& tile);
  const float* LoadPlain(const char* data, int dtype, int64_t row_stride, float* buffer,
                         const Tile& tile);
  void GatherRows(const OperandPlan& operand, const Tile& tile);
  void LoadStrided(const OperandPlan& operand, const char* data, float* out, int count) const;
  void Store(const MatrixPlan& matrix, const float* value, const Tile& tile) const;
  Tile TileAt(int64_t row_tile, int64_t column_tile) const;
  // Where a strip is added up: as many doubles as a fragment has floats.
  double* Totals(const MatrixPlan& sum) const {
    return reinterpret_cast<double*>(Buffer(sum.buffer));
  }
  void AddToSum(const MatrixPlan& sum, const float* value, const Tile& tile) const;
  void StoreSum(const MatrixPlan& sum, int64_t strip_row, const Tile& first) const;
  float* DirectOutput(const StepPlan& step, const Tile& tile) const;

  struct Free {
    void operator()(void* memory) const;
  };

  const Plan& plan_;
  std::unique_ptr<void, Free> memory_;
  float* buffers_ = nullptr;
  unsigned row_is_ready_ = 0;  // operands whose buffer holds their row for every tile
};

}  // namespace fxfuse

#endif  // FXFUSE_CPU_INTERPRETER_H_
