"""The gradients with dx = g W from the BLAS (plan ``blas``), from g = ∂L/∂y, x and u = drop(x) Aᵀ.

    v = g B,   T = gᵀ u                        one pass over g (``g_pass``)
    dx = g W + drop'((v ⊙ λ) A)                g W through the BLAS; its low-rank term, in place, and
    dA = (v ⊙ λ)ᵀ drop(x)                      this share one pass over x (``x_pass``)
    dB = T ⊙ λ,  dE = c · mask ⊙ colsum(B ⊙ T)

Beside ``split``, dx is read and written once more, and its product runs at the BLAS's speed. Sums over tokens are taken
in two stages, the second in the order of the slabs (``slab_sums``): no float atomics.
"""

from __future__ import annotations

from torch import Tensor

from adalora_kernels.backends.triton.backward.frozen import frozen_gradients, frozen_product, has_low_rank
from adalora_kernels.backends.triton.backward.g_pass import pass_over_g
from adalora_kernels.backends.triton.backward.slab_sums import finish
from adalora_kernels.backends.triton.backward.x_pass import pass_over_x
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

    Arguments and results as in ``split``.
    """
    if not has_low_rank(grad_y, x, adapter):
        return frozen_gradients(grad_y, x, weight, adapter, needs)
    _, need_A, need_E, need_B = needs
    v, t = pass_over_g(grad_y, u, adapter, need_v=True, need_t=need_E or need_B)
    assert v is not None
    frozen = frozen_product(grad_y, weight, adapter.compute_dtype)
    dx, da = pass_over_x(x, v, frozen, adapter, True, need_A)
    return dx, *finish(t, da, adapter, needs, importance)


__all__ = ["backward"]
