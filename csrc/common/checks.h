// Checks of what the launchers hand over. They guard memory; the messages for users are the launchers'.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

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

}  // namespace adalora
