// Results written past the caches, for those that nobody reads before the caches hold something else. An ordinary store
// first reads the line that it overwrites: of all bytes that the importance sweep moves, a quarter. Past means that.
#pragma once

#include <cstdint>

#include "cpu/simd/vec.h"

namespace adalora::cpu::ADALORA_ISA {

namespace {

// Whether these places can be streamed to, register by register.
ADALORA_INLINE bool can_stream([[maybe_unused]] const void* first, [[maybe_unused]] const void* second) {
#if defined(__x86_64__)
  return (reinterpret_cast<uintptr_t>(first) | reinterpret_cast<uintptr_t>(second)) % 16 == 0;
#else
  return false;
#endif
}

// Stores a register. Past the caches, others see it after fence_streams (triplet_sweep.h) alone.
template <bool Past, typename T>
ADALORA_INLINE void put(T* out, Vec<T> value) {
#if defined(__x86_64__)
  if constexpr (Past) {
    __m128i parts[kRegisterBytes / 16];
    std::memcpy(parts, &value, sizeof value);
    for (int i = 0; i < kRegisterBytes / 16; ++i) _mm_stream_si128(reinterpret_cast<__m128i*>(out) + i, parts[i]);
    return;
  }
#endif
  store(out, value);
}

}  // namespace

}  // namespace adalora::cpu::ADALORA_ISA
