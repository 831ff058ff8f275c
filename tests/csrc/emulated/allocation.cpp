// The rank budget as its host code starts it, for ctypes.
#include "cuda/allocation.h"

#include "memory.h"

using namespace adalora;

namespace {

template <typename T>
cudaError_t mask(const std::vector<cuda::ValuesList>& lists, const void* scores, int64_t total, bool* live,
                 const bool* enabled, int64_t number, const int64_t* on_device, void* threshold) {
  const cuda::Budget<T> budget{static_cast<const T*>(scores), live, enabled, static_cast<T*>(threshold),
                               static_cast<int32_t>(total), number, on_device, true};
  return cuda::mask_to_budget<T>(lists, budget, nullptr);
}

}  // namespace

// What went wrong, or nothing. `values`, `ranks`, `strides`, `sizes`: of each layer's E; sizes in bytes.
extern "C" const char* mask_to_budget(bool fp64, const void* scores, int64_t total, bool* live, const bool* enabled,
                                      int64_t number, const int64_t* on_device, void* threshold, int64_t layers,
                                      void* const* values, const int64_t* ranks, const int64_t* strides,
                                      const int64_t* sizes) {
  return emulated::problem_of([&] {
    std::vector<cuda::ValuesList> lists(1);
    int32_t first = 0;
    for (int64_t i = 0; i < layers; ++i) {
      if (lists.back().count == cuda::kValuesPerLaunch) lists.emplace_back();
      cuda::ValuesList& list = lists.back();
      list.values[list.count++] = {values[i], first, static_cast<int32_t>(ranks[i]), static_cast<int32_t>(strides[i]),
                                   static_cast<uint8_t>(sizes[i])};
      first += static_cast<int32_t>(ranks[i]);
    }
    return (fp64 ? mask<double> : mask<float>)(lists, scores, total, live, enabled, number, on_device, threshold);
  });
}
