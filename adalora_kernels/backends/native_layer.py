"""The layer on the CPU: y = x Wᵀ + b + (u ⊙ λ) Bᵀ, the low-rank term accumulated into the frozen product.

In fp32 and with contiguous rows the low-rank term is ``native_lowrank``'s: two passes over the rows, one per direction.
Anything else goes through the BLAS, where beyond the frozen products a call reads x twice (u, dA), g twice (v, T), and
y and dx once more to add to them. There T is computed as (uᵀ g)ᵀ, so that the long dimension is contiguous in the
skinny product: half the time of gᵀ u.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from adalora_kernels.backends import native_lowrank
from adalora_kernels.reference.svd_linear import Adapter, singular_values


def _dropped(x: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    if seed is None:
        return x
    from adalora_kernels.backends.native import dropout

    return dropout(x, dropout_p, seed)


def _add_product(out: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """out += left @ right, in place; a foreign base may answer in another dtype than the products'."""
    if out.dtype == left.dtype:
        return out.addmm_(left, right)
    return out.add_(left @ right)


def svd_linear_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base: Tensor | None,
    adapter: Adapter,
) -> tuple[Tensor, Tensor]:
    """As ``reference.svd_linear.forward``."""
    lora_A, lora_E, lora_B, mask, seed, scaling, dropout_p, compute_dtype = adapter
    xc = x.to(compute_dtype)
    if base is None:
        assert weight is not None
        base = F.linear(xc, weight.to(compute_dtype), None if bias is None else bias.to(compute_dtype))
    if lora_A.shape[0] == 0:
        return base, xc.new_empty(xc.shape[0], 0)
    xd = _dropped(xc, dropout_p, seed)
    if native_lowrank.fits(lora_A, lora_E, lora_B, xd, base):
        u = native_lowrank.forward(xd, lora_A, lora_E, lora_B, mask, scaling, base)
        if weight is None:
            torch.autograd.graph.increment_version(base)
        return base, u
    u = xd @ lora_A.to(compute_dtype).t()
    scaled = (u * singular_values(lora_E, mask, scaling)).to(compute_dtype)
    return _add_product(base, scaled, lora_B.to(compute_dtype).t()), u


def svd_linear_backward(
    grad_y: Tensor,
    x: Tensor,
    u: Tensor,
    weight: Tensor | None,
    adapter: Adapter,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """As ``reference.svd_linear.backward``."""
    lora_A, lora_E, lora_B, mask, seed, scaling, dropout_p, compute_dtype = adapter
    need_x, need_A, need_E, need_B = needs
    g = grad_y.to(compute_dtype)
    if native_lowrank.fits(lora_A, lora_E, lora_B, g, x) and u.is_contiguous():
        return _fused_backward(g, x, u, weight, adapter, needs)
    lam = singular_values(lora_E, mask, scaling)
    dx = dA = dE = dB = None
    if need_x or need_A:
        v_scaled = ((g @ lora_B.to(compute_dtype)) * lam).to(compute_dtype)
        if need_x:
            dx = _input_gradient(g, v_scaled, weight, lora_A.to(compute_dtype), seed, dropout_p).to(x.dtype)
        if need_A:
            dA = (v_scaled.t() @ _dropped(x.to(compute_dtype), dropout_p, seed)).to(lora_A.dtype)
    if need_E or need_B:
        Tt = (u.t() @ g).to(lam.dtype)
        if need_B:
            dB = (Tt.t() * lam).to(lora_B.dtype).contiguous()
        if need_E:
            dE = scaling * torch.linalg.vecdot(lora_B.t().to(lam.dtype), Tt)
            if mask is not None:
                dE = dE * mask.reshape(-1).to(lam.dtype)
            dE = dE.reshape(lora_E.shape).to(lora_E.dtype)
    return dx, dA, dE, dB


def _fused_backward(
    g: Tensor,
    x: Tensor,
    u: Tensor,
    weight: Tensor | None,
    adapter: Adapter,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    lora_A, lora_E, lora_B, mask, seed, scaling, dropout_p, _ = adapter
    need_x, need_A, need_E, need_B = needs
    frozen = g @ weight.to(g.dtype) if need_x and weight is not None else None
    adds = frozen is not None and seed is None
    dx = None if not need_x else frozen if adds else x.new_empty(x.shape)
    xd = _dropped(x, dropout_p, seed) if need_A else x
    dA, dE, dB = native_lowrank.backward(
        g, xd, u, lora_A, lora_E, lora_B, mask, scaling, dx, adds, need_A, need_E or need_B
    )
    if dx is not None and seed is not None:
        dx = _dropped(dx, dropout_p, seed)
        dx = dx if frozen is None else frozen.add_(dx)
    return dx, dA if need_A else None, dE if need_E else None, dB if need_B else None


def _input_gradient(
    g: Tensor, v_scaled: Tensor, weight: Tensor | None, lora_A: Tensor, seed: Tensor | None, dropout_p: float
) -> Tensor:
    if weight is None:
        return _dropped(v_scaled @ lora_A, dropout_p, seed)
    dx = g @ weight.to(g.dtype)
    if lora_A.shape[0] == 0:
        return dx
    return dx.addmm_(v_scaled, lora_A) if seed is None else dx.add_(_dropped(v_scaled @ lora_A, dropout_p, seed))


__all__ = ["svd_linear_backward", "svd_linear_forward"]
