// Module adalora_kernels._C: schemas of all native ops, and their CPU implementations.
#include <torch/csrc/stable/library.h>

#include "cpu/ops.h"
#include "python/module.h"
#include "python/read.h"

STABLE_TORCH_LIBRARY(adalora_native, m) {
  m.def("instruction_set() -> str");
  m.def(
      "importance_update(Tensor(a!) state, Tensor(b!) half, Tensor(c!) scores, Tensor shapes, Tensor params, "
      "Tensor grads, float beta1, float beta2) -> Tensor");
  m.def(
      "importance_layer(Tensor(a!) state, Tensor half, Tensor(b!) scores, Tensor(c!) finite, Tensor shapes, int layer, "
      "Tensor params, Tensor grads, Tensor? slopes, int slopes_A, int slopes_B, Tensor? scale, float beta1, "
      "float beta2) -> ()");
  m.def(
      "adamw_update(Tensor shapes, Tensor params, Tensor grads, Tensor(b!) moments, Tensor(c!) steps, "
      "Tensor groups, Tensor settings, Tensor grad_scale, Tensor(d!)? state, Tensor(e!)? half, Tensor(f!)? scores, "
      "float beta1, float beta2, bool pre_step) -> Tensor");
  m.def("total_norm(Tensor tensors) -> Tensor");
  m.def("mask_to_budget(Tensor scores, Tensor(a!) live, Tensor enabled, Tensor lora_E, int budget) -> Tensor");
  m.def("zero_pruned(Tensor live, Tensor lora_E) -> ()");
  m.def("orthogonality(Tensor matrices, float factor, bool squared) -> (Tensor, Tensor)");
  m.def("orthogonality_gradients(Tensor matrices, Tensor slopes, Tensor scale, Tensor grads, bool add) -> ()");
  m.def("dropout(Tensor x, int threshold, float scale, Tensor seed) -> Tensor");
  m.def(
      "lowrank_forward(Tensor x, Tensor lora_A, Tensor lora_E, Tensor lora_B, Tensor? mask, float scaling, "
      "Tensor(a!) y) -> Tensor");
  m.def(
      "lowrank_backward(Tensor grad_y, Tensor x, Tensor u, Tensor lora_A, Tensor lora_E, Tensor lora_B, Tensor? mask, "
      "float scaling, Tensor(a!)? dx, bool add, bool need_A, bool need_B) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(adalora_native, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&adalora::cpu::instruction_set));
}

STABLE_TORCH_LIBRARY_IMPL(adalora_native, CPU, m) {
  m.impl("importance_update", TORCH_BOX(&adalora::cpu::importance_update));
  m.impl("importance_layer", TORCH_BOX(&adalora::cpu::importance_layer));
  m.impl("adamw_update", TORCH_BOX(&adalora::cpu::adamw_update));
  m.impl("total_norm", TORCH_BOX(&adalora::cpu::total_norm));
  m.impl("mask_to_budget", TORCH_BOX(&adalora::cpu::mask_to_budget));
  m.impl("zero_pruned", TORCH_BOX(&adalora::cpu::zero_pruned));
  m.impl("orthogonality", TORCH_BOX(&adalora::cpu::orthogonality));
  m.impl("orthogonality_gradients", TORCH_BOX(&adalora::cpu::orthogonality_gradients));
  m.impl("dropout", TORCH_BOX(&adalora::cpu::dropout));
  m.impl("lowrank_forward", TORCH_BOX(&adalora::cpu::lowrank_forward));
  m.impl("lowrank_backward", TORCH_BOX(&adalora::cpu::lowrank_backward));
}

ADALORA_MODULE(_C, {"read", adalora::python::read, kFastCall, "read(tensors, place, table, layout): csrc/python/read.h"},
               {"words", adalora::python::words, kFastCall, "words(tensors, place, sizes): csrc/python/read.h"})
