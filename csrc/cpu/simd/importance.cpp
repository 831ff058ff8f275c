#include "cpu/simd/importance.h"

#include "cpu/simd/scored.h"
#include "cpu/simd/widen.h"

namespace adalora::cpu::ADALORA_ISA {

namespace {

template <typename T>
bool run(const Run<T>& r, const Smoothing<T>& smoothing) {
  const Smoothing<T> factors = smoothing;
  const bool stored = r.param_dtype == dtype_of<T>::value && r.grad_dtype == dtype_of<T>::value;
  const int64_t step = stored ? r.count : r.period;
  bool finite = true;
  for (int64_t begin = 0; begin < r.count; begin += step) {
    const int64_t count = r.count - begin < step ? r.count - begin : step;
    const AverageRun<T> averages{r.average + begin, r.uncertainty + begin, r.new_average + begin,
                                 r.new_uncertainty + begin, r.sums, count, r.period};
    if (r.grad == nullptr) {
      score_elements(averages, r.streamed, [](int64_t, T a, T u) { return a * u; });
      continue;
    }
    const T* __restrict param = widened(r.param, r.param_dtype, begin, count, r.buffer);
    const T* __restrict grad = widened(r.grad, r.grad_dtype, begin, count, r.buffer + r.period);
    finite &= score_elements(
        averages, r.streamed,
        [=](int64_t i, T& a, T& u) { return update_element(param[i], grad[i], a, u, factors); },
        [=](int64_t i) {
          fetch_ahead(i, averages.average, averages.uncertainty);
          if (stored) fetch_ahead(i, param, grad);
        });
  }
  return finite;
}

}  // namespace

extern const ImportanceKernels importance_kernels;
const ImportanceKernels importance_kernels = {run<float>, run<double>};

}  // namespace adalora::cpu::ADALORA_ISA
