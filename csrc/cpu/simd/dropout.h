// Dropout of a run of elements, compiled for several instruction sets.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/isa.h"

namespace adalora::cpu {

struct DropoutKernels {
  // out[i] = in[i * stride] / (1 - p), or 0 where the word of counter + i is below `limit`.
  void (*run)(void* out, const void* in, DType dtype, int64_t stride, int64_t count, uint64_t counter, uint64_t seed,
              uint32_t limit, double scale);
};

ADALORA_DECLARE_KERNELS(DropoutKernels, dropout_kernels)

}  // namespace adalora::cpu
