#include "cpu/simd/adamw.h"

#include "cpu/simd/scored.h"
#include "cpu/simd/widen.h"

namespace adalora::cpu::ADALORA_ISA {

namespace {

constexpr int64_t kConverted = 1024;  // numbers converted at a time

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

template <bool PreStep, typename T>
bool update(T* __restrict param, const T* __restrict grad, T* __restrict moment, T* __restrict square,
            const AverageRun<T>& averages, bool streamed, const AdamSettings<T>& settings) {
  const AdamStep<T> step = settings.step;
  const Smoothing<T> factors = settings.smoothing;
  const T scale = settings.grad_scale;
  return score_elements(averages, streamed, [=](int64_t i, T& a, T& u) {
    const T g = grad[i] * scale, before = param[i];
    T m = moment[i], v = square[i];
    const T after = adamw_element(before, g, m, v, step);
    param[i] = after;
    moment[i] = m;
    square[i] = v;
    return update_element(PreStep ? before : after, g, a, u, factors);
  });
}

template <typename T>
bool run(const AdamRun<T>& r, const AdamSettings<T>& settings) {
  const bool stored = r.param_dtype == dtype_of<T>::value;
  const int64_t step = stored && r.grad_dtype == dtype_of<T>::value ? r.count : r.period;
  bool finite = true;
  for (int64_t begin = 0; begin < r.count; begin += step) {
    const int64_t count = r.count - begin < step ? r.count - begin : step;
    void* place = static_cast<char*>(r.param) + begin * size_of(r.param_dtype);
    T* param = stored ? static_cast<T*>(place) : r.buffer;
    if (!stored) widen(param, place, r.param_dtype, count);
    const T* grad = widened(r.grad, r.grad_dtype, begin, count, r.buffer + r.period);
    T *moment = r.moment + begin, *square = r.square + begin;
    const AverageRun<T> averages{r.average + begin, r.uncertainty + begin, r.new_average + begin,
                                 r.new_uncertainty + begin, r.sums, count, r.period};
    if (r.average == nullptr) {
      update_alone(param, grad, moment, square, count, settings);
    } else if (settings.pre_step) {
      finite &= update<true>(param, grad, moment, square, averages, r.streamed, settings);
    } else if (stored) {
      finite &= update<false>(param, grad, moment, square, averages, r.streamed, settings);
    } else {
      // What counts is the parameter as it is stored, rounded.
      update_alone(param, grad, moment, square, count, settings);
      narrow(place, r.param_dtype, param, count);
      widen(param, place, r.param_dtype, count);
      const Smoothing<T> factors = settings.smoothing;
      const T scale = settings.grad_scale;
      finite &= score_elements(averages, r.streamed, [=](int64_t i, T& a, T& u) {
        return update_element(param[i], grad[i] * scale, a, u, factors);
      });
      continue;
    }
    if (!stored) narrow(place, r.param_dtype, param, count);
  }
  return finite;
}

template <typename T>
double square_sum(const void* data, DType dtype, int64_t count) {
  T buffer[kConverted];
  double total = 0;
  for (int64_t begin = 0; begin < count; begin += kConverted) {
    const int64_t some = count - begin < kConverted ? count - begin : kConverted;
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
