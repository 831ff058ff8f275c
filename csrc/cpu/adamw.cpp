// One step of AdamW for the adapters of all layers, with the step of their averages and the score of every triplet
// (csrc/common/adamw.h, csrc/common/importance.h). One sweep reads θ, g, both moments, Ī and Ū and writes all but g: 44
// bytes an element in fp32; without importance 28.
//
// `shapes`, parameters and gradients as in importance.cpp. `groups`: for each parameter a row of `settings`, which has
// lr, weight decay, β₁, β₂, ε. `moments`: [2, elements], first and second. `steps`: how often each parameter was
// stepped.
#include "cpu/simd/adamw.h"

#include <cmath>
#include <optional>

#include "cpu/averages.h"
#include "cpu/ops.h"
#include "cpu/simd/importance.h"
#include "cpu/triplet_sweep.h"

namespace adalora::cpu {

namespace {

constexpr int64_t kSettings = 5;

template <typename T>
struct Optimizer {
  T* moments;
  int64_t elements;
  std::vector<AdamSettings<T>> settings;  // of each parameter
};

template <typename T>
bool sweep(const Optimizer<T>& optimizer, const Averages* averages, const Tensor* scores, const int64_t* shapes,
           int64_t layers, const std::vector<Operand>& params, const std::vector<Operand>& grads,
           bool (*run)(const AdamRun<T>&, const AdamSettings<T>&), bool (*carry)(const Run<T>&, const Smoothing<T>&)) {
  std::vector<double> sums;
  const std::vector<triplet_sweep::Item> items = triplet_sweep::cut(shapes, layers, sums);
  const int64_t elements = optimizer.elements;
  const T* old = averages == nullptr ? nullptr : averages->current<T>();
  T* fresh = averages == nullptr ? nullptr : averages->next<T>();
  const bool past_caches = averages != nullptr && averages->streamed();
  const auto at = [](auto* base, int64_t offset) { return base == nullptr ? nullptr : base + offset; };
  const auto segment = [&](const triplet_sweep::Item& item, int64_t begin, int64_t count, T* scratch) {
    const int64_t element = item.begin + begin;
    const Operand param = params[item.tensor].from(element), grad = grads[item.tensor].from(element);
    const int64_t first = item.offset + begin, second = elements + first;
    const AdamSettings<T>& settings = optimizer.settings[item.tensor];
    if (grad.data == nullptr) {
      if (averages == nullptr) return true;
      return carry({param.data, nullptr, param.dtype, grad.dtype, at(old, first), at(old, second), at(fresh, first),
                    at(fresh, second), count, scratch, item.period, scratch + item.period, past_caches},
                   settings.smoothing);
    }
    return run({param.data, grad.data, param.dtype, grad.dtype, optimizer.moments + first, optimizer.moments + second,
                at(old, first), at(old, second), at(fresh, first), at(fresh, second), count, scratch, item.period,
                scratch + item.period, past_caches},
               settings);
  };
  if (!triplet_sweep::run<T>(items, elements, 2, segment)) return false;
  if (averages != nullptr) {
    triplet_sweep::score(items, shapes, layers, static_cast<T*>(scores->mutable_data_ptr()));
    averages->flip();
  }
  return true;
}

Tensor answer(bool value) {
  Tensor tensor = torch::stable::empty({1}, ScalarType::Bool);
  *static_cast<bool*>(tensor.mutable_data_ptr()) = value;
  return tensor;
}

}  // namespace

Tensor adamw_update(const Tensor& shapes, const Tensor& params, const Tensor& grads, Tensor moments,
                    Tensor steps, const Tensor& groups, const Tensor& settings, const Tensor& grad_scale,
                    std::optional<Tensor> state, std::optional<Tensor> half, std::optional<Tensor> scores, double beta1,
                    double beta2, bool pre_step) {
  const int64_t layers = check_table(shapes, 3, "shapes");
  const int64_t* sizes = static_cast<const int64_t*>(shapes.const_data_ptr());
  int64_t elements = 0;
  for (int64_t i = 0; i < layers; ++i) elements += sizes[i] * (sizes[layers + i] + 1 + sizes[2 * layers + i]);
  const ScalarType dtype = moments.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, "moments: expected float32 or float64");
  check_contiguous(moments, dtype, 2 * elements, "moments");
  check_contiguous(steps, ScalarType::Float, 3 * layers, "steps");
  check_contiguous(groups, ScalarType::Long, 3 * layers, "groups");
  check_contiguous(settings, ScalarType::Double, settings.numel(), "settings");
  check_contiguous(grad_scale, ScalarType::Double, 1, "grad_scale");
  const std::vector<Operand> read_params = operands_of(views_of(params, "params"), sizes, layers, "params", false);
  const std::vector<Operand> read_grads = operands_of(views_of(grads, "grads"), sizes, layers, "grads", true);
  const int64_t* group = static_cast<const int64_t*>(groups.const_data_ptr());
  for (int64_t i = 0; i < 3 * layers; ++i)
    STD_TORCH_CHECK(group[i] >= 0 && kSettings * (group[i] + 1) <= settings.numel(), "groups: no such row of settings");
  std::optional<Averages> averages;
  if (state.has_value()) {
    STD_TORCH_CHECK(half.has_value() && scores.has_value() && state->scalar_type() == dtype,
                    "state, half, scores: expected all of them, in the dtype of the moments");
    averages = averages_of(*state, *half, *scores, sizes, layers);
  }
  const double scale = *static_cast<const double*>(grad_scale.const_data_ptr());
  const auto run = [&](auto* data, const auto& kernels, auto carry) {
    using T = std::remove_pointer_t<decltype(data)>;
    Optimizer<T> optimizer{data, elements, {}};
    float* step = static_cast<float*>(steps.mutable_data_ptr());
    const double* table = static_cast<const double*>(settings.const_data_ptr());
    optimizer.settings.reserve(3 * layers);
    for (int64_t i = 0; i < 3 * layers; ++i) {
      if (read_grads[i].data != nullptr) step[i] += 1;
      const double* row = table + kSettings * group[i];
      optimizer.settings.push_back(
          {{row[0], row[1], row[2], row[3], row[4], step[i]}, {beta1, beta2}, static_cast<T>(scale), pre_step});
    }
    return sweep<T>(optimizer, averages ? &*averages : nullptr, scores ? &*scores : nullptr, sizes, layers, read_params,
                    read_grads, kernels.run, carry);
  };
  const auto& kernels = ADALORA_KERNELS(adamw_kernels);
  const auto& carries = ADALORA_KERNELS(importance_kernels);
  return answer(dtype == ScalarType::Double
                    ? run(static_cast<double*>(moments.mutable_data_ptr()), kernels.f64, carries.run_double)
                    : run(static_cast<float*>(moments.mutable_data_ptr()), kernels.f32, carries.run_float));
}

// ‖·‖₂ of all tensors together, fp64 [1], bitwise repeatable.
Tensor total_norm(const Tensor& tensors) {
  const std::span<const View> views = views_of(tensors, "tensors");
  std::vector<double> sums(views.size());
  int64_t elements = 0;
  for (const View& view : views) {
    STD_TORCH_CHECK(view.there() && view.contiguous(), "tensors: expected contiguous tensors");
    elements += view.elements();
  }
  const auto& kernels = ADALORA_KERNELS(adamw_kernels);
  for_each_item(
      static_cast<int64_t>(views.size()), elements >= triplet_sweep::kThreadedElements, [] { return 0; },
      [&](int64_t i, int) {
        const View& view = views[i];
        const auto square_sum = view.dtype == DType::kFloat64 ? kernels.f64.square_sum : kernels.f32.square_sum;
        sums[i] = square_sum(view.data, view.dtype, view.elements());
      });
  double total = 0;
  for (const double sum : sums) total += sum;
  Tensor norm = torch::stable::empty({1}, ScalarType::Double);
  *static_cast<double*>(norm.mutable_data_ptr()) = std::sqrt(total);
  return norm;
}

}  // namespace adalora::cpu
