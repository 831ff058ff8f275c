// The CPU ops that registration.cpp registers. `shapes` is int64 [3, layers] on the CPU: R, K, N of each layer. `params`,
// `grads`, `tensors`, `matrices` and `lora_E` are tables of views (csrc/python/read.h), through which they are written.
#pragma once

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/checks.h"

namespace adalora::cpu {

std::string instruction_set();

Tensor importance_update(Tensor state, Tensor half, Tensor scores, const Tensor& shapes, const Tensor& params,
                         const Tensor& grads, double beta1, double beta2);
// One layer's share of importance_update, for its backward: scores and finite are of all layers; nothing is flipped.
// Where there are slopes, the orthogonality gradient is added to the gradients of A and B first.
void importance_layer(Tensor state, const Tensor& half, Tensor scores, Tensor finite, const Tensor& shapes,
                      int64_t layer, const Tensor& params, const Tensor& grads, std::optional<Tensor> slopes,
                      int64_t slopes_A, int64_t slopes_B, std::optional<Tensor> scale, double beta1, double beta2);
Tensor adamw_update(const Tensor& shapes, const Tensor& params, const Tensor& grads, Tensor moments,
                    Tensor steps, const Tensor& groups, const Tensor& settings, const Tensor& grad_scale,
                    std::optional<Tensor> state, std::optional<Tensor> half, std::optional<Tensor> scores, double beta1,
                    double beta2, bool pre_step);
Tensor total_norm(const Tensor& tensors);
Tensor mask_to_budget(const Tensor& scores, Tensor live, const Tensor& enabled, const Tensor& lora_E,
                      int64_t budget);
void zero_pruned(const Tensor& live, const Tensor& lora_E);
// `matrices`: all A, then all B.
std::tuple<Tensor, Tensor> orthogonality(const Tensor& matrices, double factor, bool squared);
void orthogonality_gradients(const Tensor& matrices, const Tensor& slopes, const Tensor& scale, const Tensor& grads,
                             bool add);
// The same for one matrix, added to its gradient; its slopes begin at `offset`.
void add_orthogonality_gradient(const View& matrix, bool columns, const Tensor& slopes, int64_t offset, double scale,
                                const View& grad);
Tensor dropout(const Tensor& x, int64_t threshold, double scale, const Tensor& seed);
Tensor lowrank_forward(const Tensor& x, const Tensor& lora_A, const Tensor& lora_E, const Tensor& lora_B,
                       std::optional<Tensor> mask, double scaling, Tensor y);
std::tuple<Tensor, Tensor, Tensor> lowrank_backward(const Tensor& grad_y, const Tensor& x, const Tensor& u,
                                                    const Tensor& lora_A, const Tensor& lora_E, const Tensor& lora_B,
                                                    std::optional<Tensor> mask, double scaling,
                                                    std::optional<Tensor> dx, bool add, bool need_A, bool need_B);

}  // namespace adalora::cpu
