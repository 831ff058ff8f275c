"""The layer's low-rank term on the CPU in fp32, one call for the forward and one for the backward.

A forward adds (u ⊙ λ) Bᵀ into y with u = x Aᵀ; a backward adds v A into dx with v = (g B) ⊙ λ and returns dA = vᵀ x,
dB = gᵀ u ⊙ λ, dE = c mask ⊙ colsum(B ⊙ gᵀ u). Beyond the frozen products memory sees x once and y twice, then g and x
once and dx twice. Bitwise repeatable, whatever the number of threads.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

MAX_RANK = 64


def fits(lora_A: Tensor, lora_E: Tensor, lora_B: Tensor, *rows: Tensor) -> bool:
    """Whether the kernels read these: all fp32, the adapter contiguous, ``rows`` [M, ...] each of contiguous rows."""
    for t in (lora_A, lora_E, lora_B):
        if t.dtype is not torch.float32 or not t.is_contiguous():
            return False
    for t in rows:
        # Rows that overlap, as broadcast ones do, are no place to add to.
        if t.dtype is not torch.float32 or t.stride(1) != 1 or t.stride(0) < t.shape[1]:
            return False
    return 0 < lora_A.shape[0] <= MAX_RANK and lora_A.shape[1] > 0 and lora_B.shape[0] > 0


def forward(
    x: Tensor,
    lora_A: Tensor,
    lora_E: Tensor,
    lora_B: Tensor,
    mask: Tensor | None,
    scaling: float,
    y: Tensor,
) -> Tensor:
    """Add the low-rank term of x [M, K] into y [M, N], in place, unseen by autograd; the result is u = x Aᵀ [M, R]."""
    u: Tensor = _ops().lowrank_forward(x, lora_A, lora_E, lora_B, _values(mask), scaling, y)
    return u


def backward(
    grad_y: Tensor,
    x: Tensor,
    u: Tensor,
    lora_A: Tensor,
    lora_E: Tensor,
    lora_B: Tensor,
    mask: Tensor | None,
    scaling: float,
    dx: Tensor | None,
    accumulate: bool,
    need_A: bool,
    need_B: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the low-rank term: into dx [M, K] where it is given, added to it if ``accumulate``, else instead.

    Returns:
        dA [R, K], dE shaped as ``lora_E``, dB [N, R]; dE comes with dB, and what is not needed is empty.
    """
    grads: tuple[Tensor, Tensor, Tensor] = _ops().lowrank_backward(
        grad_y, x, u, lora_A, lora_E, lora_B, _values(mask), scaling, dx, accumulate, need_A, need_B
    )
    return grads


def _values(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.to(torch.float32).contiguous()


@cache
def _ops() -> Any:
    from adalora_kernels.backends.native import unavailable_reason

    if (reason := unavailable_reason("cpu")) is not None:
        raise RuntimeError(f"backend native: {reason}")
    return torch.ops.adalora_native


__all__ = ["backward", "fits", "forward"]
