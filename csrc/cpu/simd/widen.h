// Conversions between storage dtypes and the dtype of the arithmetic, in loops that compilers vectorise.
// Everything is static: this header is compiled for several instruction sets.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/half.h"

namespace adalora::cpu {

template <typename T>
static inline void widen(T* __restrict out, const void* in, DType dtype, int64_t count) {
  switch (dtype) {
    case DType::kFloat32:
      for (int64_t i = 0; i < count; ++i) out[i] = static_cast<T>(static_cast<const float*>(in)[i]);
      break;
    case DType::kFloat64:
      for (int64_t i = 0; i < count; ++i) out[i] = static_cast<T>(static_cast<const double*>(in)[i]);
      break;
    case DType::kBFloat16:
      for (int64_t i = 0; i < count; ++i) out[i] = from_bfloat16(static_cast<const uint16_t*>(in)[i]);
      break;
    case DType::kFloat16:
      for (int64_t i = 0; i < count; ++i) out[i] = from_float16(static_cast<const uint16_t*>(in)[i]);
      break;
  }
}

template <typename T>
static inline void narrow(void* out, DType dtype, const T* __restrict in, int64_t count) {
  switch (dtype) {
    case DType::kFloat32:
      for (int64_t i = 0; i < count; ++i) static_cast<float*>(out)[i] = static_cast<float>(in[i]);
      break;
    case DType::kFloat64:
      for (int64_t i = 0; i < count; ++i) static_cast<double*>(out)[i] = static_cast<double>(in[i]);
      break;
    case DType::kBFloat16:
      for (int64_t i = 0; i < count; ++i) static_cast<uint16_t*>(out)[i] = to_bfloat16(static_cast<float>(in[i]));
      break;
    case DType::kFloat16:
      for (int64_t i = 0; i < count; ++i) static_cast<uint16_t*>(out)[i] = to_float16(static_cast<float>(in[i]));
      break;
  }
}

template <typename T>
struct dtype_of;
template <>
struct dtype_of<float> { static constexpr DType value = DType::kFloat32; };
template <>
struct dtype_of<double> { static constexpr DType value = DType::kFloat64; };

// `count` elements from element `offset` on, in T: where they lie, or converted into `buffer`.
template <typename T>
static inline const T* widened(const void* data, DType dtype, int64_t offset, int64_t count, T* buffer) {
  const char* begin = static_cast<const char*>(data) + offset * size_of(dtype);
  if (dtype == dtype_of<T>::value) return reinterpret_cast<const T*>(begin);
  widen(buffer, begin, dtype, count);
  return buffer;
}

}  // namespace adalora::cpu
