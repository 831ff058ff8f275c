"""The gradients of a call without a low-rank term: no rank, no tokens, or no features. dx = g W, the others are 0."""

from __future__ import annotations

import torch
from torch import Tensor

from adalora_kernels.reference.svd_linear import Adapter


def has_low_rank(grad_y: Tensor, x: Tensor, adapter: Adapter) -> bool:
    """Whether any sum of the low-rank term has an element."""
    return adapter.lora_A.shape[0] > 0 and x.numel() > 0 and grad_y.numel() > 0


def frozen_product(grad_y: Tensor, weight: Tensor, compute_dtype: torch.dtype) -> Tensor:
    """g W by the BLAS, [M, K] in the dtype of the products."""
    return grad_y.to(compute_dtype) @ weight.to(compute_dtype)


def frozen_gradients(
    grad_y: Tensor, x: Tensor, weight: Tensor | None, adapter: Adapter, needs: tuple[bool, bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dx, dA, dE, dB as ``reference.svd_linear.backward`` where ``has_low_rank`` is false."""
    dx = None
    if needs[0]:
        dx = (
            torch.zeros_like(x) if weight is None else frozen_product(grad_y, weight, adapter.compute_dtype).to(x.dtype)
        )
    dA, dE, dB = (torch.zeros_like(t) if need else None for t, need in zip(adapter[:3], needs[1:], strict=True))
    return dx, dA, dE, dB


__all__ = ["frozen_gradients", "frozen_product", "has_low_rank"]
