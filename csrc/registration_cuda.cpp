// Module adalora_kernels._C_cuda: CUDA implementations of the ops that adalora_kernels._C declares; import that first.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include "cuda/ops.h"

STABLE_TORCH_LIBRARY_IMPL(adalora_native, CUDA, m) {
  m.impl("importance_update", TORCH_BOX(&adalora::cuda::importance_update));
}

static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};

PyMODINIT_FUNC PyInit__C_cuda() { return PyModule_Create(&module); }
