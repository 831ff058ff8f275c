#include "cpu/simd/lowrank.h"

#include "cpu/simd/vec.h"

namespace adalora::cpu::ADALORA_ISA {

namespace {

using V = Vec<float>;
constexpr int kWidth = kLanes<float>;
constexpr int kRows = 4;

// Accumulators per tile: as many as leave registers for the operands, of 32 or of 16.
#if defined(__AVX512F__)
constexpr int kDots = 6;       // ranks of one kRows × ranks tile
constexpr int kGathered = 12;  // ranks of one ranks × kPair vectors tile
constexpr int kSpread = 4;     // vectors of one kRows × vectors tile
#else
constexpr int kDots = 3;
constexpr int kGathered = 6;
constexpr int kSpread = 2;
#endif
constexpr int kPair = 2;
constexpr int64_t kPiece = 1024;  // numbers of a row per dot product
constexpr int kAhead = 128;       // numbers of a row from use to prefetch

// out (+)= value, of which the first `count` numbers unless it is Whole. Sums are added in one go, so that they are
// rounded once to the size of what is there.
template <bool Whole>
ADALORA_INLINE void put(float* out, V value, int64_t count, bool add) {
  if constexpr (Whole) {
    store(out, add ? load(out) + value : value);
  } else {
    for (int l = 0; l < kWidth; ++l)
      if (l < count) out[l] = add ? out[l] + value[l] : value[l];
  }
}

// sums[i] = the sum of the lanes of the i-th of four registers.
ADALORA_INLINE void sum_lanes(float (&sums)[4], V a, V b, V c, V d) {
#if defined(__AVX512F__)
  // The masked forms, whole as the mask is: GCC warns of the undefined operand in its own unmasked ones.
  const auto halves = [](V p, V q) {
    return (V)_mm512_add_ps(_mm512_maskz_shuffle_f32x4(0xffff, (__m512)p, (__m512)q, 0x44),
                            _mm512_maskz_shuffle_f32x4(0xffff, (__m512)p, (__m512)q, 0xee));
  };
  const __m512 ab = (__m512)halves(a, b), cd = (__m512)halves(c, d);
  __m512 t = _mm512_add_ps(_mm512_maskz_shuffle_f32x4(0xffff, ab, cd, 0x88),
                           _mm512_maskz_shuffle_f32x4(0xffff, ab, cd, 0xdd));
  t = _mm512_add_ps(t, _mm512_maskz_permute_ps(0xffff, t, 0x4e));
  t = _mm512_add_ps(t, _mm512_maskz_permute_ps(0xffff, t, 0xb1));
  const V spread = (V)t;
  for (int i = 0; i < 4; ++i) sums[i] = spread[4 * i];
#elif defined(__AVX2__)
  const __m256 t = _mm256_hadd_ps(_mm256_hadd_ps((__m256)a, (__m256)b), _mm256_hadd_ps((__m256)c, (__m256)d));
  _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1)));
#else
  const V registers[4] = {a, b, c, d};
  for (int i = 0; i < 4; ++i) {
    sums[i] = 0;
    for (int l = 0; l < kWidth; ++l) sums[i] += registers[i][l];
  }
#endif
}

// Rows × Ranks products of `count` numbers of rows and of rows of the factor, vectors along k. Rows is 1 or 4.
template <int Rows, int Ranks>
void project_tile(float* out, const float* in, int64_t stride, const float* factor, int64_t rank, int64_t length,
                  int64_t count, bool add) {
  V acc[Rows][Ranks] = {};
  int64_t k = 0;
  for (; k + kWidth <= count; k += kWidth) {
    V right[Ranks];
#pragma GCC unroll 8
    for (int j = 0; j < Ranks; ++j) right[j] = load(factor + j * length + k);
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) {
      const V left = load(in + i * stride + k);
#pragma GCC unroll 8
      for (int j = 0; j < Ranks; ++j) acc[i][j] = multiply_add(left, right[j], acc[i][j]);
    }
  }
  if (k < count)
    for (int i = 0; i < Rows; ++i) {
      const V left = load_first(in + i * stride + k, count - k);
      for (int j = 0; j < Ranks; ++j)
        acc[i][j] = multiply_add(left, load_first(factor + j * length + k, count - k), acc[i][j]);
    }
