// The importance sweep as its host code starts it, for ctypes.
#include "cuda/plan.h"
#include "memory.h"

namespace {

using namespace adalora;

std::vector<Operand> operands(void* const* data, const int64_t* dtypes, int64_t count) {
  std::vector<Operand> result;
  for (int64_t i = 0; i < count; ++i) result.push_back({data[i], static_cast<DType>(dtypes[i])});
  return result;
}

template <typename T>
cudaError_t update(const cuda::Plan& plan, void* state, int32_t* half, void* scores, const cuda::Handover& handover,
                   double beta1, double beta2, bool* taken) {
  emulated::Scratch<T> sums(plan.sums, 0xff);  // NaN
  emulated::Scratch<uint8_t> finite(plan.blocks, 0);
  const cuda::Update<T> update{static_cast<T*>(state),
                               half,
                               static_cast<T*>(scores),
                               plan.elements,
                               sums.data(),
                               finite.data(),
                               static_cast<int32_t>(plan.blocks),
                               taken,
                               handover,
                               {beta1, beta2}};
  const cudaError_t error = cuda::importance_update<T>(plan.launches, update, nullptr);
  sums.check_margins();
  finite.check_margins();
  return error;
}

}  // namespace

// What went wrong, or nothing. `dtypes` as in common/dtype.h; `known` and what follows: null without a handover;
// `launches` says how many lists of layers there were.
extern "C" const char* importance_update(bool fp64, const int64_t* sizes, int64_t layers, void* const* params,
                                         const int64_t* param_dtypes, void* const* grads, const int64_t* grad_dtypes,
                                         void* state, int32_t* half, void* scores, double beta1, double beta2,
                                         bool* taken, const bool* known, const float* left, const float* probes,
                                         int32_t* redone, int64_t* launches) {
  return emulated::problem_of([&] {
    const cuda::Plan plan = cuda::plan_of(sizes, layers, operands(params, param_dtypes, 3 * layers),
                                          operands(grads, grad_dtypes, 3 * layers), known);
    *launches = static_cast<int64_t>(plan.launches.size());
    return (fp64 ? update<double> : update<float>)(plan, state, half, scores, {left, probes, redone}, beta1, beta2,
                                                   taken);
  });
}
