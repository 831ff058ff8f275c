// The hot loop of the importance sweep, compiled for several instruction sets.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/importance.h"
#include "cpu/isa.h"

namespace adalora::cpu {

// A run of consecutive elements of one parameter. T is the dtype of the averages.
template <typename T>
struct Run {
  const void* param;
  const void* grad;  // null: the averages are carried over as they are
  DType param_dtype, grad_dtype;
  const T *average, *uncertainty;
  T *new_average, *new_uncertainty;
  int64_t count;
  T* sums;         // [period]; s of element l is added to sums[l % period]
  int64_t period;
  T* buffer;       // [2 * period], for parameters and gradients of another dtype than T
  bool streamed;   // the new averages go past the caches, where they can
};

struct ImportanceKernels {
  // Both return whether every s of the run is finite, which takes finite gradients.
  bool (*run_float)(const Run<float>&, const Smoothing<float>&);
  bool (*run_double)(const Run<double>&, const Smoothing<double>&);
};

ADALORA_DECLARE_KERNELS(ImportanceKernels, importance_kernels)

}  // namespace adalora::cpu