#pragma GCC unroll 8
  for (int j = 0; j < Ranks; ++j) {
    float sums[4];
    if constexpr (Rows == 4) {
      sum_lanes(sums, acc[0][j], acc[1][j], acc[2][j], acc[3][j]);
    } else {
      sum_lanes(sums, acc[0][j], V{}, V{}, V{});
    }
    for (int i = 0; i < Rows; ++i) out[i * rank + j] = add ? out[i * rank + j] + sums[i] : sums[i];
  }
}

template <int Ranks>
void project_ranks(float* out, const float* in, int64_t stride, int64_t rows, const float* factor, int64_t rank,
                   int64_t length, int64_t count, bool add) {
  int64_t m = 0;
  for (; m + kRows <= rows; m += kRows)
    project_tile<kRows, Ranks>(out + m * rank, in + m * stride, stride, factor, rank, length, count, add);
  for (; m < rows; ++m)
    project_tile<1, Ranks>(out + m * rank, in + m * stride, stride, factor, rank, length, count, add);
}

// Calls run<n>() for the n that is `count`, at most Most.
template <int Most, typename Run>
ADALORA_INLINE void with_count(int64_t count, const Run& run) {
  if constexpr (Most > 1) {
    if (count < Most) return with_count<Most - 1>(count, run);
  }
  run.template operator()<Most>();
}

// Calls run<ranks>(begin) for blocks of at most Most ranks, as few and as alike as can be.
template <int Most, typename Run>
ADALORA_INLINE void in_rank_blocks(int64_t rank, const Run& run) {
  const int64_t blocks = (rank + Most - 1) / Most;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t begin = block * rank / blocks, end = (block + 1) * rank / blocks;
    with_count<Most>(end - begin, [&]<int Ranks>() { run.template operator()<Ranks>(begin); });
  }
}

// Pieces keep the factor in the L1 cache, and the sums short against rounding.
void project(float* out, const float* in, int64_t stride, int64_t rows, const float* factor, int64_t rank,
             int64_t length) {
  in_rank_blocks<kDots>(rank, [&]<int Ranks>(int64_t r) {
    for (int64_t k = 0; k < length; k += kPiece)
      project_ranks<Ranks>(out + r, in + k, stride, rows, factor + r * length + k, rank, length,
                           length - k < kPiece ? length - k : kPiece, k > 0);
  });
}

