// What launchers say of a tensor, one row of a table on the CPU (csrc/python/read.h writes them).
#pragma once

#include "common/dtype.h"

namespace adalora {

// A matrix of floating-point numbers, or no tensor at all.
struct View {
  void* data;  // null where there are no elements
  DType dtype;
  int64_t rows, columns;  // -1 both: there is no tensor
  int64_t stride;         // from row to row; within a row elements are side by side

  bool there() const { return rows >= 0; }
  int64_t elements() const { return rows * columns; }
  bool contiguous() const { return stride == columns || rows <= 1 || columns == 0; }
};

constexpr int64_t kViewWords = 5;  // int64, of a row
static_assert(sizeof(View) == kViewWords * sizeof(int64_t));

}  // namespace adalora
