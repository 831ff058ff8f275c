// Telling whether numbers are finite without a branch for each.
// The exponent of a non-finite number is all ones, so the largest magnitude, as an integer, tells of them all.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/inline.h"

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
constexpr uint32_t infinity_bits(float) { return 0x7f800000; }
constexpr uint64_t infinity_bits(double) { return 0x7ff0000000000000; }

}  // namespace

}  // namespace adalora::cpu::ADALORA_ISA
