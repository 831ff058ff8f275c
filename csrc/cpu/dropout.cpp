// Dropout with a mask that is a function of seed and element (csrc/common/philox.h): element (m, k) of x [M, K] is
// dropped iff its word is below round(p 2³²). Reads x and writes the result once; the ten rounds, not memory, set the
// pace.
#include <algorithm>

#include "cpu/ops.h"
#include "cpu/parallel.h"
#include "cpu/simd/dropout.h"

namespace adalora::cpu {

namespace {

constexpr int64_t kItemElements = 16384;

DType dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::Double: return DType::kFloat64;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    default: STD_TORCH_CHECK(false, "x: expected float32, float64, bfloat16 or float16");
  }
}

}  // namespace

Tensor dropout(const Tensor& x, int64_t threshold, double scale, const Tensor& seed) {
  STD_TORCH_CHECK(x.dim() == 2, "x: expected 2 dimensions, got ", x.dim());
  check_contiguous(seed, ScalarType::Long, 1, "seed");
  const DType dtype = dtype_of(x.scalar_type());
  const int64_t m = x.size(0), k = x.size(1), size = size_of(dtype), stride_m = x.stride(0), stride_k = x.stride(1);
  Tensor out = torch::stable::new_empty(x, {m, k});
  if (threshold > 0xffffffff) return torch::stable::zero_(out);
  const char* in = static_cast<const char*>(x.const_data_ptr());
  char* result = static_cast<char*>(out.mutable_data_ptr());
  const uint64_t key = static_cast<uint64_t>(*static_cast<const int64_t*>(seed.const_data_ptr()));
  const auto run = ADALORA_KERNELS(dropout_kernels).run;
  const int64_t rows = std::max<int64_t>(1, kItemElements / std::max<int64_t>(1, k));
  for_each_item((m + rows - 1) / rows, m * k > kItemElements, [] { return 0; }, [&](int64_t item, int) {
    for (int64_t row = item * rows; row < std::min(m, (item + 1) * rows); ++row)
      run(result + row * k * size, in + row * stride_m * size, dtype, stride_k, k, row * k, key,
          static_cast<uint32_t>(threshold), scale);
  });
  return out;
}

}  // namespace adalora::cpu
