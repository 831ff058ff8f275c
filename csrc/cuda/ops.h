// The CUDA ops that registration_cuda.cpp registers; `shapes` lies on the CPU and is read before the launch.
#pragma once

#include <initializer_list>
#include <optional>
#include <tuple>
#include <vector>

#include "common/checks.h"

namespace adalora::cuda {

Tensor importance_update(Tensor state, Tensor half, Tensor scores, const Tensor& shapes, const Tensor& params,
                         const Tensor& grads, double beta1, double beta2);

// The same where backwards have left `sums` and `probes` of those gradients that are `known`, a table on the CPU.
Tensor importance_handed_over(Tensor state, Tensor half, Tensor scores, const Tensor& shapes, const Tensor& params,
                              const Tensor& grads, Tensor sums, Tensor probes, Tensor redone, const Tensor& known,
                              double beta1, double beta2);

// dA, dE, dB from the shares that slabs of rows left; writes this layer's averages, `sums` and `probes`. `before`: the
// gradients that were there, some of which may be missing.
std::tuple<Tensor, Tensor, Tensor> finish_gradients(const Tensor& t_shares, const Tensor& a_shares,
                                                    const Tensor& params, std::optional<Tensor> mask,
                                                    double scaling, const Tensor& before,
                                                    std::optional<Tensor> slopes, int64_t slopes_A, int64_t slopes_B,
                                                    std::optional<Tensor> scale, Tensor state, const Tensor& half,
                                                    int64_t first, Tensor sums, Tensor probes, Tensor ticket,
                                                    double beta1, double beta2);

void zero_pruned(const Tensor& live, const Tensor& lora_E);

// The threshold. `number` of triplets may stay, or as many as the integer `on_device` says.
Tensor mask_by_selection(const Tensor& scores, Tensor live, std::optional<Tensor> enabled, const Tensor& lora_E,
                         int64_t number, std::optional<Tensor> on_device);

// All of them on CUDA, on the device of `place`.
inline void check_beside(const Tensor& place, std::initializer_list<const Tensor*> tensors, const char* name) {
  const int32_t device = place.get_device_index();
  bool beside = place.is_cuda();
  for (const Tensor* tensor : tensors) beside = beside && tensor->is_cuda() && tensor->get_device_index() == device;
  STD_TORCH_CHECK(beside, name, ": expected all tensors on one CUDA device");
}

}  // namespace adalora::cuda
