// The importance sweep as its host code starts it, for ctypes.
#include <stdexcept>
#include <string>

#include "cuda/plan.h"

namespace {

using namespace adalora;

std::vector<Operand> operands(void* const* data, const int64_t* dtypes, int64_t count) {
  std::vector<Operand> result;
  for (int64_t i = 0; i < count; ++i) result.push_back({data[i], static_cast<DType>(dtypes[i])});
  return result;
}

// Memory that must be written before it is read, between margins that must stay as they are.
template <typename T>
class Scratch {
 public:
  Scratch(int64_t count, uint8_t poison) : poison_(poison), bytes_(kMargin * 2 + count * sizeof(T), poison) {}
  T* data() { return reinterpret_cast<T*>(bytes_.data() + kMargin); }
  bool intact() const {
    const auto untouched = [this](uint8_t byte) { return byte == poison_; };
    return std::all_of(bytes_.begin(), bytes_.begin() + kMargin, untouched) &&
           std::all_of(bytes_.end() - kMargin, bytes_.end(), untouched);
  }

 private:
  static constexpr size_t kMargin = 4096;
  uint8_t poison_;
  std::vector<uint8_t> bytes_;
};

template <typename T>
void update(const cuda::Plan& plan, void* state, int32_t* half, void* scores, double beta1, double beta2, bool* taken) {
  Scratch<T> sums(plan.sums, 0xff);  // NaN
  Scratch<uint8_t> finite(plan.blocks, 0);
  const cuda::Update<T> update{static_cast<T*>(state),
                               half,
                               static_cast<T*>(scores),
                               plan.elements,
                               sums.data(),
                               finite.data(),
                               static_cast<int32_t>(plan.blocks),
                               taken,
                               {beta1, beta2}};
  if (cuda::importance_update<T>(plan.launches, update, nullptr) != cudaSuccess)
    throw std::runtime_error("a kernel's threads waited for each other, or a shuffle for lanes that did not come");
  if (!sums.intact() || !finite.intact()) throw std::runtime_error("a kernel wrote outside its memory");
}

}  // namespace

// What went wrong, or nothing. `dtypes` as in common/dtype.h; `launches` says how many lists of layers there were.
extern "C" const char* importance_update(bool fp64, const int64_t* sizes, int64_t layers, void* const* params,
                                         const int64_t* param_dtypes, void* const* grads, const int64_t* grad_dtypes,
                                         void* state, int32_t* half, void* scores, double beta1, double beta2,
                                         bool* taken, int64_t* launches) {
  static std::string problem;
  try {
    const cuda::Plan plan = cuda::plan_of(sizes, layers, operands(params, param_dtypes, 3 * layers),
                                          operands(grads, grad_dtypes, 3 * layers));
    *launches = static_cast<int64_t>(plan.launches.size());
    (fp64 ? update<double> : update<float>)(plan, state, half, scores, beta1, beta2, taken);
  } catch (const std::exception& error) {
    problem = error.what();
    return problem.c_str();
  }
  return nullptr;
}
