// The ops of adalora_kernels._C_cuda as they are, for tensors on the CPU: library adalora_emulated, key CPU.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "common/checks.h"

namespace emulated {

struct DeviceGuard {
  explicit DeviceGuard(int32_t) {}
};

inline AOTITorchError current_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

}  // namespace emulated

namespace torch::stable::accelerator {
using EmulatedGuard = emulated::DeviceGuard;
}

#define CUDA CPU
#define DeviceGuard EmulatedGuard
#define adalora_native adalora_emulated
#define aoti_torch_get_current_cuda_stream emulated::current_stream
#define is_cuda is_cpu

#include "registration_cuda.cpp"
// After it, which would not know an op from the kernel's launcher of the same name.
#include "cuda/allocation.cpp"
#include "cuda/finish.cpp"
#include "cuda/importance.cpp"

STABLE_TORCH_LIBRARY_FRAGMENT(adalora_emulated, m) {
  m.def(
      "importance_update(Tensor(a!) state, Tensor(b!) half, Tensor(c!) scores, Tensor shapes, Tensor params, "
      "Tensor grads, float beta1, float beta2) -> Tensor");
  m.def("zero_pruned(Tensor live, Tensor lora_E) -> ()");
}
