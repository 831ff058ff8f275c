// Host side of the rank budget: checks, and the launches' arguments.
#include "cuda/allocation.h"

#include <torch/csrc/stable/ops.h>

#include <limits>

#include "cuda/ops.h"
#include "cuda/stream.h"

namespace adalora::cuda {

namespace {

// Lists of the layers' E, which are [R, 1] and have `total` values in all.
std::vector<ValuesList> lists_of(const Tensor& lora_E, int64_t total) {
  constexpr int64_t limit = std::numeric_limits<int32_t>::max();
  STD_TORCH_CHECK(total <= limit, "lora_E: expected at most ", limit, " values, got ", total);
  std::vector<ValuesList> lists(1);
  int64_t first = 0;
  for (const View& e : views_of(lora_E, "lora_E")) {
    STD_TORCH_CHECK(e.there() && e.columns == 1, "lora_E: expected [R, 1]");
    STD_TORCH_CHECK(first + e.rows <= total && e.stride <= limit, "lora_E: expected ", total, " values, got more");
    if (lists.back().count == kValuesPerLaunch) lists.emplace_back();
    ValuesList& list = lists.back();
    list.values[list.count++] = {e.data, static_cast<int32_t>(first), static_cast<int32_t>(e.rows),
                                 static_cast<int32_t>(e.stride), static_cast<uint8_t>(size_of(e.dtype))};
    first += e.rows;
  }
  STD_TORCH_CHECK(first == total, "lora_E: expected ", total, " values, got ", first);
  return lists;
}

}  // namespace

void zero_pruned(const Tensor& live, const Tensor& lora_E) {
  check_contiguous(live, ScalarType::Bool, live.numel(), "live");
  const std::vector<ValuesList> lists = lists_of(lora_E, live.numel());
  const torch::stable::accelerator::DeviceGuard guard(live.get_device_index());
  const cudaError_t error =
      zero_pruned(lists, static_cast<const bool*>(live.const_data_ptr()), current_stream(live.get_device_index()));
  STD_TORCH_CHECK(error == cudaSuccess, "zero_pruned: ", cudaGetErrorString(error));
}

Tensor mask_by_selection(const Tensor& scores, Tensor live, std::optional<Tensor> enabled, const Tensor& lora_E,
                         int64_t number, std::optional<Tensor> on_device) {
  const ScalarType dtype = scores.scalar_type();
  const int64_t total = scores.numel();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, "scores: expected float32 or float64");
  check_contiguous(scores, dtype, total, "scores");
  check_contiguous(live, ScalarType::Bool, total, "live");
  check_beside(scores, {&scores, &live}, "scores, live");
  if (enabled.has_value()) {
    check_contiguous(*enabled, ScalarType::Bool, 1, "enabled");
    check_beside(scores, {&*enabled}, "enabled");
  }
  if (on_device.has_value()) {
    const ScalarType integer = on_device->scalar_type();
    const bool fits = (integer == ScalarType::Int || integer == ScalarType::Long) && on_device->numel() == 1;
    STD_TORCH_CHECK(fits, "budget: expected one int32 or int64");
    check_beside(scores, {&*on_device}, "budget");
  }
  const std::vector<ValuesList> lists = lists_of(lora_E, total);
  const torch::stable::accelerator::DeviceGuard guard(scores.get_device_index());
  const cudaStream_t stream = current_stream(scores.get_device_index());
  Tensor threshold = torch::stable::new_empty(scores, {});
  const auto run = [&]<typename T>(T*) {
    const Budget<T> budget{static_cast<const T*>(scores.const_data_ptr()),
                           static_cast<bool*>(live.mutable_data_ptr()),
                           enabled.has_value() ? static_cast<const bool*>(enabled->const_data_ptr()) : nullptr,
                           static_cast<T*>(threshold.mutable_data_ptr()),
                           static_cast<int32_t>(total),
                           number,
                           on_device.has_value() ? on_device->const_data_ptr() : nullptr,
                           on_device.has_value() && on_device->scalar_type() == ScalarType::Long};
    return mask_to_budget<T>(lists, budget, stream);
  };
  const cudaError_t error =
      dtype == ScalarType::Double ? run(static_cast<double*>(nullptr)) : run(static_cast<float*>(nullptr));
  STD_TORCH_CHECK(error == cudaSuccess, "mask_to_budget: ", cudaGetErrorString(error));
  return threshold;
}

}  // namespace adalora::cuda