// Ranks × Vectors registers of the sums over the rows; `count` numbers of them where that is less.
template <int Ranks, int Vectors, bool Whole>
ADALORA_INLINE void gather_tile(float* out, const float* coefficients, const float* in, int64_t stride, int64_t rows,
                                int64_t rank, int64_t length, bool add, int64_t count) {
  V acc[Ranks][Vectors] = {};
  for (int64_t m = 0; m < rows; ++m) {
    V row[Vectors];
    // Across short rows the hardware sees no stream to follow.
    if (Whole)
      for (int w = 0; w < Vectors; ++w) __builtin_prefetch(in + m * stride + kAhead + w * kWidth);
#pragma GCC unroll 2
    for (int w = 0; w < Vectors; ++w)
      row[w] = Whole ? load(in + m * stride + w * kWidth) : load_first(in + m * stride, count);
#pragma GCC unroll 16
    for (int r = 0; r < Ranks; ++r) {
      const V factor = V{} + coefficients[m * rank + r];
#pragma GCC unroll 2
      for (int w = 0; w < Vectors; ++w) acc[r][w] = multiply_add(factor, row[w], acc[r][w]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < Ranks; ++r)
#pragma GCC unroll 2
    for (int w = 0; w < Vectors; ++w)
      put<Whole>(out + r * length + w * kWidth, acc[r][w], count, add);
}

template <int Ranks>
void gather_ranks(float* out, const float* coefficients, const float* in, int64_t stride, int64_t rows, int64_t rank,
                  int64_t length, bool add) {
  int64_t k = 0;
  for (; k + kPair * kWidth <= length; k += kPair * kWidth)
    gather_tile<Ranks, kPair, true>(out + k, coefficients, in + k, stride, rows, rank, length, add, 0);
  for (; k < length; k += kWidth)
    gather_tile<Ranks, 1, false>(out + k, coefficients, in + k, stride, rows, rank, length, add, length - k);
}

void gather(float* out, const float* coefficients, const float* in, int64_t stride, int64_t rows, int64_t rank,
            int64_t length, bool add) {
  in_rank_blocks<kGathered>(rank, [&]<int Ranks>(int64_t r) {
    gather_ranks<Ranks>(out + r * length, coefficients + r, in, stride, rows, rank, length, add);
  });
}

// Rows × Vectors registers of the result; `count` numbers of a row where that is less.
template <int Rows, int Vectors, bool Whole>
ADALORA_INLINE void expand_tile(float* out, int64_t stride, const float* coefficients, const float* factor,
                                int64_t rank, int64_t length, bool add, int64_t count) {
  V acc[Rows][Vectors] = {};
  // What the result is added to is read last: on its way meanwhile.
  if (Whole && add)
    for (int i = 0; i < Rows; ++i)
      for (int w = 0; w < Vectors; ++w) __builtin_prefetch(out + i * stride + kAhead + w * kWidth);
  for (int64_t r = 0; r < rank; ++r) {
    V row[Vectors];
#pragma GCC unroll 4
    for (int w = 0; w < Vectors; ++w)
      row[w] = Whole ? load(factor + r * length + w * kWidth) : load_first(factor + r * length, count);
#pragma GCC unroll 4
    for (int i = 0; i < Rows; ++i) {
      const V coefficient = V{} + coefficients[i * rank + r];
#pragma GCC unroll 4
      for (int w = 0; w < Vectors; ++w) acc[i][w] = multiply_add(coefficient, row[w], acc[i][w]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int w = 0; w < Vectors; ++w)
      put<Whole>(out + i * stride + w * kWidth, acc[i][w], count, add);
}

template <int Rows>
void expand_rows(float* out, int64_t stride, const float* coefficients, const float* factor, int64_t rank,
                 int64_t length, bool add) {
  int64_t k = 0;
  for (; k + kSpread * kWidth <= length; k += kSpread * kWidth)
    expand_tile<Rows, kSpread, true>(out + k, stride, coefficients, factor + k, rank, length, add, 0);
  for (; k + kWidth <= length; k += kWidth)
    expand_tile<Rows, 1, true>(out + k, stride, coefficients, factor + k, rank, length, add, 0);
  if (k < length) expand_tile<Rows, 1, false>(out + k, stride, coefficients, factor + k, rank, length, add, length - k);
}

void expand(float* out, int64_t stride, int64_t rows, const float* coefficients, const float* factor, int64_t rank,
            int64_t length, bool add) {
  int64_t m = 0;
  for (; m + kRows <= rows; m += kRows)
    expand_rows<kRows>(out + m * stride, stride, coefficients + m * rank, factor, rank, length, add);
  for (; m < rows; ++m) expand_rows<1>(out + m * stride, stride, coefficients + m * rank, factor, rank, length, add);
}

void sum_slabs(float* out, const float* slabs, int64_t step, int64_t count, int64_t length) {
  for (int64_t i = 0; i < length; ++i) out[i] = 0;
  for (int64_t s = 0; s < count; ++s)
    for (int64_t i = 0; i < length; ++i) out[i] += slabs[s * step + i];
}

}  // namespace

extern const LowRankKernels lowrank_kernels;
const LowRankKernels lowrank_kernels = {project, gather, expand, sum_slabs};

}  // namespace adalora::cpu::ADALORA_ISA
