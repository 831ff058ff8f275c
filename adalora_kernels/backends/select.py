"""Which backend and plan a call takes, and why.

``choose`` is a pure function of what is asked and what can run; ``select`` feeds it this machine. A backend asked for
by name that can't run raises with the reason. Automatic selection never fails: it takes the best that can run. Where a
backend has several plans, which one a call takes depends on its shape too: the backend chooses when it is launched.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from enum import Enum
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import NamedTuple

import torch

logger = logging.getLogger("adalora_kernels")

ENVIRONMENT_VARIABLE = "ADALORA_KERNELS_BACKEND"
MAX_TRITON_RANK = 128


class Backend(str, Enum):
    """The implementations; ``reference`` runs everywhere."""

    REFERENCE = "reference"
    NATIVE = "native"
    TRITON = "triton"


class Request(NamedTuple):
    """A backend asked for by name.

    Attributes:
        backend: who is to compute.
        plan: of the layer, as "forward", "forward/backward" or "/backward"; empty leaves it to the backend.
    """

    backend: Backend
    plan: str = ""


class Selection(NamedTuple):
    """The outcome of a choice.

    Attributes:
        backend: who computes.
        plan: the backend's way of doing it, by name; ``BY_SHAPE`` where it depends on the call's shape.
        reason: why this one.
        configuration: how the plan's kernels are launched, where that is chosen too.
        plan_asked_for: the plan as it was asked for by name, for the backend's launchers; None where it was not.
    """

    backend: Backend
    plan: str
    reason: str
    configuration: str = ""
    plan_asked_for: str | None = None


BY_SHAPE = "by shape"
_PLANS: dict[tuple[str, Backend], str] = {
    ("svd_linear", Backend.TRITON): BY_SHAPE,
    ("svd_linear", Backend.NATIVE): "accumulate",
    ("importance", Backend.NATIVE): "multi_tensor",
    ("adamw", Backend.NATIVE): "multi_tensor",
    ("allocation", Backend.NATIVE): "selection",
    ("orthogonality", Backend.NATIVE): "multi_tensor",
    ("importance", Backend.TRITON): "multi_tensor",
    ("adamw", Backend.TRITON): "multi_tensor",
    ("allocation", Backend.TRITON): "selection",
    ("orthogonality", Backend.TRITON): "multi_tensor",
}
_UNMEASURED = frozenset((op, Backend.TRITON) for op in ("importance", "adamw", "allocation", "orthogonality"))
_NATIVE_CUDA_OPS = frozenset({"importance", "allocation"})
_PREFERENCE = {"cuda": (Backend.TRITON, Backend.NATIVE), "cpu": (Backend.NATIVE,)}
OPS = ("svd_linear", "importance", "adamw", "allocation", "orthogonality")


def offers(backend: Backend, op: str, device_type: str = "") -> bool:
    """Whether ``backend`` implements ``op`` at all; on CUDA devices native has but some, where that is the type."""
    if backend is Backend.NATIVE and device_type == "cuda" and op not in _NATIVE_CUDA_OPS:
        return False
    return backend is Backend.REFERENCE or (op, backend) in _PLANS


def parse(backend: str | Backend | None) -> Backend | None:
    """The Backend of that name, with or without a plan as in ``parse_request``; None or "auto" mean automatic.

    Raises:
        TypeError: for something else than a name.
        ValueError: for an unknown name, or a plan of a backend that has but one.
    """
    request = parse_request(backend)
    return None if request is None else request.backend


def parse_request(backend: str | Backend | None) -> Request | None:
    """What is asked for by name: a backend, such as "triton", or also a plan of its layer.

    "triton:published/one_gemm" names the forward and the backward; "triton:published" and "triton:/one_gemm" leave the
    other of them to the backend. None, "auto" and errors as in ``parse``.
    """
    _check_name(backend)
    return _parse(backend)


def _check_name(backend: object) -> None:
    if backend is not None and not isinstance(backend, str):
        raise TypeError(f"backend: expected a name or None, got {type(backend).__name__}")


@cache
def _parse(backend: str | None) -> Request | None:
    if backend is None or backend == "auto":
        return None
    name, colon, plan = backend.partition(":")
    try:
        known = Backend(name)
    except ValueError:
        names = ", ".join(b.value for b in Backend)
        raise ValueError(f"backend: expected one of auto, {names}; got {backend!r}") from None
    if not colon:
        return Request(known)
    if known is not Backend.TRITON:
        raise ValueError(f"backend: expected no plan, since {name} has but one; got {backend!r}")
    from adalora_kernels.backends.triton import plans

    plans.parse(plan)
    return Request(known, plan)


def plans_of(backend: Backend) -> tuple[str, ...]:
    """The plans of ``backend``'s layer as ``parse`` takes them, forward and backward apart; none where there is one."""
    if backend is not Backend.TRITON:
        return ()
    from adalora_kernels.backends.triton import plans

    return (*plans.FORWARD, *(f"/{name}" for name in plans.BACKWARD))


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
    requested: Request | None,
    unavailable: Callable[[Backend], str | None],
) -> Selection:
    """The choice, as a pure function.

    Args:
        op: one of ``OPS``.
        device_type: of the tensors, such as "cpu" or "cuda".
        dtype: the dtype in which is computed.
        rank: R, or the largest R of all layers.
        requested: what was asked for by name, or None.
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
        problem = obstacle(requested.backend)
        if problem:
            raise RuntimeError(f"backend {requested.backend.value!r} can't run {op} on {device_type}: {problem}")
        chosen = selection(requested.backend, "asked for by name")
        if requested.plan and op == "svd_linear":
            return chosen._replace(plan=requested.plan, plan_asked_for=requested.plan)
        return chosen
    passed_over: list[str] = []
    for backend in _PREFERENCE.get(device_type, ()):
        problem = obstacle(backend)
        if problem is None:
            reason = f"the best for {device_type} that can run"
            if (op, backend) in _UNMEASURED:
                reason = f"the first for {device_type} that can run; not measured against others yet"
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
def _select(op: str, device_type: str, dtype: torch.dtype, rank: int, backend: str | None, named: str) -> Selection:
    requested = _parse(backend)
    if requested is None and named:
        requested = _parse(named)
        if requested is not None and not offers(requested.backend, op, device_type):
            requested = None
    selection = choose(op, device_type, dtype, rank, requested, lambda other: unavailable_reason(other, device_type))
    _log_once(op, selection)
    return selection


@cache
def _log_once(op: str, selection: Selection) -> None:
    logger.info("%s: %s (%s), %s", op, selection.backend.value, selection.plan, selection.reason)


def select(op: str, device_type: str, dtype: torch.dtype, rank: int, backend: str | Backend | None = None) -> Selection:
    """The choice for this machine, cached.

    ``backend`` None leaves it to the variable ADALORA_KERNELS_BACKEND, which binds only the operations that the
    backend named in it offers (on CUDA, where native is asked for, importance and masking); without one the choice is
    automatic.

    Raises:
        RuntimeError: where a backend asked for by name can't run, with the reason.
        ValueError: for an unknown name.
    """
    _check_name(backend)
    # Not looked up where it has no say: with cold caches that takes 20 µs.
    named = os.environ.get(ENVIRONMENT_VARIABLE, "") if backend is None or backend == "auto" else ""
    return _select(op, device_type, dtype, rank, backend, named)


@cache
def implementation(op: str, backend: Backend) -> ModuleType:
    """The module whose functions compute ``op`` on ``backend``."""
    if backend is Backend.REFERENCE:
        return import_module(f"adalora_kernels.reference.{op}")
    return import_module(f"adalora_kernels.backends.{backend.value}")


__all__ = [
    "BY_SHAPE",
    "ENVIRONMENT_VARIABLE",
    "MAX_TRITON_RANK",
    "OPS",
    "Backend",
    "Request",
    "Selection",
    "choose",
    "implementation",
    "logger",
    "offers",
    "parse",
    "parse_request",
    "plans_of",
    "select",
    "unavailable_reason",
    "unsuitable",
]
