// One element of AdamW (arXiv 1711.05101, algorithm 2), in the order of operations of torch.optim.AdamW.
#pragma once

#include <math.h>

#include "common/inline.h"

namespace adalora {

template <typename T>
struct AdamStep {
  T keep;  // 1 - lr · weight decay
  T rest1, beta2, rest2;
  T step_size;  // lr / (1 - β₁ᵗ)
  T root;       // √(1 - β₂ᵗ)
  T eps;

  AdamStep(double lr, double weight_decay, double beta1, double beta2, double eps, double t)
      : keep(static_cast<T>(1 - lr * weight_decay)),
        rest1(static_cast<T>(1 - beta1)),
        beta2(static_cast<T>(beta2)),
        rest2(static_cast<T>(1 - beta2)),
        step_size(static_cast<T>(lr / (1 - pow(beta1, t)))),
        root(static_cast<T>(sqrt(1 - pow(beta2, t)))),
        eps(static_cast<T>(eps)) {}
};

ADALORA_INLINE float square_root(float value) { return sqrtf(value); }
ADALORA_INLINE double square_root(double value) { return sqrt(value); }

// Replaces the moments by the new ones and returns the new parameter.
template <typename T>
ADALORA_INLINE T adamw_element(T param, T grad, T& moment, T& square, const AdamStep<T>& step) {
  moment += step.rest1 * (grad - moment);
  square = step.beta2 * square + step.rest2 * grad * grad;
  return param * step.keep - step.step_size * (moment / (square_root(square) / step.root + step.eps));
}

}  // namespace adalora
