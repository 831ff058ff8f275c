// Host side of the rank budget: checks, and the launches' arguments.
#include "cuda/allocation.h"

#include <torch/csrc/stable/ops.h>

#include <limits>

#include "cuda/ops.h"
#include "cuda/stream.h"

namespace adalora::cuda {

namespace {

// Lists of the layers' E, which are [R, 1], floating-point, beside `place`, and have `total` values in all.
std::vector<ValuesList> lists_of(const std::vector<Tensor>& lora_E, int64_t total, const Tensor& place) {
  constexpr int64_t limit = std::numeric_limits<int32_t>::max();
  STD_TORCH_CHECK(total <= limit, "lora_E: expected at most ", limit, " values, got ", total);
  std::vector<ValuesList> lists(1);
  int64_t first = 0;
  for (const Tensor& e : lora_E) {
    STD_TORCH_CHECK(e.dim() == 2 && e.size(1) == 1, "lora_E: expected [R, 1]");
    check_beside(place, {&e}, "lora_E");
    const int64_t count = e.size(0), stride = e.stride(0);
    STD_TORCH_CHECK(first + count <= total && stride <= limit, "lora_E: expected ", total, " values, got more");
    if (lists.back().count == kValuesPerLaunch) lists.emplace_back();
    ValuesList& list = lists.back();
    list.values[list.count++] = {e.mutable_data_ptr(), static_cast<int32_t>(first), static_cast<int32_t>(count),
                                 static_cast<int32_t>(stride),
                                 static_cast<uint8_t>(size_of(float_dtype(e, "lora_E")))};
    first += count;
  }
  STD_TORCH_CHECK(first == total, "lora_E: expected ", total, " values, got ", first);
  return lists;
}

}  // namespace

void zero_pruned(const Tensor& live, std::vector<Tensor> lora_E) {
  check_contiguous(live, ScalarType::Bool, live.numel(), "live");
  const std::vector<ValuesList> lists = lists_of(lora_E, live.numel(), live);
  const torch::stable::accelerator::DeviceGuard guard(live.get_device_index());
  const cudaError_t error =
      zero_pruned(lists, static_cast<const bool*>(live.const_data_ptr()), current_stream(live.get_device_index()));
  STD_TORCH_CHECK(error == cudaSuccess, "zero_pruned: ", cudaGetErrorString(error));
}

Tensor mask_by_selection(const Tensor& scores, Tensor live, std::optional<Tensor> enabled, std::vector<Tensor> lora_E,
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
  const std::vector<ValuesList> lists = lists_of(lora_E, total, scores);
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
