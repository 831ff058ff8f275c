// The stage that finishes a layer's gradients and updates its importance, as seen by its host code.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/importance.h"
#include "cuda/handover.h"
#include "cuda/launch.h"

namespace adalora::cuda {

// Parts: 0 is A, 1 is E, 2 is B. Matrices are contiguous, of 16 or 32 bits.
struct Finish {
  const float *t_shares, *a_shares;   // [slabs_t, N, rank_padded] of T, [slabs_a, K, rank_padded] of dAᵀ
  int32_t slabs_t, slabs_a, rank_padded;
  int32_t r, k, n;
  const void* param[3];
  const void* before[3];              // the gradients that were there; null: none
  void* grad[3];                      // written
  uint8_t dtype[3];                   // of a parameter and its gradients
  const float* mask;                  // [R]; null: all ones
  float scaling;
  const float* slopes[3];             // [R, R] of A, nothing, of B: the orthogonality term's; null: there is none
  const float* scale;                 // one element, of the slopes
  float* state;                       // [2, 2, elements]
  const int32_t* half;
  int64_t elements, offset;           // of the state; of this layer's A in it
  float *sums, *probes;               // of this layer in what is handed over
  float* column_sums;                 // [blocks of B, R], for this launch
  int32_t* ticket;                    // 0, and again afterwards
  Smoothing<float> smoothing;
};

constexpr int kFinishThreads = 128;

// A thread takes a slot of one triplet; so many slots a block takes.
ADALORA_INLINE int32_t slots_per_block(int32_t r) { return kFinishThreads / r; }
ADALORA_INLINE int32_t finish_blocks(int32_t positions, int32_t r) {
  return (slots(positions) + slots_per_block(r) - 1) / slots_per_block(r);
}

// R from 1 to kFinishThreads.
cudaError_t finish(const Finish& layer, cudaStream_t stream);

}  // namespace adalora::cuda
