// The CUDA ops that registration_cuda.cpp registers; `shapes` lies on the CPU and is read before the launch.
#pragma once

#include <vector>

#include "common/checks.h"

namespace adalora::cuda {

Tensor importance_update(Tensor state, Tensor half, Tensor scores, const Tensor& shapes, std::vector<Tensor> params,
                         std::vector<Tensor> grads, double beta1, double beta2);

}  // namespace adalora::cuda
