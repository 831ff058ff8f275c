"""The orthogonality regulariser of all layers at once, as one differentiable number."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from adalora_kernels.backends.select import Backend, implementation, select


def orthogonality_loss(
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    weight: float,
    squared: bool = False,
    *,
    backend: str | Backend | None = None,
) -> Tensor:
    """γ · mean of ‖A Aᵀ - I‖_F and ‖Bᵀ B - I‖_F over all matrices, or γ · Σ of their squares (AdaLoRA, equation 4).

    Value and gradient come from the same pass; the gradient is computed only where something requires it.

    Args:
        lora_A: the [R, K] matrices.
        lora_B: the [N, R] matrices.
        weight: γ, at least 0.
        squared: False for the published codes' unsquared mean, True for the paper's squared sum.
        backend: "reference", "native", or None for the best that can run.

    Returns:
        The value with γ in it, 0-d, fp32 (fp64 if any matrix is fp64).

    Raises:
        ValueError: no matrices, a negative weight, or matrices on several devices.
        RuntimeError: the backend asked for can't run.
    """
    matrices = (*lora_A, *lora_B)
    if not matrices:
        raise ValueError("lora_A, lora_B: expected at least one matrix, got none")
    if weight < 0:
        raise ValueError(f"weight: expected at least 0, got {weight}")
    return _Orthogonality.apply(float(weight), squared, backend, len(lora_A), *matrices)


class _Orthogonality(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: float, squared: bool, backend: str | Backend | None, n_A: int, *matrices: Tensor
    ) -> Tensor:
        ctx.launch = partial(_launch, weight=weight, squared=squared, backend=backend, n_A=n_A)
        ctx.save_for_backward(*matrices)
        value, ctx.grads = ctx.launch(matrices, need_grad=any(ctx.needs_input_grad))
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_value: Tensor) -> tuple[Tensor | None, ...]:
        # Given away rather than kept, so that autograd takes these tensors as .grad instead of copying them. A graph
        # that is kept for a second backward computes them anew.
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            _, grads = ctx.launch(ctx.saved_tensors, need_grad=True)
        if grad_value.device.type != "cpu" or grad_value.item() != 1.0:
            grads = torch._foreach_mul(grads, grad_value)
        needs = ctx.needs_input_grad[4:]
        return (None, None, None, None, *(g if need else None for g, need in zip(grads, needs, strict=True)))


def _launch(
    matrices: Sequence[Tensor], *, weight: float, squared: bool, backend: Any, n_A: int, need_grad: bool
) -> tuple[Tensor, list[Tensor]]:
    chosen = select("orthogonality", matrices[0].device.type, matrices[0].dtype, 0, backend).backend
    launch = implementation("orthogonality", chosen).orthogonality
    result: tuple[Tensor, list[Tensor]] = launch(matrices[:n_A], matrices[n_A:], weight, squared, need_grad)
    return result


__all__ = ["orthogonality_loss"]
