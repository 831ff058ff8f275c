// One register of T, of the width that this copy of the file is compiled for (GNU vectors: GCC and Clang).
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/inline.h"

// Before a loop of which no iteration writes what another one reads.
#if defined(__clang__)
#define ADALORA_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define ADALORA_INDEPENDENT _Pragma("GCC ivdep")
#endif

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

// Of all lanes, in fp64, by halves, which compilers make a few instructions of.
template <typename T>
ADALORA_INLINE double sum(Vec<T> value) {
  T lanes[kLanes<T>];
  store(lanes, value);
  double part[kLanes<T>];
  for (int l = 0; l < kLanes<T>; ++l) part[l] = lanes[l];
  for (int step = kLanes<T> / 2; step > 0; step /= 2)
    for (int l = 0; l < step; ++l) part[l] += part[l + step];
  return part[0];
}

// a · b + c, rounded once where the instruction set can: for sums of products alone, whose bits may differ between sets.
ADALORA_INLINE Vec<float> multiply_add(Vec<float> a, Vec<float> b, Vec<float> c) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
  return (Vec<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

ADALORA_INLINE Vec<double> multiply_add(Vec<double> a, Vec<double> b, Vec<double> c) {
#if defined(__AVX512F__)
  return (Vec<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__AVX2__) && defined(__FMA__)
  return (Vec<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}

template <typename T>
ADALORA_INLINE Vec<T> splat(T value) {
  return value - Vec<T>{};
}

// Products of the low 32 bits of each lane: one instruction on x86, which compilers don't find on their own.
ADALORA_INLINE Vec<uint64_t> multiply_low(Vec<uint64_t> a, Vec<uint64_t> b) {
#if defined(__AVX512F__)
  return (Vec<uint64_t>)_mm512_maskz_mul_epu32(0xff, (__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Vec<uint64_t>)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__x86_64__)
  return (Vec<uint64_t>)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffff) * (b & 0xffffffff);
#endif
}

}  // namespace

}  // namespace adalora::cpu::ADALORA_ISA
