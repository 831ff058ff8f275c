"""Masking to the rank budget, over all layers at once and without a host sync."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adalora_kernels.backends.select import Backend, implementation, select


def mask_to_budget(
    scores: Tensor,
    lora_E: Sequence[Tensor],
    budget: int | Tensor,
    live: Tensor,
    enabled: Tensor | None = None,
    *,
    backend: str | Backend | None = None,
) -> Tensor:
    """Zero E of the lowest-scoring triplets; see ``reference.allocation.mask_to_budget``.

    Raises:
        ValueError: the scores, the pattern and the singular values don't belong together, or the budget is a negative
            number (of a tensor only dtype, size and device are looked at).
        RuntimeError: the backend asked for can't run.
    """
    if isinstance(budget, Tensor):
        integer = budget.dtype in (torch.int32, torch.int64)
        if not integer or budget.numel() != 1 or budget.device != scores.device:
            raise ValueError(
                f"budget: expected an int32 or int64 on {scores.device}, got {budget.dtype} {list(budget.shape)} on "
                f"{budget.device}"
            )
    elif budget < 0:
        raise ValueError(f"budget: expected at least 0, got {budget}")
    if scores.dim() != 1:
        raise ValueError(f"scores: expected [total rank], got {list(scores.shape)}")
    _check(live, lora_E, scores.numel())
    chosen = select("allocation", scores.device.type, scores.dtype, 0, backend).backend
    with torch.no_grad():
        threshold: Tensor = implementation("allocation", chosen).mask_to_budget(scores, lora_E, budget, live, enabled)
    return threshold


def zero_pruned(live: Tensor, lora_E: Sequence[Tensor], *, backend: str | Backend | None = None) -> None:
    """Zero E wherever the pattern ``live`` (bool [total rank]) is False.

    Raises:
        ValueError: the pattern and the singular values don't belong together.
        RuntimeError: the backend asked for can't run.
    """
    _check(live, lora_E, live.numel())
    if lora_E:
        chosen = select("allocation", live.device.type, lora_E[0].dtype, 0, backend).backend
        with torch.no_grad():
            implementation("allocation", chosen).zero_pruned(live, lora_E)


def _check(live: Tensor, lora_E: Sequence[Tensor], total: int) -> None:
    ranks = sum(e.numel() for e in lora_E)
    if live.shape != (total,) or ranks != total:
        raise ValueError(
            f"live, lora_E: expected {total} triplets in all, got {list(live.shape)} and {ranks} singular values"
        )


__all__ = ["mask_to_budget", "zero_pruned"]
