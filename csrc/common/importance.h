// Sensitivity × uncertainty of one element (AdaLoRA, equations 8-10): I = |θ g|, Ī ← β₁ Ī + (1-β₁) I,
// Ū ← β₂ Ū + (1-β₂) |I - Ī| with the new Ī, s = Ī Ū.
#pragma once

#include <math.h>

#include "common/inline.h"

namespace adalora {

template <typename T>
struct Smoothing {
  T beta1, rest1, beta2, rest2;

  Smoothing(double beta1, double beta2)
      : beta1(static_cast<T>(beta1)),
        rest1(static_cast<T>(1 - beta1)),
        beta2(static_cast<T>(beta2)),
        rest2(static_cast<T>(1 - beta2)) {}
};

ADALORA_INLINE float magnitude(float value) { return fabsf(value); }
ADALORA_INLINE double magnitude(double value) { return fabs(value); }

// Replaces the averages by the new ones and returns s.
template <typename T>
ADALORA_INLINE T update_element(T param, T grad, T& average, T& uncertainty, const Smoothing<T>& smoothing) {
  const T sensitivity = magnitude(param * grad);
  average = smoothing.beta1 * average + smoothing.rest1 * sensitivity;
  uncertainty = smoothing.beta2 * uncertainty + smoothing.rest2 * magnitude(sensitivity - average);
  return average * uncertainty;
}

}  // namespace adalora
