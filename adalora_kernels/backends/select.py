"""Which backend and plan a call takes, and why.

``choose`` is a pure function of what is asked and what can run; ``select`` feeds it this machine. A backend asked for
by name that can't run raises with the reason. Automatic selection never fails: it takes the best that can run.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import cache
from importlib import import_module
from types import ModuleType

import torch

logger = logging.getLogger("adalora_kernels")

ENVIRONMENT_VARIABLE = "ADALORA_KERNELS_BACKEND"
MAX_TRITON_RANK = 128


class Backend(str, Enum):
    """The implementations; ``reference`` runs everywhere."""

    REFERENCE = "reference"
    NATIVE = "native"
    TRITON = "triton"


@dataclass(frozen=True)
class Selection:
    """The outcome of a choice.

    Attributes:
        backend: who computes.
        plan: the backend's way of doing it, by name.
        reason: why this one.
    """

    backend: Backend
    plan: str
    reason: str


_PLANS: dict[tuple[str, Backend], str] = {
    ("svd_linear", Backend.TRITON): "one_pass",
    ("svd_linear", Backend.NATIVE): "accumulate",
    ("importance", Backend.NATIVE): "multi_tensor",
    ("allocation", Backend.NATIVE): "selection",
    ("orthogonality", Backend.NATIVE): "multi_tensor",
}
_NATIVE_CUDA_OPS = frozenset({"importance"})
_PREFERENCE = {"cuda": (Backend.TRITON, Backend.NATIVE), "cpu": (Backend.NATIVE,)}
OPS = ("svd_linear", "importance", "allocation", "orthogonality")


def offers(backend: Backend, op: str) -> bool:
    """Whether ``backend`` implements ``op`` at all, on any device."""
    return backend is Backend.REFERENCE or (op, backend) in _PLANS


def parse(backend: str | Backend | None) -> Backend | None:
    """The Backend of that name; None or "auto" mean automatic.

    Raises:
        ValueError: for an unknown name.
    """
    if backend is None or isinstance(backend, Backend):
        return backend
    if backend == "auto":
        return None
    try:
        return Backend(backend)
    except ValueError:
        names = ", ".join(b.value for b in Backend)
        raise ValueError(f"backend: expected one of auto, {names}; got {backend!r}") from None


def unsuitable(backend: Backend, op: str, device_type: str, dtype: torch.dtype, rank: int) -> str | None:
    """Why ``backend`` can't compute ``op`` for such tensors on any machine, or None if it can."""
    if not offers(backend, op):
        return f"{backend.value} has no {op}"
    if backend is Backend.TRITON:
        if dtype == torch.float64:
            return "triton computes in 16 or 32 bits, not in float64"
        if rank > MAX_TRITON_RANK:
            return f"triton holds ranks up to {MAX_TRITON_RANK}, got {rank}"
    if backend is Backend.NATIVE and not (device_type == "cpu" or (device_type == "cuda" and op in _NATIVE_CUDA_OPS)):
        return f"native has no {op} for {device_type} tensors"
    return None


def choose(
    op: str,
    device_type: str,
    dtype: torch.dtype,
    rank: int,
    requested: Backend | None,
    unavailable: Callable[[Backend], str | None],
) -> Selection:
    """The choice, as a pure function.

    Args:
        op: one of ``OPS``.
        device_type: of the tensors, such as "cpu" or "cuda".
        dtype: the dtype in which is computed.
        rank: R, or the largest R of all layers.
        requested: a backend asked for by name, or None.
        unavailable: says why this machine can't run a backend for that device type, or None where it can; asked only of
            backends that come into question, since to ask is to import them.

    Raises:
        RuntimeError: where ``requested`` can't run, with the reason.
    """

    def obstacle(backend: Backend) -> str | None:
        return unsuitable(backend, op, device_type, dtype, rank) or unavailable(backend)

    def selection(backend: Backend, reason: str) -> Selection:
        return Selection(backend, _PLANS.get((op, backend), "eager"), reason)

    if requested is not None:
        problem = obstacle(requested)
        if problem:
            raise RuntimeError(f"backend {requested.value!r} can't run {op} on {device_type}: {problem}")
        return selection(requested, "asked for by name")
    passed_over: list[str] = []
    for backend in _PREFERENCE.get(device_type, ()):
        problem = obstacle(backend)
        if problem is None:
            reason = f"the best for {device_type} that can run"
            return selection(backend, "; ".join([reason, *passed_over]))
        passed_over.append(problem)
    return selection(Backend.REFERENCE, "; ".join(passed_over) or f"no kernels for {device_type} tensors")


@cache
def unavailable_reason(backend: Backend, device_type: str) -> str | None:
    """Why this machine can't run ``backend`` for tensors of ``device_type``, or None if it can."""
    if backend is Backend.TRITON:
        from adalora_kernels.backends import triton

        return triton.unavailable_reason(device_type)
    if backend is Backend.NATIVE:
        from adalora_kernels.backends import native

        return native.unavailable_reason(device_type)
    return None


@cache
def _select(op: str, device_type: str, dtype: torch.dtype, rank: int, requested: Backend | None) -> Selection:
    return choose(op, device_type, dtype, rank, requested, lambda backend: unavailable_reason(backend, device_type))


@cache
def _log_once(op: str, selection: Selection) -> None:
    logger.info("%s: %s (%s), %s", op, selection.backend.value, selection.plan, selection.reason)


def select(op: str, device_type: str, dtype: torch.dtype, rank: int, backend: str | Backend | None = None) -> Selection:
    """The choice for this machine, cached.

    ``backend`` None leaves it to the variable ADALORA_KERNELS_BACKEND, which binds only the operations that the
    backend named in it offers; without one the choice is automatic.

    Raises:
        RuntimeError: where a backend asked for by name can't run, with the reason.
        ValueError: for an unknown name.
    """
    requested = parse(backend)
    if requested is None:
        named = os.environ.get(ENVIRONMENT_VARIABLE)
        if named:
            requested = parse(named)
            if requested is not None and not offers(requested, op):
                requested = None
    selection = _select(op, device_type, dtype, rank, requested)
    _log_once(op, selection)
    return selection


@cache
def implementation(op: str, backend: Backend) -> ModuleType:
    """The module whose functions compute ``op`` on ``backend``."""
    if backend is Backend.REFERENCE:
        return import_module(f"adalora_kernels.reference.{op}")
    return import_module(f"adalora_kernels.backends.{backend.value}")


__all__ = [
    "ENVIRONMENT_VARIABLE",
    "MAX_TRITON_RANK",
    "OPS",
    "Backend",
    "Selection",
    "choose",
    "implementation",
    "logger",
    "offers",
    "parse",
    "select",
    "unavailable_reason",
    "unsuitable",
]
