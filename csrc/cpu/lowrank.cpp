// The low-rank term of the layer around the frozen products, fp32. With λ = c E ⊙ mask [R] and tokens in rows:
//     forward:   u = x Aᵀ,  y += (u ⊙ λ) Bᵀ
//     backward:  v = (g B) ⊙ λ,  dx += v A,  dA = vᵀ x,  T = gᵀ u,  dB = T ⊙ λ,  dE = c mask ⊙ colsum(B ⊙ T)
// Memory sees x once and y twice in the forward, g and x once and dx twice in the backward: a block of rows stays in
// the cache while everything that needs it is done. dA and T are summed within slabs of rows, then over the slabs in
// their order. Slabs follow from the shapes alone: bitwise repeatable, whatever the number of threads.
#include <algorithm>
#include <tuple>
#include <vector>

#include "cpu/ops.h"
#include "cpu/parallel.h"
#include "cpu/simd/lowrank.h"

namespace adalora::cpu {

namespace {

// A block's longer rows take this many numbers, so that they are still in the L2 cache when they are read again.
constexpr int64_t kBlockNumbers = 196608, kMinBlockRows = 8, kMaxBlockRows = 64;
// Enough slabs for the threads; few, since each has its own dA and T.
constexpr int64_t kMinSlabRows = 64, kMaxSlabRows = 256, kSlabs = 16, kMaxSlabs = 64;
constexpr int64_t kColumns = 256;  // columns summed over the slabs at a time
constexpr int64_t kThreadedElements = 32768;

struct Rows {
  float* data;
  int64_t length, stride;

  float* operator[](int64_t row) const { return data + row * stride; }
};

Rows rows_of(const Tensor& t, int64_t count, int64_t length, const char* name) {
  const bool fits = t.dim() == 2 && t.size(0) == count && t.size(1) == length && t.scalar_type() == ScalarType::Float &&
                    (t.stride(1) == 1 || length <= 1);
  STD_TORCH_CHECK(fits, name, ": expected float32 [", count, ", ", length, "] with contiguous rows");
  return {static_cast<float*>(const_cast<void*>(t.const_data_ptr())), length, t.stride(0)};
}

const float* values_of(const Tensor& t, int64_t numel, const char* name) {
  check_contiguous(t, ScalarType::Float, numel, name);
  return static_cast<const float*>(t.const_data_ptr());
}

// The adapter as the kernels read it.
struct Adapter {
  int64_t rank, in, out;
  const float *a, *b;                // [rank, in], [out, rank]
  std::vector<float> bt;             // Bᵀ [rank, out]
  std::vector<float> scale, lambda;  // c mask, c E mask

  Adapter(const Tensor& lora_A, const Tensor& lora_E, const Tensor& lora_B, const std::optional<Tensor>& mask,
          double scaling)
      : rank(lora_A.size(0)), in(lora_A.size(1)), out(lora_B.size(0)) {
    STD_TORCH_CHECK(lora_A.dim() == 2 && lora_B.dim() == 2, "lora_A, lora_B: expected 2 dimensions");
    a = values_of(lora_A, rank * in, "lora_A");
    b = values_of(lora_B, out * rank, "lora_B");
    const float* e = values_of(lora_E, rank, "lora_E");
    const float* kept = mask ? values_of(*mask, rank, "mask") : nullptr;
    bt.resize(rank * out);
    for (int64_t r = 0; r < rank; ++r)
      for (int64_t n = 0; n < out; ++n) bt[r * out + n] = b[n * rank + r];
    for (int64_t r = 0; r < rank; ++r) {
      const float c = static_cast<float>(scaling), factor = kept == nullptr ? 1.0f : kept[r];
      scale.push_back(c * factor);
      lambda.push_back(e[r] * c * factor);
    }
  }

