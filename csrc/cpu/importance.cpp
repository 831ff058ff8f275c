// One step of the averages of all layers, and the score of every triplet (csrc/common/importance.h):
//     S_i = s(E_i) + mean_k s(A_ik) + mean_j s(B_ji)
// One sweep reads θ, g, Ī, Ū and writes the other half of Ī, Ū: 24 bytes an element in fp32.
//
// The sweep is cut into items of whole rows of A and of B, by the layout alone; each leaves its sums to itself, and
// they are added up in the layout's order. So neither the number of threads nor their timing can change a bit.
//
// Table `shapes`: R, K, N of each layer. The parameters come as A₀, E₀, B₀, A₁, …; a gradient without elements stands
// for one that is missing.
#include <algorithm>
#include <numeric>
#include <vector>

#include "cpu/ops.h"
#include "cpu/parallel.h"
#include "cpu/simd/importance.h"

namespace adalora::cpu {

namespace {

constexpr int64_t kItemElements = 16384;
constexpr int64_t kSegmentElements = 4096;  // sums in T run over about so many elements, then in fp64
constexpr int64_t kRowPeriod = 64;
constexpr int64_t kColumnPeriod = 512;
constexpr int64_t kThreadedElements = 32768;

enum class Part { kA, kE, kB };

struct Item {
  Part part;
  int64_t tensor, begin, count;  // elements [begin, begin + count) of the parameter
  int64_t offset;                // of that range in the averages
  int64_t width;                 // K for A, R for B and E
  int64_t period;
  double* sums;  // A: one for each row of the item; E, B: one for each of the R triplets
};

// The smallest multiple of the rank that is a multiple of 16 (so that no vector is cut) and about kColumnPeriod.
int64_t column_period(int64_t rank) {
  const int64_t unit = rank / std::gcd(rank, int64_t{16}) * 16;
  return unit * ((kColumnPeriod + unit - 1) / unit);
}

// The items of the layout, with their sums laid out in `sums`.
std::vector<Item> cut(const int64_t* shapes, int64_t layers, std::vector<double>& sums) {
  std::vector<Item> items;
  std::vector<int64_t> places;
  int64_t offset = 0, place = 0;
  const auto add = [&](Part part, int64_t tensor, int64_t total, int64_t step, int64_t width, int64_t period) {
    for (int64_t begin = 0; begin < total; begin += step) {
      const int64_t count = std::min(step, total - begin);
      items.push_back({part, tensor, begin, count, offset + begin, width, period, nullptr});
      places.push_back(place);
      place += part == Part::kA ? count / width : width;
    }
    offset += total;
  };
  for (int64_t i = 0; i < layers; ++i) {
    const int64_t r = shapes[i], k = shapes[layers + i], n = shapes[2 * layers + i];
    if (r == 0) continue;
    const int64_t period = column_period(r);
    add(Part::kA, 3 * i, r * k, std::max<int64_t>(1, kItemElements / std::max<int64_t>(1, k)) * k, k, kRowPeriod);
    add(Part::kE, 3 * i + 1, r, r, r, r);
    add(Part::kB, 3 * i + 2, n * r, period * std::max<int64_t>(1, kItemElements / period), r, period);
  }
  sums.assign(place, 0.0);
  for (size_t i = 0; i < items.size(); ++i) items[i].sums = sums.data() + places[i];
  return items;
}

template <typename T>
struct Sweep {
  const std::vector<Operand>&params, &grads;
  const T *average, *uncertainty;
  T *new_average, *new_uncertainty;
  Smoothing<T> smoothing;
  bool (*run)(const Run<T>&, const Smoothing<T>&);

  // A range of an item, at most a segment: its sums per position of the period are left in `scratch`.
  bool segment(const Item& item, int64_t begin, int64_t count, T* scratch) const {
    const auto at = [begin = item.begin + begin](const Operand& operand) {
      return static_cast<const char*>(operand.data) + begin * size_of(operand.dtype);
    };
    const Operand &param = params[item.tensor], &grad = grads[item.tensor];
    const int64_t offset = item.offset + begin;
    std::fill(scratch, scratch + item.period, T{});
    return run({at(param), grad.data == nullptr ? nullptr : at(grad), param.dtype, grad.dtype, average + offset,
                uncertainty + offset, new_average + offset, new_uncertainty + offset, count, scratch, item.period,
                scratch + item.period},
               smoothing);
  }

  bool rows(const Item& item, T* scratch) const {
    bool finite = true;
    for (int64_t begin = 0; begin < item.count;) {
      double& sum = item.sums[begin / item.width];
      const int64_t end = (begin / item.width + 1) * item.width;
      const int64_t count = std::min(kSegmentElements, end - begin);
      finite &= segment(item, begin, count, scratch);
      for (int64_t step = kRowPeriod / 2; step > 0; step /= 2)
        for (int64_t l = 0; l < step; ++l) scratch[l] += scratch[l + step];
      sum += scratch[0];
      begin += count;
    }
    return finite;
  }

