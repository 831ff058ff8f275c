// Value and gradient of the orthogonality regulariser over all matrices. With C = A Aᵀ - I (Bᵀ B - I):
//     γ/(2n) Σ ‖C‖_F  and (2/‖C‖_F) C A (B C), or squared: γ Σ ‖C‖_F²  and 4 C A (4 B C)
// A matrix is one item: its second reading, for the gradient, comes from the cache, so memory sees each matrix read
// once and each gradient written once. Values are added up in the matrices' order: bitwise repeatable.
//
// Table `matrices`, for A₀, A₁, …, B₀, B₁, …: address, dtype, R, length (K or N) of the contiguous matrix, address of
// its gradient (same dtype and layout; 0: not wanted).
#include <cmath>
#include <vector>

#include "cpu/ops.h"
#include "cpu/parallel.h"
#include "cpu/simd/orthogonality.h"

namespace adalora::cpu {

namespace {

constexpr int64_t kThreadedElements = 16384;

struct Matrix {
  const void* data;
  DType dtype;
  int64_t rank, length;
  void* gradient;
  bool columns;  // B [length, rank] rather than A [rank, length]
};

template <typename T>
struct Scratch {
  std::vector<double> gram;
  std::vector<T> scaled, matrix, gradient, zeros;
};

// γ' ‖C‖ (γ' ‖C‖²) of one matrix, and its gradient.
template <typename T>
double regularise(const Matrix& m, const GramKernels<T>& kernels, double factor, bool squared, Scratch<T>& scratch) {
  const int64_t r = m.rank, count = r * m.length;
  if (r == 0) return 0.0;
  const bool native = m.dtype == (sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32);
  const T* data = static_cast<const T*>(m.data);
  if (!native) {
    scratch.matrix.resize(count);
    kernels.widen(scratch.matrix.data(), m.data, m.dtype, count);
    data = scratch.matrix.data();
  }
  scratch.gram.resize(r * r);
  double* c = scratch.gram.data();
  if (m.columns) {
    kernels.gram_columns(data, r, m.length, c);
  } else {
    kernels.gram_rows(data, r, m.length, scratch.zeros.data(), c);
  }
  double total = 0;
  for (int64_t i = 0; i < r; ++i) {
    c[i * r + i] -= 1;
    for (int64_t j = i; j < r; ++j) total += (i == j ? 1 : 2) * c[i * r + j] * c[i * r + j];
  }
  const double norm = std::sqrt(total);
  if (m.gradient != nullptr) {
    const double slope = factor * (squared ? 4.0 : norm > 0 ? 2.0 / norm : 0.0);
    const int64_t stride = padded(r);
    scratch.scaled.assign(r * stride, T{});
    for (int64_t i = 0; i < r; ++i)
      for (int64_t j = 0; j < r; ++j)
        scratch.scaled[i * stride + j] = static_cast<T>(slope * c[i < j ? i * r + j : j * r + i]);
    T* out = static_cast<T*>(m.gradient);
    if (!native) {
      scratch.gradient.resize(count);
      out = scratch.gradient.data();
    }
    const auto times = m.columns ? kernels.times_columns : kernels.times_rows;
    times(scratch.scaled.data(), data, r, m.length, out);
    if (!native) kernels.narrow(m.gradient, m.dtype, out, count);
  }
  return factor * (squared ? total : norm);
}

template <typename T>
double total_of(const std::vector<Matrix>& matrices, const GramKernels<T>& kernels, double factor, bool squared) {
  std::vector<double> values(matrices.size());
  int64_t elements = 0;
  for (const Matrix& m : matrices) elements += m.rank * m.length;
  for_each_item(
      static_cast<int64_t>(matrices.size()), elements >= kThreadedElements,
      [] {
        Scratch<T> scratch;
        scratch.zeros.assign(kRowBlock, T{});
        return scratch;
      },
      [&](int64_t i, Scratch<T>& scratch) { values[i] = regularise(matrices[i], kernels, factor, squared, scratch); });
  double total = 0;
  for (const double value : values) total += value;
  return total;
}

}  // namespace

Tensor orthogonality(const Tensor& matrices, double factor, bool squared, bool fp64) {
  const int64_t count = check_table(matrices, 5, "matrices");
  STD_TORCH_CHECK(count % 2 == 0, "matrices: expected as many B as A");
  const int64_t* table = static_cast<const int64_t*>(matrices.const_data_ptr());
  std::vector<Matrix> items;
  for (int64_t i = 0; i < count; ++i)
    items.push_back({reinterpret_cast<const void*>(table[i]), static_cast<DType>(table[count + i]),
                     table[2 * count + i], table[3 * count + i], reinterpret_cast<void*>(table[4 * count + i]),
                     2 * i >= count});
  const auto& kernels = ADALORA_KERNELS(orthogonality_kernels);
  const double total =
      fp64 ? total_of(items, kernels.f64, factor, squared) : total_of(items, kernels.f32, factor, squared);
  Tensor value = torch::stable::empty({}, fp64 ? ScalarType::Double : ScalarType::Float);
  if (fp64) {
    *static_cast<double*>(value.mutable_data_ptr()) = total;
  } else {
    *static_cast<float*>(value.mutable_data_ptr()) = static_cast<float>(total);
  }
  return value;
}

}  // namespace adalora::cpu
