// Reading and writing an element whose dtype is known only when the kernel runs, and where its averages lie.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/dtype.h"
#include "common/half.h"

namespace adalora::cuda {

// The bits of an element as it lies in memory; of an fp64 one that is to be taken as fp32, those of its fp32 value.
// What they mean is asked later, so that one load need not wait for another.
template <typename T>
using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;

template <typename T>
__device__ __forceinline__ Bits<T> fetch(const void* data, uint8_t dtype, int64_t i) {
  switch (static_cast<DType>(dtype)) {
    case DType::kFloat32: return static_cast<const uint32_t*>(data)[i];
    case DType::kFloat64:
      if constexpr (sizeof(T) == 4) return bits_of(static_cast<float>(static_cast<const double*>(data)[i]));
      return static_cast<Bits<T>>(static_cast<const uint64_t*>(data)[i]);
    default: return static_cast<const uint16_t*>(data)[i];
  }
}

template <typename T>
__device__ __forceinline__ T meaning(Bits<T> bits, uint8_t dtype) {
  switch (static_cast<DType>(dtype)) {
    case DType::kBFloat16: return from_bfloat16(static_cast<uint16_t>(bits));
    case DType::kFloat16: return from_float16(static_cast<uint16_t>(bits));
    case DType::kFloat64:
      if constexpr (sizeof(T) == 8) {
        double value;
        std::memcpy(&value, &bits, sizeof value);
        return value;
      }
      [[fallthrough]];
    default: return float_of(static_cast<uint32_t>(bits));
  }
}

template <typename T>
__device__ __forceinline__ T read(const void* data, uint8_t dtype, int64_t i) {
  return meaning<T>(fetch<T>(data, dtype, i), dtype);
}

// What `value` becomes in a dtype of 16 or 32 bits.
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

};

}  // namespace adalora::cuda
