// The CUDA ops that registration_cuda.cpp registers; tables lie on the CPU and are read before the launch.
#pragma once

#include "common/checks.h"

namespace adalora::cuda {

Tensor importance_update(Tensor state, Tensor half, Tensor scores, const Tensor& shapes, const Tensor& tensors,
                         double beta1, double beta2);

}  // namespace adalora::cuda
