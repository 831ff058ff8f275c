"""The AdaLoRA layer: y = x Wᵀ + b + (drop(x) Aᵀ ⊙ λ) Bᵀ with λ = c · E ⊙ mask (AdaLoRA, arXiv 2303.10512, equation 3).

Only the raw low-rank product u = drop(x) Aᵀ is kept for the backward: neither Λ nor c is folded into it, so that one u
serves dB and dE, also where Λ is zero.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from adalora_kernels.reference import philox


class Adapter(NamedTuple):
    """The low-rank branch of one call of the layer.

    Attributes:
        lora_A, lora_E, lora_B: [R, K], [R, 1] or [R], [N, R] in any floating dtype.
        mask: [R] or [R, 1], any dtype that converts to a number, or None.
        seed: int64 [1], the dropout seed; None where nothing is dropped.
        scaling: c, the factor of the whole increment.
        dropout_p: probability that an element of x is dropped before A.
        compute_dtype: dtype of the products and of the result.
    """

    lora_A: Tensor
    lora_E: Tensor
    lora_B: Tensor
    mask: Tensor | None
    seed: Tensor | None
    scaling: float
    dropout_p: float
    compute_dtype: torch.dtype


def singular_values(lora_E: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """λ = c · E ⊙ mask, [R], in fp32 (fp64 for fp64 adapters)."""
    lam = lora_E.reshape(-1).to(torch.promote_types(lora_E.dtype, torch.float32)) * scaling
    return lam if mask is None else lam * mask.reshape(-1).to(lam.dtype)


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base: Tensor | None,
    adapter: Adapter,
) -> tuple[Tensor, Tensor]:
    """Output and raw low-rank product of one layer.

    Args:
        x: [M, K], any strides; read as the adapter's ``compute_dtype``.
        weight: frozen W [N, K], any strides; None where ``base`` is given.
        bias: [N] or None; only with ``weight``.
        base: [M, N] output of a base that is not a plain weight. The increment is added into it in place.
        adapter: the low-rank branch.

    Returns:
        y [M, N] in ``compute_dtype`` (``base`` itself where that was given) and u [M, R] in ``compute_dtype``.
    """
    lora_A, lora_E, lora_B, mask, seed, scaling, dropout_p, compute_dtype = adapter
    xc = x.to(compute_dtype)
    xd = xc if seed is None else philox.dropout(xc, dropout_p, seed)
    u = xd @ lora_A.to(compute_dtype).t()
    lam = singular_values(lora_E, mask, scaling)
    increment = (u * lam).to(compute_dtype) @ lora_B.to(compute_dtype).t()
    if base is not None:
        return base.add_(increment), u
    assert weight is not None
    y = F.linear(xc, weight.to(compute_dtype), None if bias is None else bias.to(compute_dtype))
    return y + increment, u


def backward(
    grad_y: Tensor,
    x: Tensor,
    u: Tensor,
    weight: Tensor | None,
    adapter: Adapter,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x and of the adapter, by the explicit formulas.

    With v = g B (raw): dx = g W + drop'((v ⊙ λ) A), dA = (v ⊙ λ)ᵀ drop(x), T = gᵀ u, dB = T ⊙ λ,
    dE = c · mask ⊙ colsum(B ⊙ T). dE takes no sum over tokens and no division by Λ, which is zero at the start.

    Args:
        grad_y: g [M, N], any strides.
        u: [M, ≥R] from ``forward``; columns past R are padding.
        needs: whether dx, dA, dE, dB are asked for.
        The others as in ``forward``; ``weight`` None leaves the base's share out of dx.

    Returns:
        dx [M, K] in x's dtype, dA, dE, dB in their parameters' shapes and dtypes; None for what was not asked for.
    """
    lora_A, lora_E, lora_B, mask, seed, scaling, dropout_p, compute_dtype = adapter
    need_x, need_A, need_E, need_B = needs
    g = grad_y.to(compute_dtype)
    lam = singular_values(lora_E, mask, scaling)
    dx = dA = dE = dB = None
    if need_x or need_A:
        v_scaled = ((g @ lora_B.to(compute_dtype)) * lam).to(compute_dtype)
        if need_x:
            low_rank = v_scaled @ lora_A.to(compute_dtype)
            if seed is not None:
                low_rank = philox.dropout(low_rank, dropout_p, seed)
            dx = (low_rank if weight is None else g @ weight.to(compute_dtype) + low_rank).to(x.dtype)
        if need_A:
            xc = x.to(compute_dtype)
            xd = xc if seed is None else philox.dropout(xc, dropout_p, seed)
            dA = (v_scaled.t() @ xd).to(lora_A.dtype)
    if need_E or need_B:
        T = (g.t() @ u[:, : lora_A.shape[0]]).to(lam.dtype)
        if need_B:
            dB = (T * lam).to(lora_B.dtype)
        if need_E:
            dE = scaling * (lora_B.to(lam.dtype) * T).sum(0)
            if mask is not None:
                dE = dE * mask.reshape(-1).to(lam.dtype)
            dE = dE.reshape(lora_E.shape).to(lora_E.dtype)
    return dx, dA, dE, dB


__all__ = ["Adapter", "backward", "forward", "singular_values"]
