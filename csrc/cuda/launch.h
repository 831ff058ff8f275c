// Launches, without <<<>>>: so that a C++ compiler without CUDA reads the sources too, as tests/csrc/emulated does.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <utility>

namespace adalora::cuda {

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t stream,
                   Arguments&&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}

}  // namespace adalora::cuda
