// One register of T, of the width that this copy of the file is compiled for (GNU vectors: GCC and Clang).
#pragma once

#include <cstdint>
#include <cstring>

#include "common/inline.h"

namespace adalora::cpu::ADALORA_ISA {

namespace {

#if defined(__AVX512F__)
constexpr int kRegisterBytes = 64;
#elif defined(__AVX2__)
constexpr int kRegisterBytes = 32;
#else
constexpr int kRegisterBytes = 16;
#endif

template <typename T>
constexpr int kLanes = kRegisterBytes / static_cast<int>(sizeof(T));

template <typename T>
struct VecOf {
  typedef T type __attribute__((vector_size(kRegisterBytes)));
};
template <typename T>
using Vec = typename VecOf<T>::type;

template <typename T>
ADALORA_INLINE Vec<T> load(const T* data) {
  Vec<T> value;
  std::memcpy(&value, data, sizeof value);
  return value;
}

template <typename T>
ADALORA_INLINE void store(T* data, Vec<T> value) {
  std::memcpy(data, &value, sizeof value);
}

// The lanes past `count` are 0.
template <typename T>
ADALORA_INLINE Vec<T> load_first(const T* data, int64_t count) {
  Vec<T> value = {};
  for (int l = 0; l < kLanes<T>; ++l)
    if (l < count) value[l] = data[l];
  return value;
}

template <typename T>
ADALORA_INLINE double sum(Vec<T> value) {
  double total = 0;
  for (int l = 0; l < kLanes<T>; ++l) total += value[l];
  return total;
}

}  // namespace

}  // namespace adalora::cpu::ADALORA_ISA
