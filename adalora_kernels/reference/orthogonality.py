"""The orthogonality of P and Q: how far A Aᵀ and Bᵀ B are from the identity (AdaLoRA, equation 4).

The published codes use γ · mean of ‖A Aᵀ - I‖_F and ‖Bᵀ B - I‖_F over all 2n matrices, not squared; the paper squares
and sums. With C = A Aᵀ - I: ∂‖C‖_F/∂A = (2/‖C‖_F) C A, 0 where C = 0, and ∂‖C‖_F²/∂A = 4 C A; for B, B C in place of C
A. So all that the backward needs from the forward is one R × R matrix D for each, its slopes: the gradient is D A, or
B D.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def orthogonality(
    lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], weight: float, squared: bool
) -> tuple[Tensor, Tensor]:
    """Value and slopes of the regulariser over all matrices.

    Args:
        lora_A: the [R, K] matrices.
        lora_B: the [N, R] matrices.
        weight: γ.
        squared: False for γ · mean ‖·‖_F (the published codes), True for γ · Σ ‖·‖_F² (the paper).

    Returns:
        The value, 0-d, in fp32 (fp64 if any matrix is fp64), and in the same dtype the slopes of A₀, A₁, …, B₀, B₁, …,
        one after the other, R² numbers each: γ/(2n) · (2/‖C‖_F) C, or γ · 4 C.

    Raises:
        ValueError: matrices that are not 2-d, or on several devices.
    """
    matrices = [*lora_A, *lora_B]
    if {m.dim() for m in matrices} != {2} or len({m.device for m in matrices}) > 1:
        raise ValueError(
            "lora_A, lora_B: expected 2-d matrices on one device, got "
            + ", ".join(sorted({f"{m.dim()}-d on {m.device}" for m in matrices}))
        )
    dtype = torch.float64 if any(m.dtype == torch.float64 for m in matrices) else torch.float32
    factor = weight if squared else weight / len(matrices)
    value = torch.zeros((), dtype=dtype, device=matrices[0].device)
    slopes = []
    for i, matrix in enumerate(matrices):
        rows = (matrix if i < len(lora_A) else matrix.t()).detach().to(dtype)
        deviation = rows @ rows.t() - torch.eye(rows.shape[0], dtype=dtype, device=rows.device)
        norm = torch.linalg.matrix_norm(deviation)
        value = value + factor * (norm**2 if squared else norm)
        slope = norm.new_full((), 4.0) if squared else torch.where(norm > 0, 2.0 / norm, torch.zeros_like(norm))
        slopes.append((factor * slope) * deviation.reshape(-1))
    return value, torch.cat(slopes)


def orthogonality_gradients(
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    slopes: Tensor,
    scale: Tensor,
    grads: Sequence[Tensor],
    add: bool,
) -> None:
    """The gradients of all matrices, from the slopes.

    Args:
        lora_A, lora_B: as in ``orthogonality``, unchanged since.
        slopes: as ``orthogonality`` returned them.
        scale: the gradient of the value, one element.
        grads: of A₀, A₁, …, B₀, B₁, …: contiguous tensors of their shapes and dtypes. Updated in place.
        add: whether to add to what they hold, rather than to write over it.
    """
    offset = 0
    for i, (matrix, grad) in enumerate(zip((*lora_A, *lora_B), grads, strict=True)):
        rows = (matrix if i < len(lora_A) else matrix.t()).detach().to(slopes.dtype)
        slope = slopes[offset : offset + rows.shape[0] ** 2].view(rows.shape[0], rows.shape[0])
        offset += slope.numel()
        gradient = (scale.to(slopes.dtype) * slope) @ rows
        gradient = gradient if i < len(lora_A) else gradient.t()
        grad.copy_(gradient + grad.to(slopes.dtype) if add else gradient)


__all__ = ["orthogonality", "orthogonality_gradients"]
