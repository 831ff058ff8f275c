// The stage that finishes a layer's gradients as its host code starts it, for ctypes.
#include "cuda/finish.h"

#include "memory.h"

using namespace adalora;

// What went wrong, or nothing. `numbers`: slabs of T and of dA, padded rank, R, K, N, elements of the state, this
// layer's first of them, and the dtypes of A, E, B. `tensors`: shares of T and of dA, A, E, B, their gradients before,
// and those to write, mask, slopes of A and of B, their scale, state, half, sums, probes, ticket.
extern "C" const char* finish(const int64_t* numbers, void* const* tensors, double scaling, double beta1,
                              double beta2) {
  return emulated::problem_of([&] {
    const auto number = [&](int i) { return static_cast<int32_t>(numbers[i]); };
    const auto floats = [&](int i) { return static_cast<float*>(tensors[i]); };
    cuda::Finish layer{.smoothing = {beta1, beta2}};
    layer.slabs_t = number(0);
    layer.slabs_a = number(1);
    layer.rank_padded = number(2);
    layer.r = number(3);
    layer.k = number(4);
    layer.n = number(5);
    layer.elements = numbers[6];
    layer.offset = numbers[7];
    layer.t_shares = floats(0);
    layer.a_shares = floats(1);
    for (int part = 0; part < 3; ++part) {
      layer.dtype[part] = static_cast<uint8_t>(numbers[8 + part]);
      layer.param[part] = tensors[2 + part];
      layer.before[part] = tensors[5 + part];
      layer.grad[part] = tensors[8 + part];
    }
    layer.mask = floats(11);
    layer.slopes[0] = floats(12);
    layer.slopes[2] = floats(13);
    layer.scale = floats(14);
    layer.scaling = static_cast<float>(scaling);
    layer.state = floats(15);
    layer.half = static_cast<int32_t*>(tensors[16]);
    layer.sums = floats(17);
    layer.probes = floats(18);
    layer.ticket = static_cast<int32_t*>(tensors[19]);
    emulated::Scratch<float> column_sums(int64_t{cuda::finish_blocks(layer.n, layer.r)} * layer.r, 0xff);  // NaN
    layer.column_sums = column_sums.data();
    const cudaError_t error = cuda::finish(layer, nullptr);
    column_sums.check_margins();
    return error;
  });
}
