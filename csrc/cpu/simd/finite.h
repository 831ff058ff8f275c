// Telling whether numbers are finite without a branch for each.
// The exponent of a non-finite number is all ones, so the largest magnitude, as an integer, tells of them all.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/simd/vec.h"

namespace adalora::cpu::ADALORA_ISA {

namespace {

ADALORA_INLINE uint32_t magnitude_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits & 0x7fffffff;
}
ADALORA_INLINE uint64_t magnitude_bits(double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits & 0x7fffffffffffffff;
}

template <typename T>
struct MagnitudeBitsOf {
  typedef decltype(magnitude_bits(T{})) type __attribute__((vector_size(kRegisterBytes)));
};
template <typename T>
using MagnitudeBits = typename MagnitudeBitsOf<T>::type;

ADALORA_INLINE MagnitudeBits<float> magnitude_bits(Vec<float> value) {
  return (MagnitudeBits<float>)value & 0x7fffffff;
}
ADALORA_INLINE MagnitudeBits<double> magnitude_bits(Vec<double> value) {
  return (MagnitudeBits<double>)value & 0x7fffffffffffffff;
}
constexpr uint32_t infinity_bits(float) { return 0x7f800000; }
constexpr uint64_t infinity_bits(double) { return 0x7ff0000000000000; }

}  // namespace

}  // namespace adalora::cpu::ADALORA_ISA
