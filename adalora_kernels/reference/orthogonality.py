"""The orthogonality of P and Q: how far A Aᵀ and Bᵀ B are from the identity (AdaLoRA, equation 4).

The published codes use γ · mean of ‖A Aᵀ - I‖_F and ‖Bᵀ B - I‖_F over all 2n matrices, not squared; the paper squares
and sums. With C = A Aᵀ - I: ∂‖C‖_F/∂A = (2/‖C‖_F) C A, 0 where C = 0, and ∂‖C‖_F²/∂A = 4 C A; for B, B C in place of C
A.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def orthogonality(
    lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], weight: float, squared: bool, need_grad: bool
) -> tuple[Tensor, list[Tensor]]:
    """Value and gradient of the regulariser over all matrices.

    Args:
        lora_A: the [R, K] matrices.
        lora_B: the [N, R] matrices.
        weight: γ.
        squared: False for γ · mean ‖·‖_F (the published codes), True for γ · Σ ‖·‖_F² (the paper).
        need_grad: whether the gradients are wanted.

    Returns:
        The value, 0-d, in fp32 (fp64 if any matrix is fp64), and the gradients of A₀, A₁, …, B₀, B₁, … in the matrices'
        dtypes (an empty list where not wanted).

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
    grads = []
    for i, matrix in enumerate(matrices):
        rows = (matrix if i < len(lora_A) else matrix.t()).detach().to(dtype)
        deviation = rows @ rows.t() - torch.eye(rows.shape[0], dtype=dtype, device=rows.device)
        norm = torch.linalg.matrix_norm(deviation)
        value = value + factor * (norm**2 if squared else norm).to(value.device)
        if need_grad:
            slope = norm.new_full((), 4.0) if squared else torch.where(norm > 0, 2.0 / norm, torch.zeros_like(norm))
            grad = (factor * slope) * (deviation @ rows)
            grads.append((grad if i < len(lora_A) else grad.t()).to(matrix.dtype).contiguous())
    return value, grads


def add_scaled(targets: Sequence[Tensor], terms: Sequence[Tensor], scale: Tensor) -> None:
    """targets += scale · terms, over lists of tensors of equal shapes; scale has one element."""
    for target, term in zip(targets, terms, strict=True):
        target.add_(term * scale.to(term.dtype))


__all__ = ["add_scaled", "orthogonality"]
