// The orthogonality regulariser over all matrices, in two sweeps. With C = A Aᵀ - I (Bᵀ B - I):
//     forward   γ' Σ ‖C‖_F, with slopes D = γ' (2/‖C‖_F) C; or squared: γ' Σ ‖C‖_F², with D = 4 γ' C
//     backward  dA = D A (dB = B D), times the gradient of the value
// The forward reads each matrix once and leaves R² numbers of it; the backward reads it again and writes the gradient,
// or adds it to one that is there. A matrix is one item; values are added up in the matrices' order: bitwise
// repeatable.
#include <cmath>
#include <utility>
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
  bool columns;    // B [length, rank] rather than A [rank, length]
  int64_t slopes;  // where its R² slopes begin
};

Matrix matrix_of(const View& view, bool columns, int64_t slopes) {
  STD_TORCH_CHECK(view.there() && view.contiguous(), "matrices: expected contiguous ones");
  const auto [rank, length] = columns ? std::pair(view.columns, view.rows) : std::pair(view.rows, view.columns);
  return {view.data, view.dtype, rank, length, columns, slopes};
}

// Of all A, then all B.
std::vector<Matrix> matrices_of(const Tensor& table) {
  const std::span<const View> views = views_of(table, "matrices");
  STD_TORCH_CHECK(!views.empty() && views.size() % 2 == 0, "matrices: expected as many A as B");
  std::vector<Matrix> matrices;
  matrices.reserve(views.size());
  int64_t slopes = 0;
  for (size_t i = 0; i < views.size(); ++i) {
    matrices.push_back(matrix_of(views[i], i >= views.size() / 2, slopes));
    slopes += matrices.back().rank * matrices.back().rank;
  }
  return matrices;
}

// Where a matrix's gradient lies, which has its size and dtype.
void* gradient_of(const View& view, const Matrix& m) {
  const bool fits = view.there() && view.contiguous() && view.elements() == m.rank * m.length && view.dtype == m.dtype;
  STD_TORCH_CHECK(fits, "grads: expected contiguous tensors of the matrices' sizes and dtypes");
  return view.data;
}

int64_t slopes_of(const std::vector<Matrix>& matrices) {
  return matrices.back().slopes + matrices.back().rank * matrices.back().rank;
}

bool threaded(const std::vector<Matrix>& matrices) {
  int64_t elements = 0;
  for (const Matrix& m : matrices) elements += m.rank * m.length;
  return elements >= kThreadedElements;
}

// Of the i-th matrix, if there is one, and of its gradient where gradients are read.
Ahead ahead_of(const std::vector<Matrix>& matrices, int64_t i, void* const* gradients) {
  if (i >= static_cast<int64_t>(matrices.size())) return {};
  const Matrix& m = matrices[i];
  return {m.data, gradients == nullptr ? nullptr : gradients[i], m.rank * m.length * size_of(m.dtype)};
}

template <typename T>
struct Scratch {
  std::vector<double> gram;
  std::vector<T> matrix, slopes, gradient, zeros;
};

template <typename T>
bool stored_as(DType dtype) {
  return dtype == (sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32);
}

// The matrix in T: where it lies, or converted into the scratch.
template <typename T>
const T* widened(const Matrix& m, const GramKernels<T>& kernels, Scratch<T>& scratch) {
  if (stored_as<T>(m.dtype)) return static_cast<const T*>(m.data);
  scratch.matrix.resize(m.rank * m.length);
  kernels.widen(scratch.matrix.data(), m.data, m.dtype, m.rank * m.length);
  return scratch.matrix.data();
}

// γ' ‖C‖ (γ' ‖C‖²) of one matrix, and its slopes.
template <typename T>
double regularise(const Matrix& m, const GramKernels<T>& kernels, double factor, bool squared, T* slopes,
                  Scratch<T>& scratch, const Ahead& ahead) {
  const int64_t r = m.rank;
  if (r == 0) return 0.0;
  const T* data = widened(m, kernels, scratch);
  scratch.gram.resize(r * r);
  double* c = scratch.gram.data();
  if (m.columns) {
    kernels.gram_columns(data, r, m.length, c, ahead);
  } else {
    scratch.zeros.resize(kRowBlock);
    kernels.gram_rows(data, r, m.length, scratch.zeros.data(), c, ahead);
  }
  double total = 0;
  for (int64_t i = 0; i < r; ++i) {
    c[i * r + i] -= 1;
    for (int64_t j = i; j < r; ++j) total += (i == j ? 1 : 2) * c[i * r + j] * c[i * r + j];
  }
  const double norm = std::sqrt(total);
  const double slope = factor * (squared ? 4.0 : norm > 0 ? 2.0 / norm : 0.0);
  for (int64_t i = 0; i < r; ++i)
    for (int64_t j = 0; j < r; ++j) slopes[i * r + j] = static_cast<T>(slope * c[i < j ? i * r + j : j * r + i]);
  return factor * (squared ? total : norm);
}

template <typename T>
T value_of(const std::vector<Matrix>& matrices, const GramKernels<T>& kernels, double factor, bool squared, T* slopes) {
  std::vector<double> values(matrices.size());
  for_each_item_and_next(
      static_cast<int64_t>(matrices.size()), threaded(matrices), [] { return Scratch<T>{}; },
      [&](int64_t i, int64_t next, Scratch<T>& scratch) {
        values[i] = regularise(matrices[i], kernels, factor, squared, slopes + matrices[i].slopes, scratch,
                               ahead_of(matrices, next, nullptr));
      });
  double total = 0;
  for (const double value : values) total += value;
  return static_cast<T>(total);
}

