// The importance sweep on a GPU, as seen by its host code: no PyTorch here, so that nvcc compiles the kernels quickly.
#pragma once

#include <cstdint>
#include <vector>

#include "common/dtype.h"
#include "common/importance.h"
#include "cuda/handover.h"
#include "cuda/launch.h"

namespace adalora::cuda {

// One layer with R > 0. Parts: 0 is A, 1 is E, 2 is B.
struct Layer {
  const void* param[3];
  const void* grad[3];  // null: the averages are carried over as they are
  int64_t offset;       // of A in the averages; E and B follow
  int32_t r, k, n;
  int32_t rank_offset;  // of its triplets in the scores
  int32_t sums;         // of its partial sums: [R, pieces] of A, [R] of E, [slabs, R] of B
  int32_t block;        // its first block of the launch
  int32_t number;       // of the layer in the model
  int32_t left;         // of its sums in what is handed over
  uint8_t param_dtype[3], grad_dtype[3];
  bool known[3];        // whether a backward has left these gradients, as far as the host knows
};

// So many layers that a launch's parameters stay well under the limit of 32,764 bytes (CUDA 12.1 on, driver 530 on).
constexpr int kLayersPerLaunch = 240;

struct Layers {
  int32_t count, blocks;
  Layer layer[kLayersPerLaunch];
};

template <typename T>
struct Update {
  T* state;  // [2, 2, elements]
  int32_t* half;
  T* scores;
  int64_t elements;
  T* sums;          // partial sums of all layers
  uint8_t* finite;  // of each block of all launches
  int32_t blocks;   // of all launches
  bool* taken;
  Handover handover;
  Smoothing<T> smoothing;
};

static_assert(sizeof(Layers) + sizeof(Update<double>) + 64 < 32764);

constexpr int kThreads = 256;
constexpr int kUnits = kThreads / 32;       // warps of a block, each with a piece of a row of A
constexpr int32_t kPieceElements = 2048;    // of A; a multiple of kPositions, as the rows of a slab are
constexpr int32_t kSlabElements = 16384;    // of B

ADALORA_INLINE int32_t divide_up(int32_t a, int32_t b) { return (a + b - 1) / b; }
ADALORA_INLINE int32_t pieces(const Layer& layer) { return divide_up(layer.k, kPieceElements); }
ADALORA_INLINE int32_t row_blocks(const Layer& layer) { return divide_up(layer.r * pieces(layer), kUnits); }
ADALORA_INLINE int32_t slab_rows(const Layer& layer) {
  return layer.r * kPositions < kSlabElements ? kSlabElements / layer.r / kPositions * kPositions : kPositions;
}
ADALORA_INLINE int32_t slabs(const Layer& layer) { return divide_up(layer.n, slab_rows(layer)); }
// Blocks of a layer: of A's rows, one of E, of B's slabs.
ADALORA_INLINE int32_t blocks_of(const Layer& layer) { return row_blocks(layer) + 1 + slabs(layer); }
ADALORA_INLINE int32_t sums_of(const Layer& layer) { return layer.r * (pieces(layer) + 1 + slabs(layer)); }

// Sweeps all launches, then commits the scores and flips the half. Every layer list but an only one holds a layer.
// Gradients that are known and are still what their probes say were taken by their backward, from the half that is
// still current: of them only the sums are read.
template <typename T>
cudaError_t importance_update(const std::vector<Layers>& launches, const Update<T>& update, cudaStream_t stream);

}  // namespace adalora::cuda
