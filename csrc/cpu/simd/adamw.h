// The hot loops of the optimizer's sweep, compiled for several instruction sets. T is the dtype of the moments.
#pragma once

#include <cstdint>

#include "common/adamw.h"
#include "common/dtype.h"
#include "common/importance.h"
#include "cpu/isa.h"

namespace adalora::cpu {

// A run of consecutive elements of one parameter.
template <typename T>
struct AdamRun {
  void* param;
  const void* grad;
  DType param_dtype, grad_dtype;
  T *moment, *square;
  const T *average, *uncertainty;  // null: no importance in this step
  T *new_average, *new_uncertainty;
  int64_t count;
  T* sums;      // [period]; s of element l is added to sums[l % period]
  int64_t period;
  T* buffer;    // [2 * period], for parameters and gradients of another dtype than T
  bool streamed;  // the new averages go past the caches, where they can
};

template <typename T>
struct AdamSettings {
  AdamStep<T> step;
  Smoothing<T> smoothing;
  T grad_scale;   // times the gradient, before anything else
  bool pre_step;  // importance of θ before its update rather than after
};

template <typename T>
struct AdamKernels {
  // Returns whether every s of the run is finite.
  bool (*run)(const AdamRun<T>&, const AdamSettings<T>&);
  double (*square_sum)(const void* data, DType dtype, int64_t count);
};

struct AdamwKernels {
  AdamKernels<float> f32;
  AdamKernels<double> f64;
};

ADALORA_DECLARE_KERNELS(AdamwKernels, adamw_kernels)

}  // namespace adalora::cpu
