#include "cpu/simd/importance.h"

#include "cpu/simd/finite.h"
#include "cpu/simd/widen.h"

namespace adalora::cpu::ADALORA_ISA {

namespace {

template <typename T>
bool update(const T* __restrict param, const T* __restrict grad, const T* __restrict average,
            const T* __restrict uncertainty, T* __restrict new_average, T* __restrict new_uncertainty,
            T* __restrict sums, int64_t count, const Smoothing<T>& smoothing) {
  const Smoothing<T> factors = smoothing;
  auto largest = magnitude_bits(T{});
  for (int64_t i = 0; i < count; ++i) {
    T a = average[i], u = uncertainty[i];
    const T s = update_element(param[i], grad[i], a, u, factors);
    sums[i] += s;
    new_average[i] = a;
    new_uncertainty[i] = u;
    const auto bits = magnitude_bits(s);
    largest = bits > largest ? bits : largest;
  }
  return largest < infinity_bits(T{});
}

template <typename T>
void carry(const T* __restrict average, const T* __restrict uncertainty, T* __restrict new_average,
           T* __restrict new_uncertainty, T* __restrict sums, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const T a = average[i], u = uncertainty[i];
    sums[i] += a * u;
    new_average[i] = a;
    new_uncertainty[i] = u;
  }
}

template <typename T>
bool run(const Run<T>& r, const Smoothing<T>& smoothing) {
  bool finite = true;
  for (int64_t begin = 0; begin < r.count; begin += r.period) {
    const int64_t count = r.count - begin < r.period ? r.count - begin : r.period;
    const T *average = r.average + begin, *uncertainty = r.uncertainty + begin;
    T *new_average = r.new_average + begin, *new_uncertainty = r.new_uncertainty + begin;
    if (r.grad == nullptr) {
      carry(average, uncertainty, new_average, new_uncertainty, r.sums, count);
      continue;
    }
    const T* param = widened(r.param, r.param_dtype, begin, count, r.buffer);
    const T* grad = widened(r.grad, r.grad_dtype, begin, count, r.buffer + r.period);
    finite &= update(param, grad, average, uncertainty, new_average, new_uncertainty, r.sums, count, smoothing);
  }
  return finite;
}

}  // namespace

extern const ImportanceKernels importance_kernels;
const ImportanceKernels importance_kernels = {run<float>, run<double>};

}  // namespace adalora::cpu::ADALORA_ISA
