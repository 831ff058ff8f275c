// Host side of the importance sweep: checks, and the launches' arguments (as in csrc/cpu/importance.cpp).
#include <torch/csrc/stable/ops.h>

#include "cuda/ops.h"
#include "cuda/plan.h"
#include "cuda/stream.h"

namespace adalora::cuda {

namespace {

Tensor update(const Tensor& state, const Tensor& half, const Tensor& scores, const Plan& plan, const Handover& handover,
              double beta1, double beta2) {
  const ScalarType dtype = state.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, "state: expected float32 or float64");
  check_contiguous(state, dtype, 4 * plan.elements, "state");
  check_contiguous(scores, dtype, plan.rank, "scores");
  check_contiguous(half, ScalarType::Int, 1, "half");
  check_beside(state, {&half, &scores}, "half, scores");

  const torch::stable::accelerator::DeviceGuard guard(state.get_device_index());
  const cudaStream_t stream = current_stream(state.get_device_index());
  Tensor sums = torch::stable::new_empty(state, {plan.sums});
  Tensor finite = torch::stable::new_empty(state, {plan.blocks}, ScalarType::Byte);
  Tensor taken = torch::stable::new_empty(state, {1}, ScalarType::Bool);
  const auto run = [&]<typename T>(T*) {
    const auto data = [](const Tensor& tensor) { return static_cast<T*>(tensor.mutable_data_ptr()); };
    const Update<T> update{data(state),
                           static_cast<int32_t*>(half.mutable_data_ptr()),
                           data(scores),
                           plan.elements,
                           data(sums),
                           static_cast<uint8_t*>(finite.mutable_data_ptr()),
                           static_cast<int32_t>(plan.blocks),
                           static_cast<bool*>(taken.mutable_data_ptr()),
                           handover,
                           {beta1, beta2}};
    return importance_update<T>(plan.launches, update, stream);
  };
  const cudaError_t error =
      dtype == ScalarType::Double ? run(static_cast<double*>(nullptr)) : run(static_cast<float*>(nullptr));
  STD_TORCH_CHECK(error == cudaSuccess, "importance_update: ", cudaGetErrorString(error));
  return taken;
}

}  // namespace

Tensor importance_update(Tensor state, Tensor half, Tensor scores, const Tensor& shapes, const Tensor& params,
                         const Tensor& grads, double beta1, double beta2) {
  const int64_t layers = check_table(shapes, 3, "shapes");
  const int64_t* sizes = static_cast<const int64_t*>(shapes.const_data_ptr());
  const Plan plan = plan_of(sizes, layers, operands_of(views_of(params, "params"), sizes, layers, "params", false),
                            operands_of(views_of(grads, "grads"), sizes, layers, "grads", true));
  return update(state, half, scores, plan, {}, beta1, beta2);
}

Tensor importance_handed_over(Tensor state, Tensor half, Tensor scores, const Tensor& shapes, const Tensor& params,
                              const Tensor& grads, Tensor sums, Tensor probes, Tensor redone, const Tensor& known,
                              double beta1, double beta2) {
  const int64_t layers = check_table(shapes, 3, "shapes");
  const int64_t* sizes = static_cast<const int64_t*>(shapes.const_data_ptr());
  STD_TORCH_CHECK(known.is_cpu(), "known: expected on the CPU");
  check_contiguous(known, ScalarType::Bool, 3 * layers, "known");
  const Plan plan = plan_of(sizes, layers, operands_of(views_of(params, "params"), sizes, layers, "params", false),
                            operands_of(views_of(grads, "grads"), sizes, layers, "grads", true),
                            static_cast<const bool*>(known.const_data_ptr()));
  check_contiguous(sums, ScalarType::Float, plan.left, "sums");
  check_contiguous(probes, ScalarType::Float, 3 * layers * kProbes, "probes");
  check_contiguous(redone, ScalarType::Int, 3 * layers, "redone");
  check_beside(state, {&sums, &probes, &redone}, "sums, probes, redone");
  const Handover handover{static_cast<const float*>(sums.const_data_ptr()),
                          static_cast<const float*>(probes.const_data_ptr()),
                          static_cast<int32_t*>(redone.mutable_data_ptr())};
  return update(state, half, scores, plan, handover, beta1, beta2);
}

}  // namespace adalora::cuda
