// Host side of the stage that finishes a layer's gradients: checks, and the launch's arguments.
#include "cuda/finish.h"

#include <torch/csrc/stable/ops.h>

#include <limits>

#include "cuda/ops.h"
#include "cuda/stream.h"

namespace adalora::cuda {

namespace {

// Shares of fp32 [slabs, length, rank padded], contiguous.
void check_shares(const Tensor& shares, int64_t length, int64_t r, const char* name) {
  const bool fits = shares.dim() == 3 && shares.size(1) == length && shares.size(2) >= r;
  STD_TORCH_CHECK(fits, name, ": expected [slabs, ", length, ", at least ", r, "]");
  check_contiguous(shares, ScalarType::Float, shares.numel(), name);
}

// In 16 or 32 bits.
ScalarType scalar_type(DType dtype) {
  STD_TORCH_CHECK(dtype != DType::kFloat64, "params: expected 16 or 32 bits");
  if (dtype == DType::kFloat32) return ScalarType::Float;
  return dtype == DType::kBFloat16 ? ScalarType::BFloat16 : ScalarType::Half;
}

const float* floats(const std::optional<Tensor>& tensor, int64_t offset = 0) {
  return tensor.has_value() ? static_cast<const float*>(tensor->const_data_ptr()) + offset : nullptr;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> finish_gradients(const Tensor& t_shares, const Tensor& a_shares,
                                                    const Tensor& params, std::optional<Tensor> mask,
                                                    double scaling, const Tensor& before,
                                                    std::optional<Tensor> slopes, int64_t slopes_A, int64_t slopes_B,
                                                    std::optional<Tensor> scale, Tensor state, const Tensor& half,
                                                    int64_t first, Tensor sums, Tensor probes, Tensor ticket,
                                                    double beta1, double beta2) {
  const std::span<const View> theta = views_of(params, "params");
  STD_TORCH_CHECK(theta.size() == 3, "params: expected A, E and B");
  constexpr int64_t limit = std::numeric_limits<int32_t>::max() / 2;
  const int64_t r = theta[0].rows, k = theta[0].columns, n = theta[2].rows;
  STD_TORCH_CHECK(0 < r && r <= kFinishThreads, "params: expected a rank from 1 to ", kFinishThreads, ", got ", r);
  STD_TORCH_CHECK(0 < k && k < limit && 0 < n && n < limit, "params: expected 1 to ", limit, " rows and columns");
  const int64_t sizes[3] = {r, k, n};
  const std::vector<Operand> own = operands_of(theta, sizes, 1, "params", false);
  const std::vector<Operand> there = operands_of(views_of(before, "before"), sizes, 1, "before", true);
  check_shares(t_shares, n, r, "t_shares");
  check_shares(a_shares, k, r, "a_shares");
  STD_TORCH_CHECK(t_shares.size(2) == a_shares.size(2), "t_shares, a_shares: expected one padded rank");
  const int64_t elements = state.numel() / 4;
  check_contiguous(state, ScalarType::Float, 4 * elements, "state");
  STD_TORCH_CHECK(0 <= first && first + r * (k + 1 + n) <= elements, "first: expected a layer's place in the state");
  check_contiguous(half, ScalarType::Int, 1, "half");
  check_contiguous(sums, ScalarType::Float, r * (slots(k) + 1 + slots(n)), "sums");
  check_contiguous(probes, ScalarType::Float, 3 * kProbes, "probes");
  STD_TORCH_CHECK(ticket.numel() > 0 && ticket.scalar_type() == ScalarType::Int, "ticket: expected int32");
  check_beside(state, {&t_shares, &a_shares, &half, &sums, &probes, &ticket}, "state");
  if (mask.has_value()) {
    check_contiguous(*mask, ScalarType::Float, r, "mask");
    check_beside(state, {&*mask}, "mask");
  }
  STD_TORCH_CHECK(slopes.has_value() == scale.has_value(), "slopes, scale: expected both or neither");
  if (slopes.has_value()) {
    check_contiguous(*slopes, ScalarType::Float, slopes->numel(), "slopes");
    check_contiguous(*scale, ScalarType::Float, 1, "scale");
    check_beside(state, {&*slopes, &*scale}, "slopes, scale");
    for (const int64_t offset : {slopes_A, slopes_B})
      STD_TORCH_CHECK(0 <= offset && offset + r * r <= slopes->numel(), "slopes: expected those of this layer's rank");
  }

  const torch::stable::accelerator::DeviceGuard guard(state.get_device_index());
  Tensor grads[3] = {torch::stable::new_empty(state, {r, k}, scalar_type(own[0].dtype)),
                     torch::stable::new_empty(state, {r, 1}, scalar_type(own[1].dtype)),
                     torch::stable::new_empty(state, {n, r}, scalar_type(own[2].dtype))};
  const int64_t blocks = finish_blocks(static_cast<int32_t>(n), static_cast<int32_t>(r));
  Tensor column_sums = torch::stable::new_empty(state, {blocks, r});
  Finish layer{.smoothing = {beta1, beta2}};
  for (int64_t part = 0; part < 3; ++part) {
    STD_TORCH_CHECK(there[part].data == nullptr || there[part].dtype == own[part].dtype,
                    "before: expected the parameters' dtypes");
    layer.param[part] = own[part].data;
    layer.before[part] = there[part].data;
    layer.grad[part] = grads[part].mutable_data_ptr();
    layer.dtype[part] = static_cast<uint8_t>(own[part].dtype);
  }
  layer.t_shares = static_cast<const float*>(t_shares.const_data_ptr());
  layer.a_shares = static_cast<const float*>(a_shares.const_data_ptr());
  layer.slabs_t = static_cast<int32_t>(t_shares.size(0));
  layer.slabs_a = static_cast<int32_t>(a_shares.size(0));
  layer.rank_padded = static_cast<int32_t>(t_shares.size(2));
  layer.r = static_cast<int32_t>(r);
  layer.k = static_cast<int32_t>(k);
  layer.n = static_cast<int32_t>(n);
  layer.mask = floats(mask);
  layer.scaling = static_cast<float>(scaling);
  layer.slopes[0] = floats(slopes, slopes_A);
  layer.slopes[2] = floats(slopes, slopes_B);
  layer.scale = floats(scale);
  layer.state = static_cast<float*>(state.mutable_data_ptr());
  layer.half = static_cast<const int32_t*>(half.const_data_ptr());
  layer.elements = elements;
  layer.offset = first;
  layer.sums = static_cast<float*>(sums.mutable_data_ptr());
  layer.probes = static_cast<float*>(probes.mutable_data_ptr());
  layer.column_sums = static_cast<float*>(column_sums.mutable_data_ptr());
  layer.ticket = static_cast<int32_t*>(ticket.mutable_data_ptr());
  const cudaError_t error = finish(layer, current_stream(state.get_device_index()));
  STD_TORCH_CHECK(error == cudaSuccess, "finish_gradients: ", cudaGetErrorString(error));
  return {grads[0], grads[1], grads[2]};
}

}  // namespace adalora::cuda