// scale · D A (scale · B D) of one matrix into `gradient`, which has the matrix's dtype and layout.
template <typename T>
void differentiate(const Matrix& m, const GramKernels<T>& kernels, const T* slopes, T scale, void* gradient, bool add,
                   Scratch<T>& scratch, const Ahead& ahead) {
  const int64_t r = m.rank, count = r * m.length, stride = padded(r);
  if (count == 0) return;
  scratch.slopes.assign(r * stride, T{});
  for (int64_t i = 0; i < r; ++i)
    for (int64_t j = 0; j < r; ++j) scratch.slopes[i * stride + j] = scale * slopes[i * r + j];
  const bool in_place = stored_as<T>(m.dtype);
  T* out = static_cast<T*>(gradient);
  if (!in_place) {
    scratch.gradient.resize(count);
    out = scratch.gradient.data();
    if (add) kernels.widen(out, gradient, m.dtype, count);
  }
  kernels.times(m.columns, add, scratch.slopes.data(), widened(m, kernels, scratch), r, m.length, out, ahead);
  if (!in_place) kernels.narrow(gradient, m.dtype, out, count);
}

template <typename T>
void differentiate_all(const std::vector<Matrix>& matrices, const GramKernels<T>& kernels, const T* slopes, T scale,
                       const std::vector<void*>& gradients, bool add) {
  for_each_item_and_next(
      static_cast<int64_t>(matrices.size()), threaded(matrices), [] { return Scratch<T>{}; },
      [&](int64_t i, int64_t next, Scratch<T>& scratch) {
        differentiate(matrices[i], kernels, slopes + matrices[i].slopes, scale, gradients[i], add, scratch,
                      ahead_of(matrices, next, add ? gradients.data() : nullptr));
      });
}

template <typename T>
void add_gradient(const Matrix& m, const GramKernels<T>& kernels, const T* slopes, double scale, void* gradient) {
  Scratch<T> scratch;
  differentiate(m, kernels, slopes + m.slopes, static_cast<T>(scale), gradient, true, scratch, Ahead{});
}

}  // namespace

void add_orthogonality_gradient(const View& matrix, bool columns, const Tensor& slopes, int64_t offset, double scale,
                                const View& grad) {
  const Matrix m = matrix_of(matrix, columns, offset);
  void* gradient = gradient_of(grad, m);
  check_contiguous(slopes, slopes.scalar_type(), slopes.numel(), "slopes");
  STD_TORCH_CHECK(offset >= 0 && offset + m.rank * m.rank <= slopes.numel(), "slopes: no such matrix");
  const auto& kernels = ADALORA_KERNELS(orthogonality_kernels);
  if (slopes.scalar_type() == ScalarType::Double) {
    add_gradient(m, kernels.f64, static_cast<const double*>(slopes.const_data_ptr()), scale, gradient);
  } else {
    add_gradient(m, kernels.f32, static_cast<const float*>(slopes.const_data_ptr()), scale, gradient);
  }
}

std::tuple<Tensor, Tensor> orthogonality(const Tensor& table, double factor, bool squared) {
  const std::vector<Matrix> matrices = matrices_of(table);
  bool fp64 = false;
  for (const Matrix& m : matrices) fp64 |= m.dtype == DType::kFloat64;
  const ScalarType dtype = fp64 ? ScalarType::Double : ScalarType::Float;
  Tensor value = torch::stable::empty({}, dtype);
  Tensor slopes = torch::stable::empty({slopes_of(matrices)}, dtype);
  const auto& kernels = ADALORA_KERNELS(orthogonality_kernels);
  if (fp64) {
    *static_cast<double*>(value.mutable_data_ptr()) =
        value_of(matrices, kernels.f64, factor, squared, static_cast<double*>(slopes.mutable_data_ptr()));
  } else {
    *static_cast<float*>(value.mutable_data_ptr()) =
        value_of(matrices, kernels.f32, factor, squared, static_cast<float*>(slopes.mutable_data_ptr()));
  }
  return {value, slopes};
}

void orthogonality_gradients(const Tensor& table, const Tensor& slopes, const Tensor& scale, const Tensor& grads,
                             bool add) {
  const double factor = number_of(scale, "scale");
  const std::vector<Matrix> matrices = matrices_of(table);
  const ScalarType dtype = slopes.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, "slopes: expected float32 or float64");
  check_contiguous(slopes, dtype, slopes_of(matrices), "slopes");
  const std::span<const View> targets = views_of(grads, "grads");
  STD_TORCH_CHECK(targets.size() == matrices.size(), "grads: expected one for each matrix");
  std::vector<void*> gradients;
  gradients.reserve(targets.size());
  for (size_t i = 0; i < targets.size(); ++i) gradients.push_back(gradient_of(targets[i], matrices[i]));
  const auto& kernels = ADALORA_KERNELS(orthogonality_kernels);
  if (dtype == ScalarType::Double) {
    differentiate_all(matrices, kernels.f64, static_cast<const double*>(slopes.const_data_ptr()), factor, gradients,
                      add);
  } else {
    differentiate_all(matrices, kernels.f32, static_cast<const float*>(slopes.const_data_ptr()),
                      static_cast<float>(factor), gradients, add);
  }
}

}  // namespace adalora::cpu
