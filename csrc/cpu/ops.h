// The CPU ops that registration.cpp registers. Tables are int64 [rows, count] on the CPU; the op's file names the rows.
#pragma once

#include <optional>
#include <string>
#include <tuple>

#include "common/checks.h"

namespace adalora::cpu {

std::string instruction_set();

Tensor importance_update(Tensor state, Tensor half, Tensor scores, const Tensor& shapes, const Tensor& tensors,
                         double beta1, double beta2);
Tensor mask_to_budget(const Tensor& scores, Tensor live, const Tensor& enabled, const Tensor& values, int64_t budget);
void zero_pruned(const Tensor& live, const Tensor& values);
Tensor orthogonality(const Tensor& matrices, double factor, bool squared, bool fp64);
Tensor dropout(const Tensor& x, int64_t threshold, double scale, const Tensor& seed);
Tensor lowrank_forward(const Tensor& x, const Tensor& lora_A, const Tensor& lora_E, const Tensor& lora_B,
                       std::optional<Tensor> mask, double scaling, Tensor y);
std::tuple<Tensor, Tensor, Tensor> lowrank_backward(const Tensor& grad_y, const Tensor& x, const Tensor& u,
                                                    const Tensor& lora_A, const Tensor& lora_E, const Tensor& lora_B,
                                                    std::optional<Tensor> mask, double scaling,
                                                    std::optional<Tensor> dx, bool add, bool need_A, bool need_B);

}  // namespace adalora::cpu
