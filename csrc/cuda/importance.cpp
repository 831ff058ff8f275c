// Host side of the importance sweep: checks, and the launches' arguments (as in csrc/cpu/importance.cpp).
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include "cuda/ops.h"
#include "cuda/plan.h"

namespace adalora::cuda {

Tensor importance_update(Tensor state, Tensor half, Tensor scores, const Tensor& shapes, std::vector<Tensor> params,
                         std::vector<Tensor> grads, double beta1, double beta2) {
  const ScalarType dtype = state.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, "state: expected float32 or float64");
  const int32_t device = state.get_device_index();
  STD_TORCH_CHECK(state.is_cuda() && half.is_cuda() && scores.is_cuda() && half.get_device_index() == device &&
                      scores.get_device_index() == device,
                  "state, half, scores: expected one CUDA device");
  const int64_t layers = check_table(shapes, 3, "shapes");
  const int64_t* sizes = static_cast<const int64_t*>(shapes.const_data_ptr());
  const Plan plan = plan_of(sizes, layers, operands_of(params, sizes, layers, state, "params", false),
                            operands_of(grads, sizes, layers, state, "grads", true));
  check_contiguous(state, dtype, 4 * plan.elements, "state");
  check_contiguous(scores, dtype, plan.rank, "scores");
  check_contiguous(half, ScalarType::Int, 1, "half");

  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
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
                           {beta1, beta2}};
    return importance_update<T>(plan.launches, update, static_cast<cudaStream_t>(stream));
  };
  const cudaError_t error =
      dtype == ScalarType::Double ? run(static_cast<double*>(nullptr)) : run(static_cast<float*>(nullptr));
  STD_TORCH_CHECK(error == cudaSuccess, "importance_update: ", cudaGetErrorString(error));
  return taken;
}

}  // namespace adalora::cuda
