// What the sweeps over Ī and Ū have in common: sums for the triplets, and where the new averages go. What happens to an
// element is the caller's.
#pragma once

#include "cpu/simd/finite.h"
#include "cpu/simd/stream.h"

namespace adalora::cpu::ADALORA_ISA {

namespace {

constexpr int kBlock = 16;        // elements at a time: some registers of every instruction set
constexpr int64_t kAhead = 2048;  // bytes from prefetch to use: half a page, at whose end the hardware's own stops

template <typename T>
struct AverageRun {
  const T *average, *uncertainty;
  T *new_average, *new_uncertainty;
  T* sums;  // [period]; s of element l is added to sums[l % period]
  int64_t count, period;
};

// Brings of each stream the block nearer that comes kAhead after the one at i.
template <typename T, typename... More>
ADALORA_INLINE void fetch_ahead(int64_t i, const T* stream, const More*... more) {
  for (int l = 0; l < kBlock; l += 64 / sizeof(T)) __builtin_prefetch(stream + i + l + kAhead / sizeof(T));
  if constexpr (sizeof...(more) > 0) fetch_ahead(i, more...);
}

// Calls element(i, a, u) with Ī and Ū of element i, which it replaces, for s; before each block of them, fetch(i).
// Returns whether every s is finite.
template <bool Past, typename T, typename Element, typename Fetch>
ADALORA_INLINE bool score_elements(const AverageRun<T>& r, const Element& element, const Fetch& fetch) {
  auto largest = magnitude_bits(T{});
  MagnitudeBits<T> most = {};
  for (int64_t begin = 0; begin < r.count; begin += r.period) {
    const int64_t end = begin + r.period < r.count ? begin + r.period : r.count;
    T* sums = r.sums - begin;
    int64_t i = begin;
    for (; i + kBlock <= end; i += kBlock) {
      T a[kBlock], u[kBlock], s[kBlock];
      fetch(i);
      ADALORA_INDEPENDENT
      for (int l = 0; l < kBlock; ++l) {
        a[l] = r.average[i + l];
        u[l] = r.uncertainty[i + l];
        s[l] = element(i + l, a[l], u[l]);
      }
      for (int l = 0; l < kBlock; l += kLanes<T>) {
        const Vec<T> score = load(s + l);
        store(sums + i + l, load(sums + i + l) + score);
        const MagnitudeBits<T> bits = magnitude_bits(score);
        most = bits > most ? bits : most;
        put<Past>(r.new_average + i + l, load(a + l));
        put<Past>(r.new_uncertainty + i + l, load(u + l));
      }
    }
    for (; i < end; ++i) {
      T a = r.average[i], u = r.uncertainty[i];
      const T s = element(i, a, u);
      sums[i] += s;
      r.new_average[i] = a;
      r.new_uncertainty[i] = u;
      const auto bits = magnitude_bits(s);
      largest = bits > largest ? bits : largest;
    }
  }
  for (int l = 0; l < kLanes<T>; ++l) largest = most[l] > largest ? most[l] : largest;
  return largest < infinity_bits(T{});
}

// The same, past the caches where that is asked for and possible.
template <typename T, typename Element, typename Fetch>
ADALORA_INLINE bool score_elements(const AverageRun<T>& r, bool past, const Element& element, const Fetch& fetch) {
  return past && can_stream(r.new_average, r.new_uncertainty) ? score_elements<true>(r, element, fetch)
                                                              : score_elements<false>(r, element, fetch);
}

template <typename T, typename Element>
ADALORA_INLINE bool score_elements(const AverageRun<T>& r, bool past, const Element& element) {
  return score_elements(r, past, element, [](int64_t) {});
}

}  // namespace

}  // namespace adalora::cpu::ADALORA_ISA
