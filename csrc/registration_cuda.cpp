// What importing adalora_kernels._C_cuda registers: CUDA implementations of ops that adalora_kernels._C declares, and ops
// that the CPU has no need of; import adalora_kernels._C first.
#include <torch/csrc/stable/library.h>

#include "cuda/ops.h"

STABLE_TORCH_LIBRARY_FRAGMENT(adalora_native, m) {
  m.def(
      "importance_handed_over(Tensor(a!) state, Tensor(b!) half, Tensor(c!) scores, Tensor shapes, Tensor params, "
      "Tensor grads, Tensor sums, Tensor probes, Tensor(d!) redone, Tensor known, float beta1, float beta2) -> Tensor");
  m.def(
      "finish_gradients(Tensor t_shares, Tensor a_shares, Tensor params, Tensor? mask, float scaling, "
      "Tensor before, Tensor? slopes, int slopes_A, int slopes_B, Tensor? scale, Tensor(a!) state, Tensor half, "
      "int first, Tensor(b!) sums, Tensor(c!) probes, Tensor(d!) ticket, float beta1, float beta2) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "mask_by_selection(Tensor scores, Tensor(a!) live, Tensor? enabled, Tensor lora_E, int number, "
      "Tensor? on_device) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(adalora_native, CUDA, m) {
  m.impl("importance_update", TORCH_BOX(&adalora::cuda::importance_update));
  m.impl("importance_handed_over", TORCH_BOX(&adalora::cuda::importance_handed_over));
  m.impl("finish_gradients", TORCH_BOX(&adalora::cuda::finish_gradients));
  m.impl("mask_by_selection", TORCH_BOX(&adalora::cuda::mask_by_selection));
  m.impl("zero_pruned", TORCH_BOX(&adalora::cuda::zero_pruned));
}
