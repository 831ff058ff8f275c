// bfloat16 and float16 as bits, in arithmetic that compilers vectorise.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/inline.h"

namespace adalora {

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

}  // namespace adalora
