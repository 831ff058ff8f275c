// One step of the averages of all layers, and the score of every triplet (csrc/common/importance.h):
//     S_i = s(E_i) + mean_k s(A_ik) + mean_j s(B_ji)
// One launch reads θ, g, Ī, Ū of the whole model and writes the other half of Ī, Ū: 24 bytes an element in fp32. Its
// addresses are kernel arguments, since gradients move from step to step. A second, small launch adds up the partial
// sums and, if every s was finite, commits the scores and flips the half on the device.
// Where a backward has updated a parameter already, the sums that it left are added up in place of the elements.
// Sums have a fixed order and there are no atomics: bitwise repeatable. No host sync.
// No GPU has run this yet. It is compiled for three, and tests/csrc runs it on a CPU (emulated/cuda_runtime.h).
#include "cuda/elements.h"
#include "cuda/importance.h"

namespace adalora::cuda {

namespace {

// Elements of a thread in flight: what four blocks on a multiprocessor have registers for.
template <typename T>
constexpr int kInFlight = 16 / sizeof(T);

// What is read of an element.
template <typename T>
struct Element {
  Bits<T> param, grad;
  T average, uncertainty;
};

// One of the three parameters of a layer, and the averages that go with it.
template <typename T>
struct Part {
  const void *param, *grad;
  uint8_t param_dtype, grad_dtype;
  Averages<T> averages;

  __device__ Part(const Layer& layer, int part, const Update<T>& update)
      : param(layer.param[part]),
        grad(layer.grad[part]),
        param_dtype(layer.param_dtype[part]),
        grad_dtype(layer.grad_dtype[part]),
        averages(update.state, update.half, update.elements, offset_of(layer, part)) {}

  __device__ static int64_t offset_of(const Layer& layer, int part) {
    const int64_t a = static_cast<int64_t>(layer.r) * layer.k;
    return layer.offset + (part == 0 ? 0 : part == 1 ? a : a + layer.r);
  }

  // Updates `count` elements from `at` on, `stride` apart, and returns the sum of their s; clears `finite` where one
  // isn't. Some are read before the first of them is written, so that their loads go side by side.
  __device__ __forceinline__ T take(int64_t at, int32_t count, int64_t stride, const Smoothing<T>& smoothing,
                                    bool& finite) const {
    T sum = 0;
    for (int32_t i = 0; i < count; i += kInFlight<T>, at += kInFlight<T> * stride) {
      Element<T> elements[kInFlight<T>];
#pragma unroll
      for (int32_t j = 0; j < kInFlight<T>; ++j)
        if (i + j < count) elements[j] = element(at + j * stride);
#pragma unroll
      for (int32_t j = 0; j < kInFlight<T>; ++j)
        if (i + j < count) sum += step(at + j * stride, elements[j], smoothing, finite);
    }
    return sum;
  }

 private:
  __device__ __forceinline__ Element<T> element(int64_t i) const {
    if (grad == nullptr) return {0, 0, averages.average[i], averages.uncertainty[i]};
    return {fetch<T>(param, param_dtype, i), fetch<T>(grad, grad_dtype, i), averages.average[i],
            averages.uncertainty[i]};
  }

