"""All gradients on the way of one product (plan ``one_gemm``), from g = ∂L/∂y, x and u = drop(x) Aᵀ.

    dx = g W + drop'((v ⊙ λ) A)           with v = g B
    dA = (v ⊙ λ)ᵀ drop(x),   dB = T ⊙ λ,   dE = c · mask ⊙ colsum(B ⊙ T)      with T = gᵀ u

The tiles of dx that hold g's rows anyway make v and T, and every tile makes its share of dA in its tail (``gemm``). A
second launch adds the shares in the order of the slabs of rows that left them (``slab_sums``): no float atomics, so two
runs agree bit for bit. Beyond the frozen product's traffic: x, M Rpad of v, and the shares, written once and read once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adalora_kernels.backends.triton import tiles
from adalora_kernels.backends.triton.backward.frozen import frozen_gradients, has_low_rank
from adalora_kernels.backends.triton.backward.gemm import multiply
from adalora_kernels.backends.triton.backward.slab_sums import finish
from adalora_kernels.reference.handover import LayerImportance
from adalora_kernels.reference.svd_linear import Adapter


def backward(
    grad_y: Tensor,
    x: Tensor,
    u: Tensor,
    weight: Tensor,
    adapter: Adapter,
    needs: tuple[bool, bool, bool, bool],
    importance: LayerImportance | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """As ``reference.svd_linear.backward`` with a weight and with dx asked for; the rest only where ``needs`` says so.

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
    _, need_A, need_E, need_B = needs
    rank_padded = tiles.rank_padding(adapter.lora_A.shape[0])
    v = torch.empty((x.shape[0], rank_padded), dtype=adapter.compute_dtype, device=x.device)
    made = multiply(grad_y, x, u if need_E or need_B else None, weight, adapter, v, make_v=True, with_da=need_A)
    return made.dx, *finish(made.t, made.da, adapter, needs, importance)


__all__ = ["backward"]
