"""AdamW of all layers, with importance in the same sweep: one launch; the kernel is in ``sweep``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adalora_kernels.backends.triton.engine.importance import check_importance, parameter_sizes
from adalora_kernels.backends.triton.engine.sweep import Optimizer, sweep
from adalora_kernels.backends.triton.engine.tables import bits_of, check, describe, words_of
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
) -> Tensor:
    """One step of all adapters in one launch; see ``reference.adamw.adamw_update``.

    Settings on the CPU go to the device with the addresses; those on the device are read where they lie. Bitwise
    repeatable. Gradients that aren't contiguous are copied.

    Raises:
        ValueError: where a shape or a device is not the layout's or the moments', or a parameter is not contiguous.
            Nothing changes.
        TypeError: where a dtype is none that the kernel reads.
    """
    device = moments.device
    count = len(layout.sizes)
    check("moments", moments, torch.float32, 2 * layout.total_elements, device)
    check("steps", steps, torch.float32, count, device)
    check("groups", groups, torch.int64, count, device)
    check("grad_scale", grad_scale, torch.float64, 1, device)
    on_host = settings.device.type == "cpu"
    if settings.dtype != torch.float64 or settings.shape[1:] != (5,) or not (on_host or settings.device == device):
        raise ValueError(f"settings: expected float64 [groups, 5] on cpu or {device}, got {describe(settings)}")
    if importance is not None:
        check_importance(layout, importance, device)
    theta = words_of("params", params, parameter_sizes(layout), device)
    if any(held is not param for held, param in zip(theta.held, params, strict=True)):
        raise ValueError("params: expected contiguous tensors")
    given = words_of("grads", grads, theta.sizes, device, some_missing=True)
    numbers = [bits_of(value) for row in settings.tolist() for value in row] if on_host else settings.contiguous()
    optimizer = Optimizer(moments, steps, groups, grad_scale, numbers)
    taken = sweep(layout, theta.words, given.words, device, importance, optimizer)
    del given
    torch.autograd.graph.increment_version(params)
    return taken


__all__ = ["adamw_update"]
