#include "cpu/simd/orthogonality.h"

#include "cpu/simd/vec.h"
#include "cpu/simd/widen.h"

namespace adalora::cpu::ADALORA_ISA {

namespace {

constexpr int kTile = 4;         // rows of A against rows of A
constexpr int kRows = 8;         // rows of B · D at a time
constexpr int kGathered = 4;     // rows of Bᵀ B come in so many, up to kMostGathered at a time
constexpr int kMostGathered = 12;
constexpr int64_t kFold = 1024;  // rows of B summed in T before they go on in fp64,
constexpr int64_t kStep = 64;    // in steps of so many rows, against rounding

// C[i, j] += Σ_k A[i, k] A[j, k] for one kTile × kTile tile, vectors along k.
template <typename T>
ADALORA_INLINE void gram_tile(const T* const* left, const T* const* right, int64_t count, double (&c)[kTile][kTile],
                              Ahead& ahead) {
  constexpr int lanes = kLanes<T>;
  Vec<T> acc[kTile][kTile] = {};
  int64_t k = 0;
  for (; k + lanes <= count; k += lanes) {
    if (k % kStep == 0) ahead.step();
    Vec<T> r[kTile];
    for (int j = 0; j < kTile; ++j) r[j] = load(right[j] + k);
    for (int i = 0; i < kTile; ++i) {
      const Vec<T> l = load(left[i] + k);
      for (int j = 0; j < kTile; ++j) acc[i][j] = multiply_add(l, r[j], acc[i][j]);
    }
  }
  if (k < count) {
    for (int i = 0; i < kTile; ++i) {
      const Vec<T> l = load_first(left[i] + k, count - k);
      for (int j = 0; j < kTile; ++j) acc[i][j] += l * load_first(right[j] + k, count - k);
    }
  }
  for (int i = 0; i < kTile; ++i)
    for (int j = 0; j < kTile; ++j) c[i][j] = sum<T>(acc[i][j]);
}

template <typename T>
void gram_rows(const T* a, int64_t rank, int64_t length, const T* zeros, double* gram, Ahead ahead) {
  const int64_t tiles = (rank + kTile - 1) / kTile;
  ahead.pace(tiles * (tiles + 1) / 2 * length / kStep);
  for (int64_t i = 0; i < rank * rank; ++i) gram[i] = 0;
  for (int64_t begin = 0; begin < length; begin += kRowBlock) {
    const int64_t count = length - begin < kRowBlock ? length - begin : kRowBlock;
    const auto row = [=](int64_t i) { return i < rank ? a + i * length + begin : zeros; };
    for (int64_t i0 = 0; i0 < rank; i0 += kTile) {
      const T* left[kTile] = {row(i0), row(i0 + 1), row(i0 + 2), row(i0 + 3)};
      for (int64_t j0 = i0; j0 < rank; j0 += kTile) {
        const T* right[kTile] = {row(j0), row(j0 + 1), row(j0 + 2), row(j0 + 3)};
        double c[kTile][kTile];
        gram_tile<T>(left, right, count, c, ahead);
        for (int64_t i = 0; i < kTile && i0 + i < rank; ++i)
          for (int64_t j = 0; j < kTile && j0 + j < rank; ++j) gram[(i0 + i) * rank + j0 + j] += c[i][j];
      }
    }
  }
}

// Rows of B from `begin` on of which a whole register may be read at any multiple of the lanes below the rank.
template <typename T>
ADALORA_INLINE int64_t readable_rows(int64_t rank, int64_t length) {
  const int64_t reach = (rank + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
  const int64_t wide = reach > (rank + kRows - 1) / kRows * kRows ? reach : (rank + kRows - 1) / kRows * kRows;
  const int64_t last = length * rank - wide;
  return last < 0 ? 0 : last / rank + 1;
}

// C[i, j…] += Σ_n B[n, i] B[n, j…] for Rows rows from i0 and one vector from j0 on. Lanes and rows past the rank hold
// what follows in memory: dropped.
template <typename T, int Rows>
ADALORA_INLINE void gram_block(const T* b, int64_t rank, int64_t safe, int64_t begin, int64_t end, int64_t i0,
                               int64_t j0, double* gram, Ahead& ahead) {
  const int64_t whole = end < safe ? end : safe;
  Vec<T> acc[Rows] = {};
  int64_t n = begin;
  while (n < whole) {
    const int64_t stop = n + kStep < whole ? n + kStep : whole;
    Vec<T> part[Rows] = {};
    ahead.step();
    for (; n < stop; ++n) {
      const Vec<T> row = load(b + n * rank + j0);
      for (int i = 0; i < Rows; ++i) part[i] = multiply_add(splat(b[n * rank + i0 + i]), row, part[i]);
    }
    for (int i = 0; i < Rows; ++i) acc[i] += part[i];
  }
  for (; n < end; ++n) {
    const Vec<T> row = load_first(b + n * rank + j0, rank - j0);
    for (int i = 0; i < Rows; ++i)
      if (i0 + i < rank) acc[i] += b[n * rank + i0 + i] * row;
  }
  for (int64_t i = 0; i < Rows && i0 + i < rank; ++i)
    for (int64_t j = 0; j < kLanes<T> && j0 + j < rank; ++j) gram[(i0 + i) * rank + j0 + j] += acc[i][j];
}

// C[i, j…] += Σ_n B[n, i] B[n, j…] for the rows n of a slab, vectors along j.
template <typename T>
ADALORA_INLINE void gram_slab(const T* b, int64_t rank, int64_t safe, int64_t begin, int64_t end, double* gram,
                              Ahead& ahead) {
  constexpr int lanes = kLanes<T>;
  for (int64_t i0 = 0; i0 < rank;) {
    const int64_t left = (rank - i0 + kGathered - 1) / kGathered * kGathered;
    const int64_t rows = left < kMostGathered ? left : kMostGathered;
    for (int64_t j0 = i0 / lanes * lanes; j0 < rank; j0 += lanes) {
      switch (rows) {
        case 4: gram_block<T, 4>(b, rank, safe, begin, end, i0, j0, gram, ahead); break;
        case 8: gram_block<T, 8>(b, rank, safe, begin, end, i0, j0, gram, ahead); break;
        default: gram_block<T, kMostGathered>(b, rank, safe, begin, end, i0, j0, gram, ahead);
      }
    }
    i0 += rows;
  }
}

// How many blocks a slab has.
template <typename T>
ADALORA_INLINE int64_t gram_blocks(int64_t rank) {
  constexpr int lanes = kLanes<T>;
  int64_t blocks = 0;
  for (int64_t i0 = 0; i0 < rank; i0 += kMostGathered) blocks += (rank - i0 / lanes * lanes + lanes - 1) / lanes;
  return blocks;
}

template <typename T>
void gram_columns(const T* b, int64_t rank, int64_t length, double* gram, Ahead ahead) {
  ahead.pace(gram_blocks<T>(rank) * (length / kStep));
  for (int64_t i = 0; i < rank * rank; ++i) gram[i] = 0;
  const int64_t safe = readable_rows<T>(rank, length);
  for (int64_t begin = 0; begin < length; begin += kFold)
    gram_slab<T>(b, rank, safe, begin, begin + kFold < length ? begin + kFold : length, gram, ahead);
}

// out[i, k…] (+)= Σ_j D[i, j] A[j, k…], kTile rows and two vectors along k at a time.
template <typename T, bool Add>
void times_rows(const T* d, const T* a, int64_t rank, int64_t length, T* out, Ahead ahead) {
  constexpr int lanes = kLanes<T>, kWide = 2;
  ahead.pace((rank + kTile - 1) / kTile * (length / (kWide * lanes)));
  const int64_t stride = padded(rank);
  int64_t k = 0;
  for (; k + kWide * lanes <= length; k += kWide * lanes) {
    for (int64_t i0 = 0; i0 < rank; i0 += kTile) {
      ahead.step();
      Vec<T> acc[kTile][kWide] = {};
      for (int64_t j = 0; j < rank; ++j) {
        const Vec<T> first = load(a + j * length + k), second = load(a + j * length + k + lanes);
        for (int i = 0; i < kTile; ++i) {
          const T factor = d[j * stride + i0 + i];
          acc[i][0] = multiply_add(splat(factor), first, acc[i][0]);
          acc[i][1] = multiply_add(splat(factor), second, acc[i][1]);
        }
      }
      for (int64_t i = 0; i < kTile && i0 + i < rank; ++i)
        for (int w = 0; w < kWide; ++w) {
          T* place = out + (i0 + i) * length + k + w * lanes;
          store(place, Add ? load(place) + acc[i][w] : acc[i][w]);
        }
    }
  }
  for (int64_t i = 0; i < rank; ++i)
    for (int64_t l = k; l < length; ++l) {
      double total = 0;
      for (int64_t j = 0; j < rank; ++j) total += static_cast<double>(d[j * stride + i]) * a[j * length + l];
      T& place = out[i * length + l];
      place = static_cast<T>(Add ? place + total : total);
    }
}

// out[n, j…] (+)= Σ_i B[n, i] D[i, j…], kRows rows at a time. A whole register is written at the end of a row too: what
// it leaves in the next row, written after it, was there before or is put right; so the last rows are written number by
// number.
template <typename T, bool Add>
void times_columns(const T* d, const T* b, int64_t rank, int64_t length, T* out, Ahead ahead) {
  constexpr int lanes = kLanes<T>;
  ahead.pace(length / kRows);
  const int64_t stride = padded(rank);
  const int64_t safe = readable_rows<T>(rank, length);
  int64_t n = 0;
  if (rank <= lanes) {
    for (; n + kRows <= safe; n += kRows) {
      ahead.step();
      Vec<T> acc[kRows] = {};
      for (int64_t i = 0; i < rank; ++i) {
        const Vec<T> row = load(d + i * stride);
        for (int t = 0; t < kRows; ++t) acc[t] = multiply_add(splat(b[(n + t) * rank + i]), row, acc[t]);
      }
      if constexpr (Add) {
        // All are read before one is written. D is 0 past the rank, so there the sum is what was there.
        for (int t = 0; t < kRows; ++t) acc[t] += load(out + (n + t) * rank);
      }
      for (int t = 0; t < kRows; ++t) store(out + (n + t) * rank, acc[t]);
    }
  } else {
    // The last vector of a row ends with it and overlaps the one before, so nothing is written past the row.
    for (; n + kRows <= length; n += kRows) {
      ahead.step();
      const int64_t whole = rank / lanes * lanes;
      for (int64_t j0 = 0; j0 < rank; j0 += lanes) {
        const int64_t j = j0 + lanes <= rank ? j0 : rank - lanes;
        Vec<T> acc[kRows] = {};
        for (int64_t i = 0; i < rank; ++i) {
          const Vec<T> row = load(d + i * stride + j);
          for (int t = 0; t < kRows; ++t) acc[t] = multiply_add(splat(b[(n + t) * rank + i]), row, acc[t]);
        }
        for (int t = 0; t < kRows; ++t) {
          T* place = out + (n + t) * rank + j;
          if constexpr (Add) {
            // What the vector before this one has added already stays out of it.
            if (j0 >= whole)
              for (int l = 0; l < static_cast<int>(j0 - j); ++l) acc[t][l] = 0;
            acc[t] += load(place);
          }
          store(place, acc[t]);
        }
      }
    }
  }
  for (; n < length; ++n)
    for (int64_t j = 0; j < rank; ++j) {
      double total = 0;
      for (int64_t i = 0; i < rank; ++i) total += static_cast<double>(b[n * rank + i]) * d[i * stride + j];
      T& place = out[n * rank + j];
      place = static_cast<T>(Add ? place + total : total);
    }
}

template <typename T>
void times(bool columns, bool add, const T* d, const T* matrix, int64_t rank, int64_t length, T* out, Ahead ahead) {
  if (columns) {
    (add ? times_columns<T, true> : times_columns<T, false>)(d, matrix, rank, length, out, ahead);
  } else {
    (add ? times_rows<T, true> : times_rows<T, false>)(d, matrix, rank, length, out, ahead);
  }
}

}  // namespace

extern const OrthogonalityKernels orthogonality_kernels;
const OrthogonalityKernels orthogonality_kernels = {
    {gram_rows<float>, gram_columns<float>, times<float>, widen<float>, narrow<float>},
    {gram_rows<double>, gram_columns<double>, times<double>, widen<double>, narrow<double>},
};

}  // namespace adalora::cpu::ADALORA_ISA