  void scaled(float* to, const float* from, int64_t rows) const {
    for (int64_t m = 0; m < rows; ++m)
      for (int64_t r = 0; r < rank; ++r) to[m * rank + r] = from[m * rank + r] * lambda[r];
  }
};

float* data_of(Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

int64_t rounded_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

int64_t block_rows(const Adapter& adapter) {
  const int64_t rows = kBlockNumbers / std::max<int64_t>({1, adapter.in, adapter.out});
  return std::clamp(rows / kMinBlockRows * kMinBlockRows, kMinBlockRows, kMaxBlockRows);
}

int64_t slab_rows(int64_t rows, int64_t block) {
  const int64_t few = std::clamp(rounded_up(rows, kSlabs) / kSlabs, kMinSlabRows, kMaxSlabRows);
  return rounded_up(std::max(few, rounded_up(rows, kMaxSlabs) / kMaxSlabs), block);
}

}  // namespace

Tensor lowrank_forward(const Tensor& x, const Tensor& lora_A, const Tensor& lora_E, const Tensor& lora_B,
                       std::optional<Tensor> mask, double scaling, Tensor y) {
  const Adapter adapter(lora_A, lora_E, lora_B, mask, scaling);
  const int64_t m = x.size(0), rank = adapter.rank;
  const Rows in = rows_of(x, m, adapter.in, "x"), out = rows_of(y, m, adapter.out, "y");
  Tensor u = torch::stable::new_empty(x, {m, rank});
  float* products = data_of(u);
  const auto& kernels = ADALORA_KERNELS(lowrank_kernels);
  const int64_t block = block_rows(adapter);
  for_each_item(
      rounded_up(m, block) / block, m * (in.length + out.length) > kThreadedElements,
      [&] { return std::vector<float>(block * rank); },
      [&](int64_t item, std::vector<float>& scaled) {
        const int64_t row = item * block, rows = std::min(block, m - row);
        kernels.project(products + row * rank, in[row], in.stride, rows, adapter.a, rank, in.length);
        adapter.scaled(scaled.data(), products + row * rank, rows);
        kernels.expand(out[row], out.stride, rows, scaled.data(), adapter.bt.data(), rank, out.length, true);
      });
  return u;
}

std::tuple<Tensor, Tensor, Tensor> lowrank_backward(const Tensor& grad_y, const Tensor& x, const Tensor& u,
                                                    const Tensor& lora_A, const Tensor& lora_E, const Tensor& lora_B,
                                                    std::optional<Tensor> mask, double scaling,
                                                    std::optional<Tensor> dx, bool add, bool need_A, bool need_B) {
  const Adapter adapter(lora_A, lora_E, lora_B, mask, scaling);
  const int64_t m = x.size(0), rank = adapter.rank, k = adapter.in, n = adapter.out;
  const Rows g = rows_of(grad_y, m, n, "grad_y"), in = rows_of(x, m, k, "x");
  const Rows out = dx ? rows_of(*dx, m, k, "dx") : Rows{};
  const float* products = values_of(u, m * rank, "u");
  const auto& kernels = ADALORA_KERNELS(lowrank_kernels);

  // Of each slab: its part of dA [rank, k], then of Tᵀ [rank, n].
  const int64_t block = block_rows(adapter), slab = slab_rows(m, block), slabs = rounded_up(m, slab) / slab;
  const int64_t sums_A = need_A ? rank * k : 0, step = sums_A + (need_B ? rank * n : 0);
  Tensor parts = torch::stable::new_empty(x, {slabs, step});
  float* sums = data_of(parts);
  const bool threaded = m * (k + n) > kThreadedElements;
  for_each_item(
      slabs, threaded, [&] { return std::vector<float>(block * rank); },
      [&](int64_t item, std::vector<float>& v) {
        const int64_t begin = item * slab, end = std::min(m, begin + slab);
        float* part = sums + item * step;
        for (int64_t row = begin; row < end; row += block) {
          const int64_t rows = std::min(block, end - row);
          if (need_A || dx) {
            kernels.project(v.data(), g[row], g.stride, rows, adapter.bt.data(), rank, n);
            adapter.scaled(v.data(), v.data(), rows);
          }
          if (need_B)
            kernels.gather(part + sums_A, products + row * rank, g[row], g.stride, rows, rank, n, row > begin);
          if (dx) kernels.expand(out[row], out.stride, rows, v.data(), adapter.a, rank, k, add);
          if (need_A) kernels.gather(part, v.data(), in[row], in.stride, rows, rank, k, row > begin);
        }
      });

  Tensor dA = torch::stable::new_empty(x, {need_A ? rank : 0, k});
  Tensor dB = torch::stable::new_empty(x, {need_B ? n : 0, rank});
  Tensor dE = need_B ? torch::stable::empty_like(lora_E) : torch::stable::new_empty(x, {0});
  const int64_t blocks_A = need_A ? rounded_up(rank * k, kColumns) / kColumns : 0;
  const int64_t blocks_B = need_B ? rounded_up(n, kColumns) / kColumns : 0;
  std::vector<double> slopes(blocks_B * rank);
  float *to_A = data_of(dA), *to_B = data_of(dB), *to_E = data_of(dE);
  for_each_item(
      blocks_A + blocks_B, threaded, [] { return std::vector<float>(kColumns); },
      [&](int64_t item, std::vector<float>& t) {
        if (item < blocks_A) {
          const int64_t begin = item * kColumns, count = std::min(kColumns, rank * k - begin);
          return kernels.sum_slabs(to_A + begin, sums + begin, step, slabs, count);
        }
        const int64_t block = item - blocks_A, begin = block * kColumns, count = std::min(kColumns, n - begin);
        for (int64_t r = 0; r < rank; ++r) {
          kernels.sum_slabs(t.data(), sums + sums_A + r * n + begin, step, slabs, count);
          double slope = 0;
          for (int64_t i = 0; i < count; ++i) {
            slope += static_cast<double>(adapter.bt[r * n + begin + i]) * t[i];
            to_B[(begin + i) * rank + r] = t[i] * adapter.lambda[r];
          }
          slopes[block * rank + r] = slope;
        }
      });
  if (need_B)
    for (int64_t r = 0; r < rank; ++r) {
      double slope = 0;
      for (int64_t block = 0; block < blocks_B; ++block) slope += slopes[block * rank + r];
      to_E[r] = static_cast<float>(slope * adapter.scale[r]);
    }
  return {dA, dE, dB};
}

}  // namespace adalora::cpu
