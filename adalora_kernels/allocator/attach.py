"""The allocator as a part of the optimizer's step, by way of torch's step hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

if TYPE_CHECKING:
    from adalora_kernels.allocator.allocator import RankAllocator
    from adalora_kernels.allocator.engine import Turn


class Attachment:
    """What ``RankAllocator.attach`` returns: the allocator's share of each of an optimizer's steps.

    Before the step the plan is made, gradients that still hold a loss scale are unscaled, and variant "paper" takes its
    importance; after it the other variants take theirs, and masks follow.

    A GradScaler doesn't call an optimizer on an overflow step. One that handles the scale by itself (``fused=True``) it
    does call, with ``found_inf`` and ``grad_scale`` as attributes: that step leaves averages and masks alone, and
    counts, since knowing better would wait for the device.

    Attributes:
        optimizer: whose steps these are.
    """

    def __init__(self, allocator: RankAllocator, optimizer: Optimizer, step: Callable[[], int] | None) -> None:
        inner = innermost(optimizer)
        if getattr(inner, "allocator", None) is not None:
            raise ValueError(f"optimizer: expected one without an allocator of its own, got {type(inner).__name__}")
        held = {id(p) for group in inner.param_groups for p in group["params"]}
        if not any(id(p) in held for t in allocator.triplets for p in t.parameters):
            raise ValueError(
                f"optimizer: expected one that trains the adapters, found none of {allocator.triplets[0].name}'s and "
                f"the others' in this {type(inner).__name__}"
            )
        self.optimizer, self._allocator, self._step = inner, allocator, step
        self._turn: tuple[Turn, Tensor | None] | None = None
        self._handles = [
            inner.register_step_pre_hook(self._before),
            inner.register_step_post_hook(self._after),
        ]

    @property
    def active(self) -> bool:
        """Whether it wasn't detached."""
        return bool(self._handles)

    @property
    def counted_by_caller(self) -> bool:
        """Whether the caller's own count gives the step's number."""
        return self._step is not None

    def is_to(self, optimizer: Optimizer) -> bool:
        """Whether it is attached to this optimizer, wrapped or not."""
        return self.active and innermost(optimizer) is self.optimizer

    def detach(self) -> None:
        """The optimizer's steps are its own again."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._turn = [], None

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if "grad_scaler" in kwargs:
            raise ValueError(
                f"optimizer: expected found_inf and grad_scale as attributes, as torch's fused optimizers take them; "
                f"{type(optimizer).__name__} takes the GradScaler itself: call its unscale_ first and detach"
            )
        allocator = self._allocator
        turn = allocator.begin(None if self._step is None else self._step())
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimizer
        if allocator.pre_step and turn.plan.update and closure is not None:
            raise ValueError("closure: expected None, since variant 'paper' needs the gradients before the step")
        _unscale(optimizer)
        early = allocator.update(turn, getattr(optimizer, "found_inf", None)) if allocator.pre_step else None
        self._turn = turn, early

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._turn is None:
            return  # attached while this step was under way
        (turn, finite), self._turn = self._turn, None
        allocator = self._allocator
        if not allocator.pre_step:
            finite = allocator.update(turn, getattr(optimizer, "found_inf", None))
        allocator.note(turn.step, (turn.budget, allocator.finish(turn, finite)))


def innermost(optimizer: Optimizer) -> Optimizer:
    """The optimizer whose ``step`` runs the hooks: accelerate and others wrap it.

    Raises:
        TypeError: not an optimizer.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
    while isinstance(wrapped := optimizer.__dict__.get("optimizer"), Optimizer):
        optimizer = wrapped
    return optimizer


@torch.no_grad()
def _unscale(optimizer: Optimizer) -> None:
    """Divide what a GradScaler has left scaled, all of the optimizer's gradients, so that nobody else need do it."""
    scale = getattr(optimizer, "grad_scale", None)
    if scale is None:
        return
    grads: dict[torch.device, list[Tensor]] = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None:
                grads.setdefault(p.grad.device, []).append(p.grad)
    for device, some in grads.items():
        torch._foreach_div_(some, scale.to(device))
    optimizer.grad_scale = None  # type: ignore[attr-defined]


__all__ = ["Attachment", "innermost"]
