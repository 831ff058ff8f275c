// How the layers of a model are dealt out to the launches of a sweep.
#pragma once

#include <vector>

#include "common/operand.h"
#include "cuda/importance.h"

namespace adalora::cuda {

// The launches, whose block and sum offsets count up through all of them, and what they add up to.
struct Plan {
  std::vector<Layers> launches{Layers{}};
  int64_t elements = 0, rank = 0, blocks = 0, sums = 0, left = 0;
};

// `sizes`: R, K, N of each layer, [3, layers]. Parameters, gradients and `known` come as A₀, E₀, B₀, A₁, …; null: no
// gradient is known.
Plan plan_of(const int64_t* sizes, int64_t layers, const std::vector<Operand>& params,
             const std::vector<Operand>& grads, const bool* known = nullptr);

}  // namespace adalora::cuda
