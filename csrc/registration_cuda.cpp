// Module adalora_kernels._C_cuda: CUDA implementations of the ops that adalora_kernels._C declares; import that first.
#include <torch/csrc/stable/library.h>

#include "common/module.h"
#include "cuda/ops.h"

STABLE_TORCH_LIBRARY_IMPL(adalora_native, CUDA, m) {
  m.impl("importance_update", TORCH_BOX(&adalora::cuda::importance_update));
}

ADALORA_MODULE(_C_cuda)
