// Value and gradient of the orthogonality regulariser over all matrices. With C = A Aᵀ - I (Bᵀ B - I):
//     γ' Σ ‖C‖_F  and  D A (B D) with D = γ' (2/‖C‖_F) C, or squared: γ' Σ ‖C‖_F²  and  D = 4 γ' C
// A matrix is one item: its second reading, for the gradient, comes from the cache, so memory sees each matrix read
// once and each gradient written once. Values are added up in the matrices' order: bitwise repeatable.
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
  bool columns;  // B [length, rank] rather than A [rank, length]
  void* gradient;  // of the matrix's dtype and layout; null: not wanted
};

// All A, then all B. Copies that operand_of makes live in the vectors.
std::vector<Matrix> matrices_of(std::vector<Tensor>& lora_A, std::vector<Tensor>& lora_B,
                                const std::vector<Tensor>& grads) {
  STD_TORCH_CHECK(!lora_A.empty() && lora_A.size() == lora_B.size(), "lora_A, lora_B: expected as many of each");
  STD_TORCH_CHECK(grads.empty() || grads.size() == 2 * lora_A.size(), "grads: expected one for each matrix, or none");
  std::vector<Matrix> matrices;
  matrices.reserve(2 * lora_A.size());
  const auto add = [&](Tensor& tensor, bool columns) {
    STD_TORCH_CHECK(tensor.dim() == 2 && tensor.is_cpu(), "lora_A, lora_B: expected matrices on the CPU");
    const int64_t rank = tensor.size(columns), length = tensor.size(!columns);
    const Operand read = operand_of(tensor, tensor.size(0), tensor.size(1), tensor, "lora_A, lora_B");
    void* gradient = nullptr;
    if (!grads.empty()) {
      const Tensor& grad = grads[matrices.size()];
      check_contiguous(grad, tensor.scalar_type(), rank * length, "grads");
      gradient = grad.mutable_data_ptr();
    }
    matrices.push_back({read.data, read.dtype, rank, length, columns, gradient});
  };
  for (Tensor& a : lora_A) add(a, false);
  for (Tensor& b : lora_B) add(b, true);
  return matrices;
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

// γ' ‖C‖ (γ' ‖C‖²) of one matrix, and its gradient.
template <typename T>
double regularise(const Matrix& m, const GramKernels<T>& kernels, double factor, bool squared, Scratch<T>& scratch) {
  const int64_t r = m.rank, count = r * m.length;
  if (r == 0) return 0.0;
  const T* data = widened(m, kernels, scratch);
  scratch.gram.resize(r * r);
  double* c = scratch.gram.data();
  if (m.columns) {
    kernels.gram_columns(data, r, m.length, c);
  } else {
    scratch.zeros.resize(kRowBlock);
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
    scratch.slopes.assign(r * stride, T{});
    for (int64_t i = 0; i < r; ++i)
      for (int64_t j = 0; j < r; ++j)
        scratch.slopes[i * stride + j] = static_cast<T>(slope * c[i < j ? i * r + j : j * r + i]);
    const bool in_place = stored_as<T>(m.dtype);
    if (!in_place) scratch.gradient.resize(count);
    T* out = in_place ? static_cast<T*>(m.gradient) : scratch.gradient.data();
    const auto times = m.columns ? kernels.times_columns : kernels.times_rows;
    times(scratch.slopes.data(), data, r, m.length, out);
    if (!in_place) kernels.narrow(m.gradient, m.dtype, out, count);
  }
  return factor * (squared ? total : norm);
}

template <typename T>
double total_of(const std::vector<Matrix>& matrices, const GramKernels<T>& kernels, double factor, bool squared) {
  std::vector<double> values(matrices.size());
  int64_t elements = 0;
  for (const Matrix& m : matrices) elements += m.rank * m.length;
  for_each_item(
      static_cast<int64_t>(matrices.size()), elements >= kThreadedElements, [] { return Scratch<T>{}; },
      [&](int64_t i, Scratch<T>& scratch) { values[i] = regularise(matrices[i], kernels, factor, squared, scratch); });
  double total = 0;
  for (const double value : values) total += value;
  return total;
}

}  // namespace

Tensor orthogonality(std::vector<Tensor> lora_A, std::vector<Tensor> lora_B, double factor, bool squared,
                     std::vector<Tensor> grads) {
  const std::vector<Matrix> matrices = matrices_of(lora_A, lora_B, grads);
  bool fp64 = false;
  for (const Matrix& m : matrices) fp64 |= m.dtype == DType::kFloat64;
  Tensor value = torch::stable::empty({}, fp64 ? ScalarType::Double : ScalarType::Float);
  const auto& kernels = ADALORA_KERNELS(orthogonality_kernels);
  if (fp64) {
    *static_cast<double*>(value.mutable_data_ptr()) = total_of(matrices, kernels.f64, factor, squared);
  } else {
    *static_cast<float*>(value.mutable_data_ptr()) =
        static_cast<float>(total_of(matrices, kernels.f32, factor, squared));
  }
  return value;
}

void add_scaled(std::vector<Tensor> targets, std::vector<Tensor> terms, double scale) {
  STD_TORCH_CHECK(targets.size() == terms.size(), "terms: expected as many as targets");
  struct Pair {
    void* target;
    const void* term;
    DType dtype;
    int64_t count;
  };
  std::vector<Pair> pairs;
  int64_t elements = 0;
  for (size_t i = 0; i < terms.size(); ++i) {
    const Tensor &target = targets[i], &term = terms[i];
    check_contiguous(target, term.scalar_type(), term.numel(), "targets");
    STD_TORCH_CHECK(target.is_cpu() && term.is_cpu() && term.is_contiguous(), "terms: expected contiguous CPU tensors");
    pairs.push_back({target.mutable_data_ptr(), term.const_data_ptr(), float_dtype(term, "terms"), term.numel()});
    elements += term.numel();
  }
  const auto& kernels = ADALORA_KERNELS(orthogonality_kernels);
  for_each_item(
      static_cast<int64_t>(pairs.size()), elements >= kThreadedElements, [] { return 0; },
      [&](int64_t i, int) {
        const Pair& pair = pairs[i];
        if (pair.dtype == DType::kFloat64) {
          kernels.f64.add_scaled(pair.target, pair.term, pair.dtype, scale, pair.count);
        } else {
          kernels.f32.add_scaled(pair.target, pair.term, pair.dtype, static_cast<float>(scale), pair.count);
        }
      });
}

}  // namespace adalora::cpu
