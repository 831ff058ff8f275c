// The rank budget: zero E wherever its triplet's score is at or below the (total - budget)-th smallest of the model.
// Reads the scores once and writes E and the pattern: a few bytes for each triplet, so no threads.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "cpu/ops.h"

namespace adalora::cpu {

namespace {

template <typename T>
void zero(void* data, int64_t count, int64_t stride, const bool* live) {
  for (int64_t i = 0; i < count; ++i)
    if (!live[i]) static_cast<T*>(data)[i * stride] = T{};
}

template <typename T>
T threshold_of(const T* scores, int64_t total, int64_t budget) {
  if (total <= budget) return -std::numeric_limits<T>::infinity();
  std::vector<T> sorted(scores, scores + total);
  const auto nth = sorted.begin() + (total - budget - 1);
  std::nth_element(sorted.begin(), nth, sorted.end());
  return *nth;
}

template <typename T>
void prune(const Tensor& scores, int64_t budget, bool enabled, bool* live, void* threshold) {
  const T* begin = static_cast<const T*>(scores.const_data_ptr());
  const T limit = threshold_of(begin, scores.numel(), budget);
  *static_cast<T*>(threshold) = limit;
  if (!enabled) return;
  for (int64_t i = 0; i < scores.numel(); ++i) live[i] = begin[i] > limit;
}

// Before anything is written: each E is [R, 1], floating-point, on the CPU, and they have as many values as triplets.
void check_values(const std::vector<Tensor>& values, int64_t total) {
  int64_t count = 0;
  for (const Tensor& e : values) {
    STD_TORCH_CHECK(e.is_cpu() && e.dim() == 2 && e.size(1) == 1, "lora_E: expected [R, 1] on the CPU");
    float_dtype(e, "lora_E");
    count += e.size(0);
  }
  STD_TORCH_CHECK(count == total, "lora_E: expected ", total, " values, got ", count);
}

void zero_values(const Tensor& live, const std::vector<Tensor>& values) {
  check_contiguous(live, ScalarType::Bool, live.numel(), "live");
  const bool* alive = static_cast<const bool*>(live.const_data_ptr());
  for (const Tensor& e : values) {
    const int64_t count = e.size(0), stride = e.stride(0);
    void* data = e.mutable_data_ptr();
    switch (size_of(float_dtype(e, "lora_E"))) {
      case 8: zero<uint64_t>(data, count, stride, alive); break;
      case 4: zero<uint32_t>(data, count, stride, alive); break;
      default: zero<uint16_t>(data, count, stride, alive);
    }
    alive += count;
  }
}

}  // namespace

void zero_pruned(const Tensor& live, std::vector<Tensor> values) {
  check_values(values, live.numel());
  zero_values(live, values);
}

Tensor mask_to_budget(const Tensor& scores, Tensor live, const Tensor& enabled, std::vector<Tensor> values,
                      int64_t budget) {
  const ScalarType dtype = scores.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, "scores: expected float32 or float64");
  STD_TORCH_CHECK(budget >= 0, "budget: expected at least 0, got ", budget);
  check_contiguous(scores, dtype, scores.numel(), "scores");
  check_contiguous(live, ScalarType::Bool, scores.numel(), "live");
  check_contiguous(enabled, ScalarType::Bool, 1, "enabled");
  check_values(values, scores.numel());
  const bool taken = *static_cast<const bool*>(enabled.const_data_ptr());
  Tensor threshold = torch::stable::new_empty(scores, {});
  bool* alive = static_cast<bool*>(live.mutable_data_ptr());
  const auto run = dtype == ScalarType::Double ? prune<double> : prune<float>;
  run(scores, budget, taken, alive, threshold.mutable_data_ptr());
  if (taken) zero_values(live, values);
  return threshold;
}

}  // namespace adalora::cpu
