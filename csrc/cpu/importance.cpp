// One step of the averages of all layers, and the score of every triplet (csrc/common/importance.h). One sweep reads
// θ, g, Ī, Ū and writes the other half of Ī, Ū: 24 bytes an element in fp32.
//
// `shapes`: R, K, N of each layer. The parameters come as A₀, E₀, B₀, A₁, …; a gradient may be missing.
#include "cpu/simd/importance.h"

#include "cpu/averages.h"
#include "cpu/ops.h"
#include "cpu/triplet_sweep.h"

namespace adalora::cpu {

namespace {

// Takes gradients of layers whose first element is number `first` of the averages into the other half, and scores
// their triplets if all was finite.
template <typename T>
bool update(const Averages& averages, int64_t first, T* scores, const int64_t* shapes, int64_t layers,
            const std::vector<Operand>& params, const std::vector<Operand>& grads, const Smoothing<T>& smoothing,
            bool (*run)(const Run<T>&, const Smoothing<T>&)) {
  std::vector<double> sums;
  const std::vector<triplet_sweep::Item> items = triplet_sweep::cut(shapes, layers, sums);
  const int64_t elements = averages.elements;
  const T* old = averages.current<T>() + first;
  T* fresh = averages.next<T>() + first;
  const auto segment = [&](const triplet_sweep::Item& item, int64_t begin, int64_t count, T* scratch) {
    const int64_t element = item.begin + begin;
    const Operand param = params[item.tensor].from(element), grad = grads[item.tensor].from(element);
    const int64_t offset = item.offset + begin;
    return run({param.data, grad.data, param.dtype, grad.dtype, old + offset, old + elements + offset, fresh + offset,
                fresh + elements + offset, count, scratch, item.period, scratch + item.period, averages.streamed()},
               smoothing);
  };
  if (!triplet_sweep::run<T>(items, elements, 2, segment)) return false;
  triplet_sweep::score(items, shapes, layers, scores);
  return true;
}

// `update` in the dtype of the averages; scores from element `rank` on.
bool update_any(const Tensor& state, const Averages& averages, int64_t first, const Tensor& scores, int64_t rank,
                const int64_t* shapes, int64_t layers, const std::vector<Operand>& params,
                const std::vector<Operand>& grads, double beta1, double beta2) {
  const auto& kernels = ADALORA_KERNELS(importance_kernels);
  void* out = scores.mutable_data_ptr();
  if (state.scalar_type() == ScalarType::Double)
    return update<double>(averages, first, static_cast<double*>(out) + rank, shapes, layers, params, grads,
                          {beta1, beta2}, kernels.run_double);
  return update<float>(averages, first, static_cast<float*>(out) + rank, shapes, layers, params, grads, {beta1, beta2},
                       kernels.run_float);
}

}  // namespace

Tensor importance_update(Tensor state, Tensor half, Tensor scores, const Tensor& shapes, const Tensor& params,
                         const Tensor& grads, double beta1, double beta2) {
  const int64_t layers = check_table(shapes, 3, "shapes");
  const int64_t* sizes = static_cast<const int64_t*>(shapes.const_data_ptr());
  const Averages averages = averages_of(state, half, scores, sizes, layers);
  const std::vector<Operand> read_params = operands_of(views_of(params, "params"), sizes, layers, "params", false);
  const std::vector<Operand> read_grads = operands_of(views_of(grads, "grads"), sizes, layers, "grads", true);
  const bool taken =
      update_any(state, averages, 0, scores, 0, sizes, layers, read_params, read_grads, beta1, beta2);
  if (taken) averages.flip();
  Tensor finite = torch::stable::empty({1}, ScalarType::Bool);
  *static_cast<bool*>(finite.mutable_data_ptr()) = taken;
  return finite;
}

void importance_layer(Tensor state, const Tensor& half, Tensor scores, Tensor finite, const Tensor& shapes,
                      int64_t layer, const Tensor& params, const Tensor& grads, std::optional<Tensor> slopes,
                      int64_t slopes_A, int64_t slopes_B, std::optional<Tensor> scale, double beta1, double beta2) {
  const int64_t layers = check_table(shapes, 3, "shapes");
  STD_TORCH_CHECK(layer >= 0 && layer < layers, "layer: expected one of ", layers, ", got ", layer);
  const int64_t* sizes = static_cast<const int64_t*>(shapes.const_data_ptr());
  const Averages averages = averages_of(state, half, scores, sizes, layers);
  check_contiguous(finite, ScalarType::Bool, layers, "finite");
  int64_t first = 0, rank = 0;
  for (int64_t i = 0; i < layer; ++i) {
    first += sizes[i] * (sizes[layers + i] + 1 + sizes[2 * layers + i]);
    rank += sizes[i];
  }
  const int64_t own[3] = {sizes[layer], sizes[layers + layer], sizes[2 * layers + layer]};
  const std::span<const View> theta = views_of(params, "params"), gradients = views_of(grads, "grads");
  const std::vector<Operand> read_params = operands_of(theta, own, 1, "params", false);
  const std::vector<Operand> read_grads = operands_of(gradients, own, 1, "grads", true);
  if (slopes.has_value()) {
    STD_TORCH_CHECK(scale.has_value(), "scale: expected one beside the slopes");
    const double factor = number_of(*scale, "scale");
    add_orthogonality_gradient(theta[0], false, *slopes, slopes_A, factor, gradients[0]);
    add_orthogonality_gradient(theta[2], true, *slopes, slopes_B, factor, gradients[2]);
  }
  static_cast<bool*>(finite.mutable_data_ptr())[layer] =
      update_any(state, averages, first, scores, rank, own, 1, read_params, read_grads, beta1, beta2);
}

}  // namespace adalora::cpu
