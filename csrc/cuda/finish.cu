// The last stage of a layer's backward, with importance: add what each slab of rows left of the gradients, and update Ī
// and Ū while these are in registers.
//     dA = Σ_s dA_s,   T = Σ_s T_s,   dB = T ⊙ λ,   dE = c · mask ⊙ colsum(B ⊙ T)
// A thread takes 8 columns of A or rows of B of one triplet: in A a sector of its own, in B one after the other, where
// neighbours take the neighbouring triplets. So no sum of s crosses threads. What is read are the shares once, and for
// each element θ, Ī, Ū; what is written are the gradient, Ī, Ū, and a sum of s for every 8 elements.
// The last block of B's adds up the column sums of all, in a fixed order, and finishes dE: bitwise repeatable. With
// gradients of the same bits Ī and Ū get the bits that the launch before the step gives them (cuda/importance.cu).
// No GPU has run this yet. It is compiled for three, and tests/csrc runs it on a CPU (emulated/cuda_runtime.h).
#include "cuda/finish.h"

#include "cuda/elements.h"

namespace adalora::cuda {

namespace {

// What is read of an element: all of it before anything is written, so that the loads go side by side.
struct Element {
  uint32_t theta, before;  // bits
  float average, uncertainty;
};

// One of the three parameters, at one triplet. A is [R, K], B is [N, R].
template <int kPart>
struct Part {
  int32_t length, triplet, rank;
  uint8_t dtype;
  int64_t stride, first;  // from one position to the next, and where the triplet begins
  const void *param, *before;
  void* grad;
  float* probes;
  Averages<float> averages;

  __device__ Part(const Finish& layer, int32_t triplet)
      : length(kPart == 0 ? layer.k : kPart == 1 ? layer.r : layer.n),
        triplet(triplet),
        rank(layer.r),
        dtype(layer.dtype[kPart]),
        stride(kPart == 2 ? layer.r : 1),
        first(kPart == 0 ? static_cast<int64_t>(triplet) * layer.k : kPart == 1 ? 0 : triplet),
        param(layer.param[kPart]),
        before(layer.before[kPart]),
        grad(layer.grad[kPart]),
        probes(layer.probes + kPart * kProbes),
        averages(layer.state, layer.half, layer.elements, offset_of(layer)) {}

  __device__ static int64_t offset_of(const Finish& layer) {
    const int64_t a = static_cast<int64_t>(layer.r) * layer.k;
    return layer.offset + (kPart == 0 ? 0 : kPart == 1 ? a : a + layer.r);
  }

  __device__ __forceinline__ Element element(int32_t position) const {
    const int64_t at = first + position * stride;
    return {fetch<float>(param, dtype, at), before == nullptr ? 0 : fetch<float>(before, dtype, at),
            averages.average[at], averages.uncertainty[at]};
  }

