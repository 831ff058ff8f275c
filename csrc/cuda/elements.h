// Reading and writing an element whose dtype is known only when the kernel runs, and stepping its averages.
#pragma once

#include <cuda_runtime.h>

#include "common/dtype.h"
#include "common/half.h"
#include "common/importance.h"

namespace adalora::cuda {

template <typename T>
__device__ __forceinline__ T read(const void* data, uint8_t dtype, int64_t i) {
  switch (static_cast<DType>(dtype)) {
    case DType::kFloat32: return static_cast<T>(static_cast<const float*>(data)[i]);
    case DType::kFloat64: return static_cast<T>(static_cast<const double*>(data)[i]);
    case DType::kBFloat16: return from_bfloat16(static_cast<const uint16_t*>(data)[i]);
    default: return from_float16(static_cast<const uint16_t*>(data)[i]);
  }
}

// An element of 16 or 32 bits as it lies in memory. What it means is asked later, so that one load need not wait for
// another.
__device__ __forceinline__ uint32_t fetch(const void* data, uint8_t dtype, int64_t i) {
  const bool wide = static_cast<DType>(dtype) == DType::kFloat32;
  return wide ? static_cast<const uint32_t*>(data)[i] : static_cast<const uint16_t*>(data)[i];
}

__device__ __forceinline__ float meaning(uint32_t bits, uint8_t dtype) {
  switch (static_cast<DType>(dtype)) {
    case DType::kBFloat16: return from_bfloat16(static_cast<uint16_t>(bits));
    case DType::kFloat16: return from_float16(static_cast<uint16_t>(bits));
    default: return float_of(bits);
  }
}

// What `value` becomes in such a dtype.
__device__ __forceinline__ uint32_t rounded(float value, uint8_t dtype) {
  switch (static_cast<DType>(dtype)) {
    case DType::kBFloat16: return to_bfloat16(value);
    case DType::kFloat16: return to_float16(value);
    default: return bits_of(value);
  }
}

__device__ __forceinline__ void store(void* data, uint8_t dtype, int64_t i, uint32_t bits) {
  if (static_cast<DType>(dtype) == DType::kFloat32) {
    static_cast<uint32_t*>(data)[i] = bits;
  } else {
    static_cast<uint16_t*>(data)[i] = static_cast<uint16_t>(bits);
  }
}

// Ī and Ū of one parameter in the current half of the state [2, 2, elements], and in the other one.
template <typename T>
struct Averages {
  const T *average, *uncertainty;
  T *new_average, *new_uncertainty;

  __device__ Averages(T* state, const int32_t* half, int64_t elements, int64_t offset) {
    const int64_t current = *half;
    T *old = state + current * 2 * elements + offset, *fresh = state + (1 - current) * 2 * elements + offset;
    average = old;
    uncertainty = old + elements;
    new_average = fresh;
    new_uncertainty = fresh + elements;
  }

  // Both return s.
  __device__ __forceinline__ T step(int64_t i, T param, T grad, const Smoothing<T>& smoothing) const {
    T a = average[i], u = uncertainty[i];
    const T s = update_element(param, grad, a, u, smoothing);
    new_average[i] = a;
    new_uncertainty[i] = u;
    return s;
  }

  __device__ __forceinline__ T carry(int64_t i) const {
    const T a = average[i], u = uncertainty[i];
    new_average[i] = a;
    new_uncertainty[i] = u;
    return a * u;
  }
};

}  // namespace adalora::cuda
