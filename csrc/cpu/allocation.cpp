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

// The layers' E, which are [R, 1] and have `total` values in all.
std::span<const View> values_of(const Tensor& lora_E, int64_t total) {
  const std::span<const View> values = views_of(lora_E, "lora_E");
  int64_t count = 0;
  for (const View& e : values) {
    STD_TORCH_CHECK(e.there() && e.columns == 1, "lora_E: expected [R, 1]");
    count += e.rows;
  }
  STD_TORCH_CHECK(count == total, "lora_E: expected ", total, " values, got ", count);
  return values;
}

void zero_values(const Tensor& live, std::span<const View> values) {
  check_contiguous(live, ScalarType::Bool, live.numel(), "live");
  const bool* alive = static_cast<const bool*>(live.const_data_ptr());
  for (const View& e : values) {
    switch (size_of(e.dtype)) {
      case 8: zero<uint64_t>(e.data, e.rows, e.stride, alive); break;
      case 4: zero<uint32_t>(e.data, e.rows, e.stride, alive); break;
      default: zero<uint16_t>(e.data, e.rows, e.stride, alive);
    }
    alive += e.rows;
  }
}

}  // namespace

void zero_pruned(const Tensor& live, const Tensor& lora_E) { zero_values(live, values_of(lora_E, live.numel())); }

Tensor mask_to_budget(const Tensor& scores, Tensor live, const Tensor& enabled, const Tensor& lora_E,
                      int64_t budget) {
  const ScalarType dtype = scores.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, "scores: expected float32 or float64");
  STD_TORCH_CHECK(budget >= 0, "budget: expected at least 0, got ", budget);
  check_contiguous(scores, dtype, scores.numel(), "scores");
  check_contiguous(live, ScalarType::Bool, scores.numel(), "live");
  check_contiguous(enabled, ScalarType::Bool, 1, "enabled");
  const std::span<const View> values = values_of(lora_E, scores.numel());
  const bool taken = *static_cast<const bool*>(enabled.const_data_ptr());
  Tensor threshold = torch::stable::new_empty(scores, {});
  bool* alive = static_cast<bool*>(live.mutable_data_ptr());
  const auto run = dtype == ScalarType::Double ? prune<double> : prune<float>;
  run(scores, budget, taken, alive, threshold.mutable_data_ptr());
  if (taken) zero_values(live, values);
  return threshold;
}

}  // namespace adalora::cpu
