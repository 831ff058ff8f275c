#include "cuda/plan.h"

#include <torch/headeronly/util/Exception.h>

#include <limits>

namespace adalora::cuda {

Plan plan_of(const int64_t* sizes, int64_t layers, const std::vector<Operand>& params,
             const std::vector<Operand>& grads, const bool* known) {
  constexpr int64_t limit = std::numeric_limits<int32_t>::max();
  Plan plan;
  for (int64_t i = 0; i < layers; ++i) {
    const int64_t r = sizes[i], k = sizes[layers + i], n = sizes[2 * layers + i];
    STD_TORCH_CHECK(r < limit / 8 && k < limit / 2 && n < limit / 2, "shapes: layer ", i, " is too large");
    if (r == 0) continue;
    if (plan.launches.back().count == kLayersPerLaunch) plan.launches.emplace_back();
    Layers& launch = plan.launches.back();
    Layer& layer = launch.layer[launch.count++];
    for (int64_t part = 0; part < 3; ++part) {
      const Operand &param = params[3 * i + part], &grad = grads[3 * i + part];
      layer.param[part] = param.data;
      layer.param_dtype[part] = static_cast<uint8_t>(param.dtype);
      layer.grad[part] = grad.data;
      layer.grad_dtype[part] = static_cast<uint8_t>(grad.dtype);
      layer.known[part] = known != nullptr && known[3 * i + part] && grad.data != nullptr;
    }
    layer.offset = plan.elements;
    layer.r = static_cast<int32_t>(r);
    layer.k = static_cast<int32_t>(k);
    layer.n = static_cast<int32_t>(n);
    layer.rank_offset = static_cast<int32_t>(plan.rank);
    layer.sums = static_cast<int32_t>(plan.sums);
    layer.block = launch.blocks;
    layer.number = static_cast<int32_t>(i);
    layer.left = static_cast<int32_t>(plan.left);
    launch.blocks += blocks_of(layer);
    plan.blocks += blocks_of(layer);
    plan.sums += sums_of(layer);
    plan.left += r * (slots(layer.k) + 1 + slots(layer.n));
    plan.elements += r * (k + 1 + n);
    plan.rank += r;
    STD_TORCH_CHECK(plan.sums < limit && plan.left < limit && plan.blocks < limit, "shapes: the model is too large");
  }
  return plan;
}

}  // namespace adalora::cuda
