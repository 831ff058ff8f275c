#include "cpu/simd/adamw.h"

#include "cpu/simd/finite.h"
#include "cpu/simd/vec.h"
#include "cpu/simd/widen.h"

namespace adalora::cpu::ADALORA_ISA {

namespace {

constexpr int64_t kBlock = 1024;  // numbers converted at a time

template <typename T, bool PreStep>
bool update(T* __restrict param, const T* __restrict grad, T* __restrict moment, T* __restrict square,
            const T* __restrict average, const T* __restrict uncertainty, T* __restrict new_average,
            T* __restrict new_uncertainty, T* __restrict sums, int64_t count, const AdamSettings<T>& settings) {
  const AdamStep<T> step = settings.step;
  const Smoothing<T> factors = settings.smoothing;
  const T scale = settings.grad_scale;
  auto largest = magnitude_bits(T{});
  for (int64_t i = 0; i < count; ++i) {
    const T g = grad[i] * scale, before = param[i];
    T m = moment[i], v = square[i], a = average[i], u = uncertainty[i];
    const T after = adamw_element(before, g, m, v, step);
    const T s = update_element(PreStep ? before : after, g, a, u, factors);
    param[i] = after;
    moment[i] = m;
    square[i] = v;
    sums[i] += s;
    new_average[i] = a;
    new_uncertainty[i] = u;
    const auto bits = magnitude_bits(s);
    largest = bits > largest ? bits : largest;
  }
  return largest < infinity_bits(T{});
}

template <typename T>
void update_alone(T* __restrict param, const T* __restrict grad, T* __restrict moment, T* __restrict square,
                  int64_t count, const AdamSettings<T>& settings) {
  const AdamStep<T> step = settings.step;
  const T scale = settings.grad_scale;
  for (int64_t i = 0; i < count; ++i) {
    T m = moment[i], v = square[i];
    param[i] = adamw_element(param[i], grad[i] * scale, m, v, step);
    moment[i] = m;
    square[i] = v;
  }
}

// Importance of stored parameters, with their averages.
template <typename T>
bool score(const T* __restrict param, const T* __restrict grad, const T* __restrict average,
           const T* __restrict uncertainty, T* __restrict new_average, T* __restrict new_uncertainty,
           T* __restrict sums, int64_t count, const AdamSettings<T>& settings) {
  const Smoothing<T> factors = settings.smoothing;
  const T scale = settings.grad_scale;
  auto largest = magnitude_bits(T{});
  for (int64_t i = 0; i < count; ++i) {
    T a = average[i], u = uncertainty[i];
    const T s = update_element(param[i], grad[i] * scale, a, u, factors);
    sums[i] += s;
    new_average[i] = a;
    new_uncertainty[i] = u;
    const auto bits = magnitude_bits(s);
    largest = bits > largest ? bits : largest;
  }
  return largest < infinity_bits(T{});
}

template <typename T>
bool run(const AdamRun<T>& r, const AdamSettings<T>& settings) {
  const bool stored = r.param_dtype == dtype_of<T>::value;
  bool finite = true;
  for (int64_t begin = 0; begin < r.count; begin += r.period) {
    const int64_t count = r.count - begin < r.period ? r.count - begin : r.period;
    void* place = static_cast<char*>(r.param) + begin * size_of(r.param_dtype);
    T* param = stored ? static_cast<T*>(place) : r.buffer;
    if (!stored) widen(param, place, r.param_dtype, count);
    const T* grad = widened(r.grad, r.grad_dtype, begin, count, r.buffer + r.period);
    T *moment = r.moment + begin, *square = r.square + begin;
    if (r.average == nullptr) {
      update_alone(param, grad, moment, square, count, settings);
    } else if (!stored && !settings.pre_step) {
      // What counts is the parameter as it is stored, rounded.
      update_alone(param, grad, moment, square, count, settings);
      narrow(place, r.param_dtype, param, count);
      widen(param, place, r.param_dtype, count);
      finite &= score(param, grad, r.average + begin, r.uncertainty + begin, r.new_average + begin,
                      r.new_uncertainty + begin, r.sums, count, settings);
    } else {
      const auto with_importance = settings.pre_step ? update<T, true> : update<T, false>;
      finite &= with_importance(param, grad, moment, square, r.average + begin, r.uncertainty + begin,
                                r.new_average + begin, r.new_uncertainty + begin, r.sums, count, settings);
    }
    if (!stored) narrow(place, r.param_dtype, param, count);
  }
  return finite;
}

template <typename T>
double square_sum(const void* data, DType dtype, int64_t count) {
  T buffer[kBlock];
  double total = 0;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t some = count - begin < kBlock ? count - begin : kBlock;
    const T* values = widened(data, dtype, begin, some, buffer);
    Vec<T> part = {};
    int64_t i = 0;
    for (; i + kLanes<T> <= some; i += kLanes<T>) {
      const Vec<T> v = load(values + i);
      part += v * v;
    }
    for (; i < some; ++i) total += static_cast<double>(values[i]) * values[i];
    total += sum<T>(part);
  }
  return total;
}

}  // namespace

extern const AdamwKernels adamw_kernels;
const AdamwKernels adamw_kernels = {{run<float>, square_sum<float>}, {run<double>, square_sum<double>}};

}  // namespace adalora::cpu::ADALORA_ISA
