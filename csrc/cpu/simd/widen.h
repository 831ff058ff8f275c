// Conversions between storage dtypes and the dtype of the arithmetic, in loops that compilers vectorise.
// Everything is static: this header is compiled for several instruction sets.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/dtype.h"

namespace adalora::cpu {

ADALORA_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

ADALORA_INLINE float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

ADALORA_INLINE float from_bfloat16(uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); }

// Round to nearest, ties to even.
ADALORA_INLINE uint16_t to_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>(value != value ? 0x7fc0 : rounded);
}

// Exponent and mantissa move by 13 bits, the product with 2^112 rebiases the exponent and normalises subnormals.
ADALORA_INLINE float from_float16(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
  const uint32_t shifted = static_cast<uint32_t>(bits & 0x7fff) << 13;
  const uint32_t finite = bits_of(float_of(shifted) * 0x1p112f);
  return float_of(sign | ((bits & 0x7c00) == 0x7c00 ? shifted | 0x7f800000 : finite));
}

// Round to nearest, ties to even. The sum with a power of two rounds subnormal results at the right bit.
ADALORA_INLINE uint16_t to_float16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t sign = (bits >> 16) & 0x8000;
  const uint32_t size = bits & 0x7fffffff;
  const uint32_t normal = (size - 0x38000000 + 0x0fff + ((size >> 13) & 1)) >> 13;
  const uint32_t subnormal = bits_of(float_of(size) + 0.5f) - 0x3f000000;
  const uint32_t finite = size < 0x38800000 ? subnormal : normal;
  const uint32_t overflow = size > 0x7f800000 ? 0x7e00 : 0x7c00;
  return static_cast<uint16_t>(sign | (size >= 0x477ff000 ? overflow : finite));
}

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
