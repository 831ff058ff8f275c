// Products of one matrix with itself, compiled for several instruction sets. T is float or double.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/ahead.h"
#include "cpu/isa.h"

namespace adalora::cpu {

template <typename T>
struct GramKernels {
  // gram [rank, rank], upper triangle: A Aᵀ of A [rank, length], or Bᵀ B of B [length, rank]. `zeros` holds
  // kRowBlock zeros.
  void (*gram_rows)(const T* a, int64_t rank, int64_t length, const T* zeros, double* gram, Ahead ahead);
  void (*gram_columns)(const T* b, int64_t rank, int64_t length, double* gram, Ahead ahead);
  // out (+)= D A, or of `columns` B D, with D [rank, padded(rank)], symmetric, zero past the rank.
  void (*times)(bool columns, bool add, const T* d, const T* matrix, int64_t rank, int64_t length, T* out,
                Ahead ahead);
  void (*widen)(T* out, const void* in, DType dtype, int64_t count);
  void (*narrow)(void* out, DType dtype, const T* in, int64_t count);
};

struct OrthogonalityKernels {
  GramKernels<float> f32;
  GramKernels<double> f64;
};

constexpr int64_t kRowBlock = 1024;  // columns of A taken at a time: so many of 12 rows stay in the L1 or L2 cache

// Row length of D: a multiple of every register width.
constexpr int64_t padded(int64_t rank) { return (rank + 15) / 16 * 16; }

ADALORA_DECLARE_KERNELS(OrthogonalityKernels, orthogonality_kernels)

}  // namespace adalora::cpu
