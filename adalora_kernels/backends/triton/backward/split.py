"""The gradients in passes of their own (plan ``split``), from g = ∂L/∂y, x and u = drop(x) Aᵀ.

    v = g B,   T = gᵀ u                        one pass over g (``g_pass``)
    dx = g W + drop'((v ⊙ λ) A)                one product with a low-rank tail (``gemm``)
    dA = (v ⊙ λ)ᵀ drop(x)                      one pass over x (``x_pass``)
    dB = T ⊙ λ,  dE = c · mask ⊙ colsum(B ⊙ T)

Without a weight dx is the low-rank term alone, and shares the pass over x. Sums over tokens are taken in two stages,
the second in the order of the slabs (``slab_sums``): no float atomics, so two runs agree bit for bit. Only the passes
that something asked for needs are made.
"""

from __future__ import annotations

from torch import Tensor

from adalora_kernels.backends.triton.backward.frozen import frozen_gradients, has_low_rank
from adalora_kernels.backends.triton.backward.g_pass import pass_over_g
from adalora_kernels.backends.triton.backward.gemm import multiply
from adalora_kernels.backends.triton.backward.slab_sums import finish
from adalora_kernels.backends.triton.backward.x_pass import pass_over_x
from adalora_kernels.reference.handover import LayerImportance
from adalora_kernels.reference.svd_linear import Adapter


def backward(
    grad_y: Tensor,
    x: Tensor,
    u: Tensor,
    weight: Tensor | None,
    adapter: Adapter,
    needs: tuple[bool, bool, bool, bool],
    importance: LayerImportance | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """As ``reference.svd_linear.backward``; only what ``needs`` asks for is computed.

    Args:
        grad_y: g [M, N], any strides, fp32, fp16 or bf16 (the others likewise, each on its own).
        u: [M, ≥R], any strides.
        importance: of this layer, to be updated where its gradients are finished (``slab_sums``).
        The others as in the reference.

    Returns:
        dx [M, K] in x's dtype, dA, dE, dB in their parameters' shapes and dtypes; None for what was not asked for.
    """
    if not has_low_rank(grad_y, x, adapter):
        return frozen_gradients(grad_y, x, weight, adapter, needs)
    need_x, need_A, need_E, need_B = needs
    v, t = pass_over_g(grad_y, u, adapter, need_v=need_x or need_A, need_t=need_E or need_B)
    dx = da = None
    if v is not None:
        if need_x and weight is not None:
            dx = multiply(grad_y, x, None, weight, adapter, v, make_v=False, with_da=False).dx
            need_x = False
        if need_x or need_A:
            low_rank, da = pass_over_x(x, v, None, adapter, need_x, need_A)
            dx = low_rank if dx is None else dx
    return dx, *finish(t, da, adapter, needs, importance)


__all__ = ["backward"]
