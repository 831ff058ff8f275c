// One step of the averages of all layers, and the score of every triplet (csrc/common/importance.h). One sweep reads
// θ, g, Ī, Ū and writes the other half of Ī, Ū: 24 bytes an element in fp32.
//
// `shapes`: R, K, N of each layer. The parameters come as A₀, E₀, B₀, A₁, …; a gradient without elements stands for one
// that is missing.
#include "cpu/simd/importance.h"

#include "cpu/averages.h"
#include "cpu/ops.h"
#include "cpu/triplet_sweep.h"

namespace adalora::cpu {

namespace {

template <typename T>
bool update(const Averages& averages, const Tensor& scores, const int64_t* shapes, int64_t layers,
            const std::vector<Operand>& params, const std::vector<Operand>& grads, const Smoothing<T>& smoothing,
            bool (*run)(const Run<T>&, const Smoothing<T>&)) {
  std::vector<double> sums;
  const std::vector<triplet_sweep::Item> items = triplet_sweep::cut(shapes, layers, sums);
  const int64_t elements = averages.elements;
  const T* old = averages.current<T>();
  T* fresh = averages.next<T>();
  const auto segment = [&](const triplet_sweep::Item& item, int64_t begin, int64_t count, T* scratch) {
    const Operand param = params[item.tensor].from(item.begin + begin), grad = grads[item.tensor].from(item.begin + begin);
    const int64_t offset = item.offset + begin;
    return run({param.data, grad.data, param.dtype, grad.dtype, old + offset, old + elements + offset, fresh + offset,
                fresh + elements + offset, count, scratch, item.period, scratch + item.period},
               smoothing);
  };
  if (!triplet_sweep::run<T>(items, elements, 2, segment)) return false;
  triplet_sweep::score(items, shapes, layers, static_cast<T*>(scores.mutable_data_ptr()));
  averages.flip();
  return true;
}

}  // namespace

Tensor importance_update(Tensor state, Tensor half, Tensor scores, const Tensor& shapes, std::vector<Tensor> params,
                         std::vector<Tensor> grads, double beta1, double beta2) {
  const int64_t layers = check_table(shapes, 3, "shapes");
  const int64_t* sizes = static_cast<const int64_t*>(shapes.const_data_ptr());
  const Averages averages = averages_of(state, half, scores, sizes, layers);
  const std::vector<Operand> read_params = operands_of(params, sizes, layers, state, "params", false);
  const std::vector<Operand> read_grads = operands_of(grads, sizes, layers, state, "grads", true);
  const auto& kernels = ADALORA_KERNELS(importance_kernels);
  const bool taken = state.scalar_type() == ScalarType::Double
                         ? update<double>(averages, scores, sizes, layers, read_params, read_grads, {beta1, beta2},
                                          kernels.run_double)
                         : update<float>(averages, scores, sizes, layers, read_params, read_grads, {beta1, beta2},
                                         kernels.run_float);
  Tensor finite = torch::stable::empty({1}, ScalarType::Bool);
  *static_cast<bool*>(finite.mutable_data_ptr()) = taken;
  return finite;
}

}  // namespace adalora::cpu
