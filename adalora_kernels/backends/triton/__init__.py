"""The Triton backend: kernels and their launchers for CUDA devices, and for CPU tensors under Triton's interpreter.

Importing this module needs torch alone. The kernels are imported when they are first launched, and where triton is not
installed ``unavailable_reason`` says so.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from adalora_kernels.backends import rows
from adalora_kernels.backends.triton import plans
from adalora_kernels.backends.triton.backward.frozen import has_low_rank
from adalora_kernels.backends.triton.problem import problem_of
from adalora_kernels.backends.triton.tiles import MAX_RANK, rank_padding
from adalora_kernels.reference.handover import LayerImportance
from adalora_kernels.reference.svd_linear import Adapter

_MIN_CAPABILITY = (8, 0)
# The budget engine's functions, each with the module of ``engine`` that has it.
_ENGINE = {
    "importance_update": "importance",
    "adamw_update": "adamw",
    "total_norm": "norm",
    "orthogonality": "orthogonality",
    "orthogonality_gradients": "orthogonality",
    "mask_to_budget": "allocation",
    "zero_pruned": "allocation",
}


def __getattr__(name: str) -> Any:
    """A function of the budget engine, whose kernels are imported when it is first asked for."""
    if name not in _ENGINE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.engine.{_ENGINE[name]}"), name)


def unavailable_reason(device_type: str) -> str | None:
    """Why this machine can't run the kernels on tensors of ``device_type``, or None if it can."""
    if find_spec("triton") is None:
        return "triton is not installed"
    from triton import knobs

    if knobs.runtime.interpret:
        return None if device_type in ("cpu", "cuda") else f"triton's interpreter takes no {device_type} tensors"
    if device_type != "cuda":
        return f"triton compiles for cuda tensors, not for {device_type} (TRITON_INTERPRET=1 interprets on the CPU)"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability < _MIN_CAPABILITY:
        return f"triton needs compute capability 8.0, this device has {capability[0]}.{capability[1]}"
    return None


def svd_linear_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base: Tensor | None,
    adapter: Adapter,
    plan: str | None = None,
) -> tuple[Tensor, Tensor]:
    """As ``reference.svd_linear.forward``, with u [M, rank_padding(R)]: 0 in its columns past R.

    Args:
        x: [..., K]; ``base`` and y are of its leading shape.
        plan: asked for by name, as in ``plans.parse``; None leaves it to ``plans.choose``.
        The others as in the reference.

    Raises:
        RuntimeError: the plan asked for can't run this call.
    """
    if interpreted():
        return _forward(x, weight, bias, base, adapter, plan)
    if x.dim() != 2 and not x.is_contiguous():  # to flatten it may take a copy
        return rows.forward(svd_linear_forward, x, weight, bias, base, adapter, plan)
    from adalora_kernels.backends.triton.replay import replayed

    tensors, numbers = (x, weight, bias, base, *adapter[:5]), (plan, *adapter[5:])
    result: tuple[Tensor, Tensor] = replayed(_forward, tensors, numbers, x, weight, bias, base, adapter, plan)
    return result


def _forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, base: Tensor | None, adapter: Adapter, plan: str | None
) -> tuple[Tensor, Tensor]:
    return rows.forward(_forward_of_rows, x, weight, bias, base, adapter, plan)


def _forward_of_rows(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, base: Tensor | None, adapter: Adapter, plan: str | None
) -> tuple[Tensor, Tensor]:
    choice = plans.choose(problem_of(x, weight, adapter), plan)
    y, u = plans.launcher("forward", choice.forward)(x, weight, bias, base, adapter)
    return y, u


def svd_linear_backward(
    grad_y: Tensor,
    x: Tensor,
    u: Tensor,
    weight: Tensor | None,
    adapter: Adapter,
    needs: tuple[bool, bool, bool, bool],
    plan: str | None = None,
    importance: LayerImportance | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """As ``reference.svd_linear.backward``, with the u of ``svd_linear_forward``; shapes, ``plan``, errors as there.

    ``importance``: of the layer, to be updated on the way as ``reference.handover`` says.
    """
    if interpreted() or (importance is not None and importance.finisher is not None):
        return _backward(grad_y, x, u, weight, adapter, needs, plan, importance)
    if x.dim() != 2 and not (x.is_contiguous() and grad_y.is_contiguous()):
        return rows.backward(svd_linear_backward, grad_y, x, u, weight, adapter, needs, plan, importance)
    from adalora_kernels.backends.triton.replay import replayed

    tensors: tuple[Tensor | None, ...] = (grad_y, x, u, weight, *adapter[:5])
    numbers: tuple[Hashable, ...] = (needs, plan, *adapter[5:])
    if importance is not None:
        tensors, numbers = (*tensors, *importance.tensors), (*numbers, *importance.numbers)
        importance.done = has_low_rank(grad_y, x, adapter)
    result: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None] = replayed(
        _backward, tensors, numbers, grad_y, x, u, weight, adapter, needs, plan, importance
    )
    return result


def _backward(
    grad_y: Tensor,
    x: Tensor,
    u: Tensor,
    weight: Tensor | None,
    adapter: Adapter,
    needs: tuple[bool, bool, bool, bool],
    plan: str | None,
    importance: LayerImportance | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    return rows.backward(_backward_of_rows, grad_y, x, u, weight, adapter, needs, plan, importance)


def _backward_of_rows(
    grad_y: Tensor,
    x: Tensor,
    u: Tensor,
    weight: Tensor | None,
    adapter: Adapter,
    needs: tuple[bool, bool, bool, bool],
    plan: str | None,
    importance: LayerImportance | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    choice = plans.choose(problem_of(x, weight, adapter, needs[0]), plan)
    dx, dA, dE, dB = plans.launcher("backward", choice.backward)(grad_y, x, u, weight, adapter, needs, importance)
    return dx, dA, dE, dB


@cache
def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which has nothing to replay."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


def explain(x: Tensor, weight: Tensor | None, adapter: Adapter, plan: str | None = None) -> tuple[str, str, str]:
    """The plan, its configuration and the reason of a call with these tensors; errors as in ``svd_linear_forward``."""
    problem = problem_of(x, weight, adapter)
    choice = plans.choose(problem, plan)
    return f"{choice.forward}/{choice.backward}", plans.configuration(problem, choice), choice.reason


__all__ = ["MAX_RANK", "explain", "rank_padding", "svd_linear_backward", "svd_linear_forward", "unavailable_reason"]
