// The rank budget: zero E wherever its triplet's score is at or below the (total - budget)-th smallest of the model.
// One block selects the threshold exactly, by the bits of the scores in an order-preserving form: in each round it
// counts how often each value of the next eight bits occurs among the scores that agree with the threshold so far. Then
// it writes the pattern and zeroes E in place. A model has at most some ten thousand triplets, which stay in the cache.
// Counts are integers, so that their order is of no matter: bitwise repeatable.
// No GPU has run this yet. It is compiled for three, and tests/csrc runs it on a CPU (emulated/cuda_runtime.h).
#include "cuda/allocation.h"

#include <math.h>

#include <cstring>
#include <type_traits>

namespace adalora::cuda {

namespace {

constexpr int kDigits = 256;  // of eight bits

template <typename T>
using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;

// Bits that are in the order of the numbers.
template <typename T>
__device__ __forceinline__ Bits<T> key_of(T value) {
  constexpr Bits<T> sign = Bits<T>{1} << (8 * sizeof(T) - 1);
  Bits<T> bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits & sign ? ~bits : bits | sign;
}

template <typename T>
__device__ __forceinline__ T value_of(Bits<T> key) {
  constexpr Bits<T> sign = Bits<T>{1} << (8 * sizeof(T) - 1);
  const Bits<T> bits = key & sign ? key & ~sign : ~key;
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// The digit in which the k-th smallest lies, by the counts of all; and k among those that have it. One warp asks.
struct Place {
  int32_t digit, k;
};

__device__ void find_digit(const int32_t* counts, int32_t k, Place* found) {
  constexpr int kEach = kDigits / 32;
  const int32_t lane = threadIdx.x, first = lane * kEach;
  int32_t own = 0;
  for (int32_t d = 0; d < kEach; ++d) own += counts[first + d];
  int32_t through = own;  // this lane's
  for (int offset = 1; offset < 32; offset *= 2) {
    const int32_t below = __shfl_up_sync(0xffffffff, through, offset);
    if (lane >= offset) through += below;
  }
  int32_t before = through - own;
  for (int32_t d = 0; d < kEach; ++d) {
    const int32_t count = counts[first + d];
    if (before < k && k <= before + count) *found = {first + d, k - before};
    before += count;
  }
}

// The k-th smallest of the scores, k from 1 to their number.
template <typename T>
__device__ T kth_smallest(const T* scores, int32_t total, int32_t k) {
  __shared__ int32_t counts[kDigits];
  __shared__ Place place;
  Bits<T> found = 0;  // the leading digits
  for (int shift = 8 * sizeof(T) - 8; shift >= 0; shift -= 8) {
    if (threadIdx.x < kDigits) counts[threadIdx.x] = 0;
    __syncthreads();
    for (int32_t i = threadIdx.x; i < total; i += kBudgetThreads) {
      const Bits<T> key = key_of(scores[i]) >> shift;
      if (key >> 8 == found) atomicAdd(&counts[key & 255], 1);
    }
    __syncthreads();
    if (threadIdx.x < 32) find_digit(counts, k, &place);
    __syncthreads();
    found = found << 8 | static_cast<Bits<T>>(place.digit);
    k = place.k;
  }
  return value_of<T>(found);
}

// A warp takes a layer.
template <typename Dies>
__device__ void zero(const ValuesList& list, const Dies& dies) {
  const int32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int32_t layer = warp; layer < list.count; layer += kBudgetThreads / 32) {
    const Values& e = list.values[layer];
    for (int32_t i = lane; i < e.count; i += 32) {
      if (!dies(e.first + i)) continue;
      const int64_t at = static_cast<int64_t>(i) * e.stride;
      switch (e.size) {
        case 8: static_cast<uint64_t*>(e.data)[at] = 0; break;
        case 4: static_cast<uint32_t*>(e.data)[at] = 0; break;
        default: static_cast<uint16_t*>(e.data)[at] = 0;
      }
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kBudgetThreads)
    mask(const __grid_constant__ ValuesList list, const __grid_constant__ Budget<T> budget) {
  int64_t number = budget.number;
  if (budget.on_device != nullptr)
    number = budget.wide ? *static_cast<const int64_t*>(budget.on_device)
                         : *static_cast<const int32_t*>(budget.on_device);
  const int64_t prune = min(static_cast<int64_t>(budget.total), budget.total - number);
  const T threshold = prune > 0 ? kth_smallest(budget.scores, budget.total, static_cast<int32_t>(prune))
                                : -static_cast<T>(INFINITY);
  if (threadIdx.x == 0) *budget.threshold = threshold;
  if (budget.enabled != nullptr && !*budget.enabled) return;
  for (int32_t i = threadIdx.x; i < budget.total; i += kBudgetThreads) budget.live[i] = budget.scores[i] > threshold;
  zero(list, [&](int32_t triplet) { return !(budget.scores[triplet] > threshold); });
}

__global__ void __launch_bounds__(kBudgetThreads)
    zero_dead(const __grid_constant__ ValuesList list, const bool* live, const bool* enabled) {
  if (enabled != nullptr && !*enabled) return;
  zero(list, [&](int32_t triplet) { return !live[triplet]; });
}

}  // namespace

template <typename T>
cudaError_t mask_to_budget(const std::vector<ValuesList>& lists, const Budget<T>& budget, cudaStream_t stream) {
  cudaError_t error = launch(mask<T>, 1, kBudgetThreads, stream, lists.front(), budget);
  for (size_t i = 1; i < lists.size() && error == cudaSuccess; ++i)
    error = launch(zero_dead, 1, kBudgetThreads, stream, lists[i], budget.live, budget.enabled);
  return error;
}

cudaError_t zero_pruned(const std::vector<ValuesList>& lists, const bool* live, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  for (size_t i = 0; i < lists.size() && error == cudaSuccess; ++i)
    error = launch(zero_dead, 1, kBudgetThreads, stream, lists[i], live, nullptr);
  return error;
}

template cudaError_t mask_to_budget<float>(const std::vector<ValuesList>&, const Budget<float>&, cudaStream_t);
template cudaError_t mask_to_budget<double>(const std::vector<ValuesList>&, const Budget<double>&, cudaStream_t);

}  // namespace adalora::cuda
