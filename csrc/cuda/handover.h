// What backwards leave for the launch before the optimizer's step (adalora_kernels/reference/handover.py says what).
#pragma once

#include <cstdint>

#include "common/inline.h"

namespace adalora::cuda {

constexpr int32_t kPositions = 8;  // columns of A or rows of B to a sum
constexpr int32_t kProbes = 64;    // of each gradient

// Sums of a layer: [slots of A + 1 + slots of B, R].
ADALORA_INLINE int32_t slots(int32_t positions) { return (positions + kPositions - 1) / kPositions; }

// Between two probes of a parameter with so many positions.
ADALORA_INLINE int32_t probe_step(int32_t positions) { return positions < 2 * kProbes ? 1 : positions / kProbes; }

struct Handover {
  const float* sums;    // null: nothing is handed over
  const float* probes;  // [3 layers, kProbes]
  int32_t* redone;      // [3 layers]
};

}  // namespace adalora::cuda