  // Stores the gradient of a position, takes it with what was there before, and returns s.
  __device__ __forceinline__ float take(int32_t position, Element element, float g,
                                        const Smoothing<float>& smoothing) const {
    const int64_t at = first + position * stride;
    const uint32_t bits = rounded(g, dtype);
    store(grad, dtype, at, bits);
    g = meaning<float>(bits, dtype);
    if (before != nullptr) g = meaning<float>(rounded(meaning<float>(element.before, dtype) + g, dtype), dtype);
    const int32_t step = probe_step(length), probe = position / step;
    const bool chosen = kPart == 1 || probe % rank == triplet;
    if (position % step == 0 && probe < kProbes && chosen) probes[probe] = g;
    const float theta = meaning<float>(element.theta, dtype);
    const float s = update_element(theta, g, element.average, element.uncertainty, smoothing);
    averages.new_average[at] = element.average;
    averages.new_uncertainty[at] = element.uncertainty;
    return s;
  }
};

__device__ __forceinline__ float singular_value(const Finish& layer, int32_t i) {
  const float value = read<float>(layer.param[1], layer.dtype[1], i) * layer.scaling;
  return layer.mask == nullptr ? value : value * layer.mask[i];
}

// What slabs left of a triplet at up to 8 positions from `begin` on.
__device__ __forceinline__ void sum_slabs(const float* shares, int32_t slabs, int32_t length, int32_t rank_padded,
                                          int32_t begin, int32_t triplet, float (&total)[kPositions]) {
  const int64_t stride = static_cast<int64_t>(length) * rank_padded;
  const float* share = shares + static_cast<int64_t>(begin) * rank_padded + triplet;
  for (int32_t slab = 0; slab < slabs; ++slab, share += stride) {
#pragma unroll
    for (int32_t p = 0; p < kPositions; ++p)
      if (begin + p < length) total[p] += share[static_cast<int64_t>(p) * rank_padded];
  }
}

// The orthogonality term's share Σ_j θ_pj D_ji of the gradients of triplet i; D is symmetric.
template <int kPart>
__device__ __forceinline__ void share_of_term(const Finish& layer, int32_t begin, int32_t triplet,
                                              float (&share)[kPositions]) {
  const float scale = *layer.scale;
  for (int32_t j = 0; j < layer.r; ++j) {
    const Part<kPart> row(layer, j);
    const float slope = layer.slopes[kPart][j * layer.r + triplet] * scale;
#pragma unroll
    for (int32_t p = 0; p < kPositions; ++p)
      if (begin + p < row.length)
        share[p] += read<float>(row.param, row.dtype, row.first + (begin + p) * row.stride) * slope;
  }
}

// Finishes a slot of A or B, if there is such a one. Returns Σ B T over it, and 0 of A.
template <int kPart>
__device__ float finish_slot(const Finish& layer, int32_t slot, int32_t triplet) {
  const Part<kPart> part(layer, triplet);
  const int32_t begin = slot * kPositions;
  if (begin >= part.length) return 0;
  Element elements[kPositions] = {};
#pragma unroll
  for (int32_t p = 0; p < kPositions; ++p)
    if (begin + p < part.length) elements[p] = part.element(begin + p);
  float total[kPositions] = {}, share[kPositions] = {};
  if constexpr (kPart == 0) {
    sum_slabs(layer.a_shares, layer.slabs_a, layer.k, layer.rank_padded, begin, triplet, total);
  } else {
    sum_slabs(layer.t_shares, layer.slabs_t, layer.n, layer.rank_padded, begin, triplet, total);
  }
  const float lambda = kPart == 0 ? 1 : singular_value(layer, triplet);
  const bool with_term = layer.slopes[kPart] != nullptr;
  if (with_term) share_of_term<kPart>(layer, begin, triplet, share);
  float product = 0, sum = 0;
  bool finite = true;
#pragma unroll
  for (int32_t p = 0; p < kPositions; ++p) {
    if (begin + p >= part.length) continue;
    if constexpr (kPart == 2) product += meaning<float>(elements[p].theta, part.dtype) * total[p];
    float g = total[p] * lambda;
    if (with_term) g = share[p] + meaning<float>(rounded(g, part.dtype), part.dtype);
    const float s = part.take(begin + p, elements[p], g, layer.smoothing);
    finite &= isfinite(s);
    sum += s;
  }
  const int32_t slots_before = kPart == 0 ? 0 : slots(layer.k) + 1;
  layer.sums[static_cast<int64_t>(slots_before + slot) * layer.r + triplet] = finite ? sum : NAN;
  return product;
}

// The sum of what the block's threads of a triplet bring, in the first of them.
__device__ float sum_of_groups(float value, int32_t r) {
  __shared__ float values[kFinishThreads];
  __syncthreads();
  values[threadIdx.x] = value;
  __syncthreads();
  const int32_t groups = slots_per_block(r);
  if (static_cast<int32_t>(threadIdx.x) < r)
    for (int32_t g = 1; g < groups; ++g) value += values[g * r + threadIdx.x];
  return value;
}

// Whether this block is the last of `arrivals` to call this; if so, it may read what the others wrote.
__device__ bool arrives_last(int32_t* ticket, int32_t arrivals) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(ticket, 1) == arrivals - 1;
    if (last) *ticket = 0;
    __threadfence();
  }
  __syncthreads();
  return last;
}

__device__ void finish_singular_value(const Finish& layer, int32_t i, float column_sum) {
  const Part<1> part(layer, i);
  float g = column_sum * layer.scaling;
  if (layer.mask != nullptr) g *= layer.mask[i];
  const float s = part.take(i, part.element(i), g, layer.smoothing);
  layer.sums[static_cast<int64_t>(slots(layer.k)) * layer.r + i] = isfinite(s) ? s : NAN;
}

// The first blocks finish B, and the last of them E; the others A.
__global__ void __launch_bounds__(kFinishThreads, 5) finish_layer(const __grid_constant__ Finish layer) {
  const int32_t r = layer.r, groups = slots_per_block(r), blocks_b = finish_blocks(layer.n, r);
  const int32_t block = blockIdx.x, group = threadIdx.x / r, i = threadIdx.x % r;
  if (block >= blocks_b) {
    if (group < groups) finish_slot<0>(layer, (block - blocks_b) * groups + group, i);
    return;
  }
  const bool first = static_cast<int32_t>(threadIdx.x) < r;
  const float product = sum_of_groups(group < groups ? finish_slot<2>(layer, block * groups + group, i) : 0, r);
  if (first) layer.column_sums[static_cast<int64_t>(block) * r + i] = product;
  if (!arrives_last(layer.ticket, blocks_b)) return;
  float sum = 0;
  if (group < groups)
    for (int32_t b = group; b < blocks_b; b += groups) sum += layer.column_sums[static_cast<int64_t>(b) * r + i];
  sum = sum_of_groups(sum, r);
  if (first) finish_singular_value(layer, i, sum);
}

}  // namespace

cudaError_t finish(const Finish& layer, cudaStream_t stream) {
  const int64_t blocks = finish_blocks(layer.n, layer.r) + finish_blocks(layer.k, layer.r);
  return launch(finish_layer, blocks, kFinishThreads, stream, layer);
}

}  // namespace adalora::cuda
