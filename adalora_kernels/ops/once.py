"""Gradients that can't be differentiated themselves, and say so."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

Gradients = tuple[Tensor | None, ...]
_REFUSAL = b"adalora_kernels: no kernel has second derivatives, and one was asked for (create_graph=True)"


def differentiable_once(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """For an autograd Function's backward whose gradients have none: who asks for them gets a RuntimeError.

    torch's ``once_differentiable`` raises only where the gradient that comes in requires one. In a gradient penalty it
    mostly doesn't, and what is saved (x, A, E, B) would be taken for constants, silently. It also costs host time where
    nobody builds a graph of the gradients.
    """

    @wraps(backward)
    def guarded(ctx: Any, *grads: Tensor | None) -> Gradients:
        if not torch.is_grad_enabled():  # no create_graph
            return backward(ctx, *grads)
        with torch.no_grad():
            results = backward(ctx, *grads)
        if all(result is None for result in results):
            return results
        fresh: list[Any] = [None if result is None else result.detach().requires_grad_() for result in results]
        refused = torch._C._functions.DelayedError(_REFUSAL, len(results))(*fresh)
        return refused if isinstance(refused, tuple) else (refused,)

    return guarded


__all__ = ["differentiable_once"]