  bool columns(const Item& item, T* scratch) const {
    bool finite = true;
    const int64_t step = item.period * std::max<int64_t>(1, kSegmentElements / item.period);
    for (int64_t begin = 0; begin < item.count; begin += step) {
      finite &= segment(item, begin, std::min(step, item.count - begin), scratch);
      for (int64_t l = 0; l < item.period; l += item.width)
        for (int64_t i = 0; i < item.width; ++i) item.sums[i] += scratch[l + i];
    }
    return finite;
  }
};

template <typename T>
void commit(const std::vector<Item>& items, const int64_t* shapes, int64_t layers, T* scores) {
  std::vector<double> parts[3];
  auto item = items.begin();
  for (int64_t i = 0; i < layers; ++i) {
    const int64_t r = shapes[i], sizes[3] = {shapes[layers + i], 1, shapes[2 * layers + i]};
    for (auto& part : parts) part.assign(r, 0.0);
    for (; item != items.end() && item->tensor / 3 == i; ++item) {
      auto& part = parts[static_cast<int>(item->part)];
      if (item->part == Part::kA) {
        std::copy(item->sums, item->sums + item->count / item->width, part.begin() + item->begin / item->width);
      } else {
        for (int64_t j = 0; j < r; ++j) part[j] += item->sums[j];
      }
    }
    for (int64_t j = 0; j < r; ++j)
      *scores++ = static_cast<T>(parts[1][j] + (parts[0][j] / sizes[0] + parts[2][j] / sizes[2]));
  }
}

template <typename T>
bool update(const Tensor& state, int32_t* half, const Tensor& scores, const int64_t* shapes, int64_t layers,
            const std::vector<Operand>& params, const std::vector<Operand>& grads, int64_t elements,
            const Smoothing<T>& smoothing, bool (*run)(const Run<T>&, const Smoothing<T>&)) {
  std::vector<double> sums;
  const std::vector<Item> items = cut(shapes, layers, sums);
  T* data = static_cast<T*>(state.mutable_data_ptr());
  T *old = data + *half * 2 * elements, *fresh = data + (1 - *half) * 2 * elements;
  const Sweep<T> sweep{params, grads, old, old + elements, fresh, fresh + elements, smoothing, run};
  int64_t longest = kRowPeriod;
  for (const Item& item : items) longest = std::max(longest, item.period);
  std::atomic<bool> finite{true};
  for_each_item(
      static_cast<int64_t>(items.size()), elements >= kThreadedElements,
      [longest] { return std::vector<T>(3 * longest); },
      [&](int64_t i, std::vector<T>& scratch) {
        const Item& item = items[i];
        if (!(item.part == Part::kA ? sweep.rows(item, scratch.data()) : sweep.columns(item, scratch.data())))
          finite.store(false, std::memory_order_relaxed);
      });
  if (!finite.load()) return false;
  commit(items, shapes, layers, static_cast<T*>(scores.mutable_data_ptr()));
  *half = 1 - *half;
  return true;
}

}  // namespace

Tensor importance_update(Tensor state, Tensor half, Tensor scores, const Tensor& shapes, std::vector<Tensor> params,
                         std::vector<Tensor> grads, double beta1, double beta2) {
  const ScalarType dtype = state.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, "state: expected float32 or float64");
  const int64_t layers = check_table(shapes, 3, "shapes");
  const int64_t* sizes = static_cast<const int64_t*>(shapes.const_data_ptr());
  int64_t elements = 0, rank = 0;
  for (int64_t i = 0; i < layers; ++i) {
    elements += sizes[i] * (sizes[layers + i] + 1 + sizes[2 * layers + i]);
    rank += sizes[i];
  }
  check_contiguous(state, dtype, 4 * elements, "state");
  check_contiguous(scores, dtype, rank, "scores");
  check_contiguous(half, ScalarType::Int, 1, "half");
  int32_t* current = static_cast<int32_t*>(half.mutable_data_ptr());
  STD_TORCH_CHECK(*current == 0 || *current == 1, "half: expected 0 or 1, got ", *current);
  const std::vector<Operand> read_params = operands_of(params, sizes, layers, state, "params");
  const std::vector<Operand> read_grads = operands_of(grads, sizes, layers, state, "grads");
  const auto& kernels = ADALORA_KERNELS(importance_kernels);
  const bool taken =
      dtype == ScalarType::Double
          ? update<double>(state, current, scores, sizes, layers, read_params, read_grads, elements, {beta1, beta2},
                           kernels.run_double)
          : update<float>(state, current, scores, sizes, layers, read_params, read_grads, elements, {beta1, beta2},
                          kernels.run_float);
  Tensor finite = torch::stable::empty({1}, ScalarType::Bool);
  *static_cast<bool*>(finite.mutable_data_ptr()) = taken;
  return finite;
}

}  // namespace adalora::cpu
