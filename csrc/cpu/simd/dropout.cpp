#include "cpu/simd/dropout.h"

#include "common/philox.h"
#include "cpu/simd/vec.h"
#include "cpu/simd/widen.h"

namespace adalora::cpu::ADALORA_ISA {

namespace {

constexpr int64_t kBlock = 256;
constexpr int kChains = 4;  // independent registers in flight, against the latency of the products

// words[i] = philox_word(first + i, seed). A lane is 64 bits wide, of which the upper half is never read but by the
// shifts of the products.
void fill_words(uint32_t (&words)[kBlock], uint64_t first, uint64_t seed) {
  using V = Vec<uint64_t>;
  constexpr int lanes = kLanes<uint64_t>;
  V steps;
  for (int l = 0; l < lanes; ++l) steps[l] = l;
  const V multiplier0 = V{} + kPhiloxMultiplier0, multiplier1 = V{} + kPhiloxMultiplier1;
  for (int64_t i = 0; i < kBlock; i += kChains * lanes) {
    V c0[kChains], c1[kChains], c2[kChains] = {}, c3[kChains] = {};
    for (int j = 0; j < kChains; ++j) {
      c0[j] = steps + (first + i + j * lanes);
      c1[j] = c0[j] >> 32;
    }
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      for (int j = 0; j < kChains; ++j) {
        const V product0 = multiply_low(c0[j], multiplier0), product1 = multiply_low(c2[j], multiplier1);
        c0[j] = (product1 >> 32) ^ c1[j] ^ uint64_t{k0};
        c1[j] = product1;
        c2[j] = (product0 >> 32) ^ c3[j] ^ uint64_t{k1};
        c3[j] = product0;
      }
      k0 += kPhiloxWeyl0;
      k1 += kPhiloxWeyl1;
    }
    for (int j = 0; j < kChains; ++j)
      for (int l = 0; l < lanes; ++l) words[i + j * lanes + l] = static_cast<uint32_t>(c0[j][l]);
  }
}

template <typename T>
void gather(void* out, const void* in, int64_t stride, int64_t count) {
  for (int64_t i = 0; i < count; ++i) static_cast<T*>(out)[i] = static_cast<const T*>(in)[i * stride];
}

// A block of at most kBlock elements. T is the dtype of the product: float for all but double.
template <typename T>
ADALORA_INLINE void drop(void* out, const void* in, DType dtype, int64_t count, const uint32_t (&words)[kBlock],
                         uint32_t limit, T scale) {
  T read[kBlock], kept[kBlock];
  const T* data = widened(in, dtype, 0, count, read);
  const bool direct = dtype == dtype_of<T>::value;
  T* __restrict result = direct ? static_cast<T*>(out) : kept;
  for (int64_t i = 0; i < count; ++i) result[i] = words[i] >= limit ? data[i] * scale : T{0};
  if (!direct) narrow(out, dtype, result, count);
}

void run(void* out, const void* in, DType dtype, int64_t stride, int64_t count, uint64_t counter, uint64_t seed,
         uint32_t limit, double scale) {
  const int64_t size = size_of(dtype);
  uint32_t words[kBlock];
  double gathered[kBlock];
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t length = count - begin < kBlock ? count - begin : kBlock;
    const void* data = static_cast<const char*>(in) + begin * stride * size;
    void* result = static_cast<char*>(out) + begin * size;
    if (stride != 1) {
      (size == 8 ? gather<uint64_t> : size == 4 ? gather<uint32_t> : gather<uint16_t>)(gathered, data, stride, length);
      data = gathered;
    }
    fill_words(words, counter + begin, seed);
    if (dtype == DType::kFloat64) {
      drop<double>(result, data, dtype, length, words, limit, scale);
    } else {
      drop<float>(result, data, dtype, length, words, limit, static_cast<float>(scale));
    }
  }
}

}  // namespace

extern const DropoutKernels dropout_kernels;
const DropoutKernels dropout_kernels = {run};

}  // namespace adalora::cpu::ADALORA_ISA
