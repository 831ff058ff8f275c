// The rank budget on a GPU, as seen by its host code.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda/launch.h"

namespace adalora::cuda {

// The singular values of one layer, [R, 1].
struct Values {
  void* data;
  int32_t first, count;  // of its triplets
  int32_t stride;
  uint8_t size;  // of an element, in bytes
};

// As in cuda/importance.h: well under the limit of a launch's parameters.
constexpr int kValuesPerLaunch = 1024;

struct ValuesList {
  int32_t count;
  Values values[kValuesPerLaunch];
};

template <typename T>
struct Budget {
  const T* scores;
  bool* live;
  const bool* enabled;  // null: it is
  T* threshold;
  int32_t total;
  int64_t number;          // of triplets that may stay
  const void* on_device;   // where that number is on the device; null: it isn't
  bool wide;               // of 64 bits there, else of 32
};

static_assert(sizeof(ValuesList) + sizeof(Budget<double>) + 64 < 32764);

constexpr int kBudgetThreads = 1024;

// Every list but an only one holds values.
template <typename T>
cudaError_t mask_to_budget(const std::vector<ValuesList>& lists, const Budget<T>& budget, cudaStream_t stream);

cudaError_t zero_pruned(const std::vector<ValuesList>& lists, const bool* live, cudaStream_t stream);

}  // namespace adalora::cuda
