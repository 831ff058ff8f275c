// What the launchers hand over, and checks of it. They guard memory; the messages for users are the launchers'.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <vector>

#include "common/operand.h"

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

inline DType float_dtype(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::Double: return DType::kFloat64;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    default: STD_TORCH_CHECK(false, name, ": expected a floating-point tensor");
  }
}

// The memory of `matrix`, which must be [rows, columns] on the same device as `place`. One that isn't contiguous is
// replaced by a copy that is.
inline Operand operand_of(Tensor& matrix, int64_t rows, int64_t columns, const Tensor& place, const char* name) {
  const bool fits = matrix.dim() == 2 && matrix.size(0) == rows && matrix.size(1) == columns;
  STD_TORCH_CHECK(fits, name, ": expected [", rows, ", ", columns, "]");
  const bool beside = matrix.is_cpu() == place.is_cpu() && matrix.get_device_index() == place.get_device_index();
  STD_TORCH_CHECK(beside, name, ": expected all tensors on one device");
  if (!matrix.is_contiguous()) matrix = torch::stable::contiguous(matrix);
  return {matrix.mutable_data_ptr(), float_dtype(matrix, name)};
}

// Reads what tensors say of themselves, which lies as far apart as their memory and is in no cache: one question to all,
// so that they are waited for side by side. All questions to one tensor would take the processor's whole window.
inline void bring_in(const std::vector<Tensor>& tensors) {
  for (const Tensor& tensor : tensors) tensor.const_data_ptr();
}

// The memory of the parameters A₀, E₀, B₀, A₁, …, of layers with sizes R, K, N; or of their gradients, of which some may
// be missing: null where a tensor without elements stands for none.
inline std::vector<Operand> operands_of(std::vector<Tensor>& tensors, const int64_t* sizes, int64_t layers,
                                        const Tensor& place, const char* name, bool some_missing) {
  STD_TORCH_CHECK(static_cast<int64_t>(tensors.size()) == 3 * layers, name, ": expected ", 3 * layers, " tensors");
  bring_in(tensors);
  std::vector<Operand> operands;
  operands.reserve(tensors.size());
  for (int64_t i = 0; i < layers; ++i) {
    const int64_t r = sizes[i], shapes[3][2] = {{r, sizes[layers + i]}, {r, 1}, {sizes[2 * layers + i], r}};
    for (int64_t part = 0; part < 3; ++part) {
      Tensor& tensor = tensors[3 * i + part];
      const auto [rows, columns] = shapes[part];
      const bool none = tensor.numel() == 0 && (some_missing || rows * columns == 0);
      operands.push_back(none ? Operand{nullptr, DType::kFloat32} : operand_of(tensor, rows, columns, place, name));
    }
  }
  return operands;
}

}  // namespace adalora
