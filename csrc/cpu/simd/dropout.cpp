#include "cpu/simd/dropout.h"

#include <type_traits>

#include "common/philox.h"
#include "cpu/simd/widen.h"

namespace adalora::cpu::ADALORA_ISA {

namespace {

constexpr int64_t kBlock = 256;

template <typename T>
ADALORA_INLINE T scaled(T value, double scale) { return value * static_cast<T>(scale); }

struct BFloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };
ADALORA_INLINE BFloat16 scaled(BFloat16 value, double scale) {
  return {to_bfloat16(from_bfloat16(value.bits) * static_cast<float>(scale))};
}
ADALORA_INLINE Float16 scaled(Float16 value, double scale) {
  return {to_float16(from_float16(value.bits) * static_cast<float>(scale))};
}

template <typename T>
void drop(T* __restrict out, const T* __restrict in, int64_t stride, int64_t count, uint64_t counter, uint64_t seed,
          uint64_t threshold, double scale) {
  uint32_t words[kBlock];
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t size = count - begin < kBlock ? count - begin : kBlock;
    const uint64_t first = counter + begin;
    for (int64_t i = 0; i < kBlock; ++i) words[i] = philox_word(first + i, seed);
    const T* data = in + begin * stride;
    if (stride == 1) {
      for (int64_t i = 0; i < size; ++i) out[begin + i] = words[i] >= threshold ? scaled(data[i], scale) : T{};
    } else {
      for (int64_t i = 0; i < size; ++i) out[begin + i] = words[i] >= threshold ? scaled(data[i * stride], scale) : T{};
    }
  }
}

void run(void* out, const void* in, DType dtype, int64_t stride, int64_t count, uint64_t counter, uint64_t seed,
         uint64_t threshold, double scale) {
  const auto call = [=](auto* typed) {
    using T = std::remove_pointer_t<decltype(typed)>;
    drop(typed, static_cast<const T*>(in), stride, count, counter, seed, threshold, scale);
  };
  switch (dtype) {
    case DType::kFloat32: return call(static_cast<float*>(out));
    case DType::kFloat64: return call(static_cast<double*>(out));
    case DType::kBFloat16: return call(static_cast<BFloat16*>(out));
    case DType::kFloat16: return call(static_cast<Float16*>(out));
  }
}

}  // namespace

extern const DropoutKernels dropout_kernels;
const DropoutKernels dropout_kernels = {run};

}  // namespace adalora::cpu::ADALORA_ISA
