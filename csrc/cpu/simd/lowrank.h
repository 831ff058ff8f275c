// Skinny products of fp32 rows with a factor of small rank, compiled for several instruction sets. Rows are contiguous
// and `stride` numbers apart; factors [rank, length] and coefficients [rows, rank] are contiguous.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace adalora::cpu {

struct LowRankKernels {
  // out[m, r] = Σ_k in[m, k] factor[r, k]
  void (*project)(float* out, const float* in, int64_t stride, int64_t rows, const float* factor, int64_t rank,
                  int64_t length);
  // out[r, k] (+)= Σ_m coefficients[m, r] in[m, k]
  void (*gather)(float* out, const float* coefficients, const float* in, int64_t stride, int64_t rows, int64_t rank,
                 int64_t length, bool add);
  // out[m, k] (+)= Σ_r coefficients[m, r] factor[r, k]
  void (*expand)(float* out, int64_t stride, int64_t rows, const float* coefficients, const float* factor, int64_t rank,
                 int64_t length, bool add);
  // out[i] = Σ_s slabs[s * step + i], in the order of s
  void (*sum_slabs)(float* out, const float* slabs, int64_t step, int64_t count, int64_t length);
};

ADALORA_DECLARE_KERNELS(LowRankKernels, lowrank_kernels)

}  // namespace adalora::cpu
