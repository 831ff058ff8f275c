"""One optimizer step of all adapters at once: AdamW, importance and triplet scores in one sweep."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adalora_kernels.backends.select import Backend, implementation, select
from adalora_kernels.reference.adamw import Importance
from adalora_kernels.reference.importance import TripletLayout


def adamw_update(
    layout: TripletLayout,
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    moments: Tensor,
    steps: Tensor,
    groups: Tensor,
    settings: Tensor,
    grad_scale: Tensor,
    importance: Importance | None,
    *,
    backend: str | Backend | None = None,
) -> Tensor:
    """One step of all adapters; see ``reference.adamw.adamw_update``.

    Raises:
        ValueError: a parameter or gradient does not fit the layout. Nothing changes.
        RuntimeError: the backend asked for can't run.
    """
    chosen = select("adamw", moments.device.type, moments.dtype, 0, backend).backend
    result: Tensor = implementation("adamw", chosen).adamw_update(
        layout, params, grads, moments, steps, groups, settings, grad_scale, importance
    )
    return result


def total_norm(tensors: Sequence[Tensor], *, backend: str | Backend | None = None) -> Tensor:
    """‖·‖₂ of all tensors together, fp64 [1]; 0 where there are none.

    Raises:
        RuntimeError: the backend asked for can't run.
    """
    if not tensors:
        return torch.zeros(1, dtype=torch.float64, device="cpu")
    chosen = select("adamw", tensors[0].device.type, tensors[0].dtype, 0, backend).backend
    result: Tensor = implementation("adamw", chosen).total_norm(tensors)
    return result


__all__ = ["Importance", "adamw_update", "total_norm"]