  __device__ __forceinline__ T step(int64_t i, Element<T> e, const Smoothing<T>& smoothing, bool& finite) const {
    T s = e.average * e.uncertainty;
    if (grad != nullptr) {
      s = update_element(meaning<T>(e.param, param_dtype), meaning<T>(e.grad, grad_dtype), e.average, e.uncertainty,
                         smoothing);
      finite &= isfinite(s);
    }
    averages.new_average[i] = e.average;
    averages.new_uncertainty[i] = e.uncertainty;
    return s;
  }
};

// Whether the gradient of a part is still the one that its backward has left. All threads of the block ask.
template <typename T>
__device__ bool is_as_seen(const Layer& layer, int part, const Update<T>& update) {
  if (update.handover.sums == nullptr) return false;
  const int32_t tensor = 3 * layer.number + part, i = threadIdx.x;
  if (!layer.known[part]) {
    if (i == 0) update.handover.redone[tensor] = false;
    return false;
  }
  const int32_t length = part == 0 ? layer.k : part == 1 ? layer.r : layer.n, position = i * probe_step(length);
  bool same = true;
  if (i < kProbes && position < length) {
    const int64_t triplet = i % layer.r;
    const int64_t at = part == 0   ? triplet * layer.k + position
                       : part == 1 ? position
                                   : static_cast<int64_t>(position) * layer.r + triplet;
    const float now = read<float>(layer.grad[part], layer.grad_dtype[part], at);
    same = bits_of(now) == bits_of(update.handover.probes[static_cast<int64_t>(tensor) * kProbes + i]);
  }
  same = __syncthreads_and(same);
  if (i == 0) update.handover.redone[tensor] = !same;
  return same;
}

// The sum over slots that a backward has left of a triplet; clears `finite` where one says that some s isn't.
template <typename T>
__device__ T left_sum(const Layer& layer, const Update<T>& update, int32_t first, int32_t begin, int32_t end,
                      int32_t step, int32_t triplet, bool& finite) {
  T sum = 0;
  for (int32_t slot = begin; slot < end; slot += step) {
    const float left = update.handover.sums[layer.left + static_cast<int64_t>(first + slot) * layer.r + triplet];
    finite &= left == left;
    sum += left;
  }
  return sum;
}

// A warp takes a piece of a row of A.
template <typename T>
__device__ bool sweep_rows(const Layer& layer, int32_t item, const Update<T>& update) {
  const int32_t unit = item * kUnits + threadIdx.x / 32, lane = threadIdx.x % 32;
  const int32_t count = pieces(layer);
  const bool as_seen = is_as_seen(layer, 0, update);
  bool finite = true;
  if (unit >= layer.r * count) return finite;
  const int32_t triplet = unit / count;
  const int32_t begin = unit % count * kPieceElements;
  const int32_t end = min(layer.k, begin + kPieceElements);
  T sum = 0;
  if (as_seen) {
    sum = left_sum(layer, update, 0, begin / kPositions + lane, slots(end), 32, triplet, finite);
  } else {
    const Part<T> part(layer, 0, update);
    const int64_t row = static_cast<int64_t>(triplet) * layer.k;
    sum = part.take(row + begin + lane, (end - begin - lane + 31) / 32, 32, update.smoothing, finite);
  }
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_down_sync(0xffffffff, sum, offset);
  if (lane == 0) update.sums[layer.sums + unit] = sum;
  return finite;
}

// A block takes a slab of rows of B. Each thread keeps to one column, as neighbours do to neighbouring ones.
template <typename T>
__device__ bool sweep_slab(const Layer& layer, int32_t item, const Update<T>& update) {
  __shared__ T column[kThreads];
  const bool as_seen = is_as_seen(layer, 2, update);
  const Part<T> part(layer, 2, update);
  const int32_t begin = item * slab_rows(layer), end = min(layer.n, begin + slab_rows(layer));
  T* sums = update.sums + layer.sums + layer.r * (pieces(layer) + 1) + static_cast<int64_t>(item) * layer.r;
  bool finite = true;
  for (int32_t first = 0; first < layer.r; first += kThreads) {
    const int32_t width = min(kThreads, layer.r - first), groups = kThreads / width;
    const int32_t group = threadIdx.x / width, j = threadIdx.x % width;
    T sum = 0;
    if (group < groups && as_seen) {
      sum = left_sum(layer, update, slots(layer.k) + 1, begin / kPositions + group, slots(end), groups, first + j,
                     finite);
    } else if (group < groups) {
      const int32_t row = begin + group, rows = (end - row + groups - 1) / groups;
      sum = part.take(static_cast<int64_t>(row) * layer.r + first + j, rows, static_cast<int64_t>(groups) * layer.r,
                      update.smoothing, finite);
    }
    column[threadIdx.x] = sum;
    __syncthreads();
    if (group == 0) {
      for (int32_t g = 1; g < groups; ++g) sum += column[g * width + j];
      sums[first + j] = sum;
    }
    __syncthreads();
  }
  return finite;
}

template <typename T>
__device__ bool sweep_values(const Layer& layer, const Update<T>& update) {
  const bool as_seen = is_as_seen(layer, 1, update);
  const Part<T> part(layer, 1, update);
  T* sums = update.sums + layer.sums + layer.r * pieces(layer);
  bool finite = true;
  for (int32_t i = threadIdx.x; i < layer.r; i += kThreads)
    sums[i] = as_seen ? left_sum(layer, update, slots(layer.k), 0, 1, 1, i, finite)
                      : part.take(i, 1, 0, update.smoothing, finite);
  return finite;
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    importance_sweep(const __grid_constant__ Layers layers, const __grid_constant__ Update<T> update,
                     int32_t first_block) {
  const int32_t block = blockIdx.x;
  int32_t low = 0, high = layers.count - 1;
  while (low < high) {
    const int32_t middle = (low + high + 1) / 2;
    if (layers.layer[middle].block <= block) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const Layer& layer = layers.layer[low];
  const int32_t item = block - layer.block, rows = row_blocks(layer);
  const bool finite = item < rows    ? sweep_rows(layer, item, update)
                      : item == rows ? sweep_values(layer, update)
                                     : sweep_slab(layer, item - rows - 1, update);
  const bool all = __syncthreads_and(finite);
  if (threadIdx.x == 0) update.finite[first_block + block] = all;
}

// A block takes a layer; each looks at the flags of all blocks of the sweep by itself.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    importance_commit(const __grid_constant__ Layers layers, const __grid_constant__ Update<T> update, bool last) {
  bool finite = true;
  for (int32_t i = threadIdx.x; i < update.blocks; i += kThreads) finite &= update.finite[i] != 0;
  finite = __syncthreads_and(finite);
  if (finite && static_cast<int32_t>(blockIdx.x) < layers.count) {
    const Layer& layer = layers.layer[blockIdx.x];
    const int32_t count = pieces(layer), parts = slabs(layer);
    const T *a = update.sums + layer.sums, *e = a + layer.r * count, *b = e + layer.r;
    for (int32_t i = threadIdx.x; i < layer.r; i += kThreads) {
      double rows = 0, columns = 0;
      for (int32_t p = 0; p < count; ++p) rows += a[i * count + p];
      for (int32_t p = 0; p < parts; ++p) columns += b[static_cast<int64_t>(p) * layer.r + i];
      update.scores[layer.rank_offset + i] = static_cast<T>(e[i] + (rows / layer.k + columns / layer.n));
    }
  }
  if (last && blockIdx.x == 0 && threadIdx.x == 0) {
    *update.taken = finite;
    if (finite) *update.half = 1 - *update.half;
  }
}

}  // namespace

template <typename T>
cudaError_t importance_update(const std::vector<Layers>& launches, const Update<T>& update, cudaStream_t stream) {
  int32_t first = 0;
  for (const Layers& layers : launches) {
    if (layers.blocks == 0) continue;
    const cudaError_t error = launch(importance_sweep<T>, layers.blocks, kThreads, stream, layers, update, first);
    if (error != cudaSuccess) return error;
    first += layers.blocks;
  }
  for (const Layers& layers : launches) {
    const int32_t blocks = layers.count > 0 ? layers.count : 1;
    const bool last = &layers == &launches.back();
    const cudaError_t error = launch(importance_commit<T>, blocks, kThreads, stream, layers, update, last);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

template cudaError_t importance_update<float>(const std::vector<Layers>&, const Update<float>&, cudaStream_t);
template cudaError_t importance_update<double>(const std::vector<Layers>&, const Update<double>&, cudaStream_t);

}  // namespace adalora::cuda
