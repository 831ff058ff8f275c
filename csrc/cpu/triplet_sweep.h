// One sweep over all elements of all layers that leaves a score for every triplet:
//     S_i = s(E_i) + mean_k s(A_ik) + mean_j s(B_ji)
//
// The sweep is cut into items of whole rows of A and of B, by the layout alone; each leaves its sums to itself, and
// they are added up in the layout's order. So neither the number of threads nor their timing can change a bit.
#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "cpu/parallel.h"

namespace adalora::cpu {

namespace triplet_sweep {

constexpr int64_t kItemElements = 16384;
constexpr int64_t kSegmentElements = 4096;  // sums in T run over about so many elements, then in fp64
constexpr int64_t kRowPeriod = 64;
constexpr int64_t kColumnPeriod = 64;
constexpr int64_t kThreadedElements = 32768;

// Makes this thread's streamed stores (simd/stream.h), which other stores may overtake, visible to the others first.
inline void fence_streams() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

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
inline int64_t column_period(int64_t rank) {
  const int64_t unit = rank / std::gcd(rank, int64_t{16}) * 16;
  return unit * ((kColumnPeriod + unit - 1) / unit);
}

// The items of the layout (R, K, N of each layer), with their sums laid out in `sums`.
inline std::vector<Item> cut(const int64_t* shapes, int64_t layers, std::vector<double>& sums) {
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

// A row of an item of A: s summed over at most a segment at a time.
template <typename T, typename Segment>
bool rows(const Item& item, T* scratch, const Segment& segment) {
  bool finite = true;
  for (int64_t begin = 0; begin < item.count;) {
    double& sum = item.sums[begin / item.width];
    const int64_t end = (begin / item.width + 1) * item.width;
    const int64_t count = std::min(kSegmentElements, end - begin);
    std::fill(scratch, scratch + item.period, T{});
    finite &= segment(item, begin, count, scratch);
    for (int64_t step = kRowPeriod / 2; step > 0; step /= 2)
      for (int64_t l = 0; l < step; ++l) scratch[l] += scratch[l + step];
    sum += scratch[0];
    begin += count;
  }
  return finite;
}

template <typename T, typename Segment>
bool columns(const Item& item, T* scratch, const Segment& segment) {
  bool finite = true;
  const int64_t step = item.period * std::max<int64_t>(1, kSegmentElements / item.period);
  for (int64_t begin = 0; begin < item.count; begin += step) {
    std::fill(scratch, scratch + item.period, T{});
    finite &= segment(item, begin, std::min(step, item.count - begin), scratch);
    for (int64_t l = 0; l < item.period; l += item.width)
      for (int64_t i = 0; i < item.width; ++i) item.sums[i] += scratch[l + i];
  }
  return finite;
}

// Calls segment(item, begin, count, scratch) for all elements: it handles elements [begin, begin + count) of the item,
// adds s of its l-th one to scratch[l % item.period], may use `buffers` × item.period more numbers behind those, and
// returns whether every s was finite. Returns whether all did.
template <typename T, typename Segment>
bool run(const std::vector<Item>& items, int64_t elements, int64_t buffers, const Segment& segment) {
  int64_t longest = kRowPeriod;
  for (const Item& item : items) longest = std::max(longest, item.period);
  std::atomic<bool> finite{true};
  for_each_item(
      static_cast<int64_t>(items.size()), elements >= kThreadedElements,
      [=] { return std::vector<T>((1 + buffers) * longest); },
      [&](int64_t i, std::vector<T>& scratch) {
        const Item& item = items[i];
        if (!(item.part == Part::kA ? rows(item, scratch.data(), segment) : columns(item, scratch.data(), segment)))
          finite.store(false, std::memory_order_relaxed);
        fence_streams();
      });
  return finite.load();
}

// The scores from the items' sums.
template <typename T>
void score(const std::vector<Item>& items, const int64_t* shapes, int64_t layers, T* scores) {
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

}  // namespace triplet_sweep

}  // namespace adalora::cpu
