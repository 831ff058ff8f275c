// As much of CUDA as csrc/cuda uses, for a C++ compiler without it: kernels run on the CPU, bit for bit as they are
// written. Threads are fibres that take turns in any order between barriers, atomics and fences, and so do the blocks,
// some of them at a time. So a missing barrier, a wrong index or a sum that depends on the order shows; what takes
// memory that is slow to be seen can't.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static  // the only ones of kernels; emulation.py puts them into a section of their own

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

enum cudaError_t { cudaSuccess, cudaErrorLaunchFailure };
using cudaStream_t = void*;

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "nothing" : "threads waited for each other, or a shuffle for lanes that did not come";
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream;
};

namespace emulated {

extern dim3 thread_index, block_index;

// Runs all threads of a launch; fails where some of them wait for others that never come, or come to another place.
cudaError_t run(dim3 grid, dim3 block, const std::function<void()>& body);

// Waits for all threads of the block that have not ended, which must do the same; whether all gave true.
enum class Barrier { kPlain, kAnd };
bool synchronize(Barrier barrier, bool value);

// Waits for the warp's lanes of `mask`; what `source` gave, which may be any lane of them.
uint64_t exchange(uint32_t mask, uint64_t value, uint32_t source);

// Lets others take their turn.
void pause();

}  // namespace emulated

#define threadIdx emulated::thread_index
#define blockIdx emulated::block_index

using std::isfinite;
using std::max;
using std::min;

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  return emulated::run(config->gridDim, config->blockDim, [&] { kernel(arguments...); });
}

inline void __threadfence() { emulated::pause(); }  // all threads run on one of the CPU's

inline int32_t atomicAdd(int32_t* address, int32_t value) {
  emulated::pause();
  const int32_t before = *address;
  *address += value;
  return before;
}

inline void __syncthreads() { emulated::synchronize(emulated::Barrier::kPlain, true); }
inline int __syncthreads_and(int value) { return emulated::synchronize(emulated::Barrier::kAnd, value != 0); }

namespace emulated {

template <typename T>
T shuffle(uint32_t mask, T value, int source) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>);
  const int lane = thread_index.x % 32;
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = exchange(mask, bits, 0 <= source && source < 32 ? source : lane);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace emulated

template <typename T>
T __shfl_down_sync(uint32_t mask, T value, int delta) {
  return emulated::shuffle(mask, value, static_cast<int>(threadIdx.x % 32) + delta);
}

template <typename T>
T __shfl_up_sync(uint32_t mask, T value, int delta) {
  return emulated::shuffle(mask, value, static_cast<int>(threadIdx.x % 32) - delta);
}
