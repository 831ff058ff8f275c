// What the launchers hand over, and checks of it. They guard memory; the messages for users are the launchers'.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <span>
#include <vector>

#include "common/operand.h"
#include "common/view.h"

namespace adalora {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_contiguous(const Tensor& tensor, ScalarType dtype, int64_t numel, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, ": unexpected dtype");
  STD_TORCH_CHECK(tensor.numel() == numel, name, ": expected ", numel, " elements, got ", tensor.numel());
  STD_TORCH_CHECK(tensor.is_contiguous(), name, ": expected a contiguous tensor");
}

// An int64 table on the CPU of `rows` rows, stored row by row; returns the number of columns.
inline int64_t check_table(const Tensor& table, int64_t rows, const char* name) {
  const bool fits = table.is_cpu() && table.dim() == 2 && table.size(0) == rows;
  STD_TORCH_CHECK(fits, name, ": expected ", rows, " rows on the CPU");
  check_contiguous(table, ScalarType::Long, table.numel(), name);
  return table.size(1);
}

// One number on the CPU, fp32 or fp64.
inline double number_of(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.numel() == 1, name, ": expected one number on the CPU");
  if (tensor.scalar_type() == ScalarType::Double) return *static_cast<const double*>(tensor.const_data_ptr());
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, name, ": expected float32 or float64");
  return *static_cast<const float*>(tensor.const_data_ptr());
}

// The rows of a table that csrc/python/read.h has filled.
inline std::span<const View> views_of(const Tensor& table, const char* name) {
  const bool fits = table.is_cpu() && table.dim() == 2 && table.size(1) == kViewWords;
  STD_TORCH_CHECK(fits, name, ": expected rows of ", kViewWords, " on the CPU");
  check_contiguous(table, ScalarType::Long, table.numel(), name);
  return {static_cast<const View*>(table.const_data_ptr()), static_cast<size_t>(table.size(0))};
}

// The memory of parameters A₀, E₀, B₀, A₁, …, of layers with sizes R, K, N; or of their gradients, of which some may be
// missing: null.
inline std::vector<Operand> operands_of(std::span<const View> views, const int64_t* sizes, int64_t layers,
                                        const char* name, bool some_missing) {
  STD_TORCH_CHECK(static_cast<int64_t>(views.size()) == 3 * layers, name, ": expected ", 3 * layers, " tensors");
  std::vector<Operand> operands;
  operands.reserve(views.size());
  for (int64_t i = 0; i < layers; ++i) {
    const int64_t r = sizes[i], shapes[3][2] = {{r, sizes[layers + i]}, {r, 1}, {sizes[2 * layers + i], r}};
    for (int64_t part = 0; part < 3; ++part) {
      const View& view = views[3 * i + part];
      const auto [rows, columns] = shapes[part];
      const bool fits = view.rows == rows && view.columns == columns && view.contiguous();
      const bool none = view.there() ? view.elements() == 0 && rows * columns == 0 : some_missing;
      STD_TORCH_CHECK(fits || none, name, ": expected [", rows, ", ", columns, "]");
      operands.push_back({view.data, view.dtype});
    }
  }
  return operands;
}

}  // namespace adalora
