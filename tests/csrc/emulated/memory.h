// Memory that kernels get, and what a call of them from Python says.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_runtime.h"

namespace emulated {

// Must be written before it is read, between margins that must stay as they are.
template <typename T>
class Scratch {
 public:
  Scratch(int64_t count, uint8_t poison) : poison_(poison), bytes_(kMargin * 2 + count * sizeof(T), poison) {}

  T* data() { return reinterpret_cast<T*>(bytes_.data() + kMargin); }

  void check_margins() const {
    const auto untouched = [this](uint8_t byte) { return byte == poison_; };
    if (!std::all_of(bytes_.begin(), bytes_.begin() + kMargin, untouched) ||
        !std::all_of(bytes_.end() - kMargin, bytes_.end(), untouched))
      throw std::runtime_error("a kernel wrote outside its memory");
  }

 private:
  static constexpr size_t kMargin = 4096;
  uint8_t poison_;
  std::vector<uint8_t> bytes_;
};

// What went wrong in `call`, or nothing.
template <typename Call>
const char* problem_of(const Call& call) {
  static std::string problem;
  try {
    const cudaError_t error = call();
    if (error == cudaSuccess) return nullptr;
    problem = cudaGetErrorString(error);
  } catch (const std::exception& error) {
    problem = error.what();
  }
  return problem.c_str();
}

}  // namespace emulated
