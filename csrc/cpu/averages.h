// The ping-pong pair of Ī and Ū on the CPU.
#pragma once

#include "common/checks.h"

namespace adalora::cpu {

constexpr int64_t kStreamedElements = 1 << 18;  // 2 MiB of new averages in fp32

// state [2, 2, elements]: half; Ī or Ū; element.
struct Averages {
  void* data;
  int32_t* half;
  int64_t elements;

  template <typename T>
  const T* current() const {
    return static_cast<const T*>(data) + *half * 2 * elements;
  }
  template <typename T>
  T* next() const {
    return static_cast<T*>(data) + (1 - *half) * 2 * elements;
  }
  // Whether the new averages go past the caches: more than a core keeps until the next step.
  bool streamed() const { return elements >= kStreamedElements; }
  void flip() const { *half = 1 - *half; }
};

// The pair of layers with sizes R, K, N, after a check of it and of the scores.
inline Averages averages_of(const Tensor& state, const Tensor& half, const Tensor& scores, const int64_t* sizes,
                            int64_t layers) {
  const ScalarType dtype = state.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, "state: expected float32 or float64");
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
  return {state.mutable_data_ptr(), current, elements};
}

}  // namespace adalora::cpu
