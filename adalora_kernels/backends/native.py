"""Typed launchers over the compiled extension: C++ on the CPU, and some in CUDA C++ (``native_cuda``).

No GPU has run the CUDA code yet. It compiles without spills for sm_80, sm_90a and sm_100a, and tests run its kernels on
the CPU, thread by thread.

Many tensors reach the extension as one table (``native_views``). Importing this module never fails;
``unavailable_reason`` says why the extension can't be used.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from adalora_kernels.backends import native_cuda
from adalora_kernels.backends.native_cuda import finish_gradients
from adalora_kernels.backends.native_layer import svd_linear_backward, svd_linear_forward
from adalora_kernels.backends.native_views import Layout, views_of, views_or_copies
from adalora_kernels.reference.adamw import Importance
from adalora_kernels.reference.handover import Handover
from adalora_kernels.reference.importance import OrthogonalityShare, TripletLayout

_DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})


@cache
def unavailable_reason(device_type: str = "cpu") -> str | None:
    """Why the extension can't compute on devices of this type; None where it can."""
    module = {"cpu": "_C", "cuda": "_C_cuda"}.get(device_type)
    if module is None:
        return f"the compiled extension has no code for device type {device_type!r}"
    if device_type == "cuda":
        if (reason := unavailable_reason("cpu")) is not None:
            return reason
        if torch.version.cuda is None:
            return "this PyTorch is built without CUDA"
    try:
        import_module(f"adalora_kernels.{module}")
    except ImportError as error:
        return f"adalora_kernels.{module} can't be imported: {error}"
    return None


def instruction_set() -> str:
    """The CPU instruction set in use: baseline, avx2 or avx512 (``ADALORA_CPU_ISA`` names a narrower one)."""
    return str(_ops("cpu").instruction_set())


def importance_update(
    layout: TripletLayout,
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    state: Tensor,
    half: Tensor,
    scores: Tensor,
    beta1: float,
    beta2: float,
    handed_over: tuple[Handover, list[bool]] | None = None,
) -> Tensor:
    """One step of the averages of all layers in one sweep; see ``reference.importance.importance_update``.

    Bitwise repeatable, whatever the number of threads. Parameters and gradients that aren't contiguous are copied.

    Args:
        handed_over: what backwards have left on CUDA, and of which of the 3n gradients it is, as far as the host knows.
        The others as in the reference.

    Raises:
        ValueError: where a shape or a device is not the layout's or the state's.
        TypeError: where a dtype is none that the extension reads.
    """
    device_type = state.device.type
    ops = _ops(device_type)
    if state.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"state: expected float32 or float64, got {_describe(state)}")
    _check("state", state, state.dtype, 4 * layout.total_elements, device_type)
    _check("half", half, torch.int32, 1, device_type)
    _check("scores", scores, state.dtype, layout.total_rank, device_type)
    sizes = _sizes(layout)
    try:
        theta, _held = views_or_copies("params", params, state)
        given, _held_too = views_or_copies("grads", grads, state)
        if handed_over is None:
            finite: Tensor = ops.importance_update(state, half, scores, sizes, theta, given, beta1, beta2)
        else:
            finite = native_cuda.importance_handed_over(
                state, half, scores, sizes, theta, given, *handed_over, beta1, beta2
            )
    except RuntimeError:
        _refuse_parameters(layout, params, grads, state.device)
        raise
    return finite


def importance_layer(
    layout: TripletLayout,
    layer: int,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    term: OrthogonalityShare | None,
    state: Tensor,
    half: Tensor,
    scores: Tensor,
    finite: Tensor,
    beta1: float,
    beta2: float,
) -> None:
    """One layer's share of ``importance_update``, bit for bit; see ``reference.importance.importance_layer``."""
    slopes, offset_A, offset_B, scale = (None, 0, 0, None) if term is None else term
    ops = _ops("cpu")
    theta, _held = views_or_copies("params", params, state)
    if term is None:
        given, _held_too = views_or_copies("grads", grads, state)
    else:  # which are written to
        given = views_of("grads", grads, state)
    ops.importance_layer(
        state, half, scores, finite, _sizes(layout), layer, theta, given, slopes, offset_A, offset_B, scale,
        beta1, beta2,
    )  # fmt: skip


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
    """One step of all adapters in one sweep; see ``reference.adamw.adamw_update``.

    Bitwise repeatable, whatever the number of threads.
    """
    ops = _ops("cpu")
    averages = (None, None, None, 0.0, 0.0, False) if importance is None else importance
    try:
        theta = views_of("params", params, moments)
        given, _held = views_or_copies("grads", grads, moments)
        finite: Tensor = ops.adamw_update(
            _sizes(layout), theta, given, moments, steps, groups, settings, grad_scale, *averages
        )
    except RuntimeError:
        _refuse_parameters(layout, params, grads, moments.device)
        raise
    torch.autograd.graph.increment_version(params)
    return finite


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """‖·‖₂ of all tensors together, fp64 [1]. Bitwise repeatable, whatever the number of threads."""
    ops = _ops("cpu")
    table, _held = views_or_copies("tensors", tensors, None, Layout.CONTIGUOUS)
    norm: Tensor = ops.total_norm(table)
    return norm


@lru_cache(maxsize=16)
def _sizes(layout: TripletLayout) -> Tensor:
    """R, K, N of each layer, int64 [3, n]."""
    return torch.tensor(layout.shapes, dtype=torch.int64, device="cpu").reshape(-1, 3).t().contiguous()


def mask_to_budget(
    scores: Tensor, lora_E: Sequence[Tensor], budget: int | Tensor, live: Tensor, enabled: Tensor | None = None
) -> Tensor:
    """Zero E at or below the (total - budget)-th smallest score; see ``reference.allocation.mask_to_budget``."""
    device_type = scores.device.type
    ops = _ops(device_type)
    if device_type == "cpu":
        budget = int(budget)  # a tensor's is here to read: nothing waits
    if scores.dtype not in (torch.float32, torch.float64) or scores.dim() != 1:
        raise TypeError(f"scores: expected 1-d float32 or float64, got {_describe(scores)}")
    if not isinstance(budget, Tensor) and budget < 0:
        raise ValueError(f"budget: expected at least 0, got {budget}")
    _check("scores", scores, scores.dtype, scores.numel(), device_type)
    _check("live", live, torch.bool, scores.numel(), device_type)
    if enabled is not None:
        _check("enabled", enabled, torch.bool, 1, device_type)
    try:
        if device_type == "cuda":
            threshold = native_cuda.mask_to_budget(scores, lora_E, budget, live, enabled)
        else:
            enabled = torch.ones(1, dtype=torch.bool, device="cpu") if enabled is None else enabled
            values = views_of("lora_E", lora_E, scores, Layout.CONTIGUOUS_ROWS)
            threshold = ops.mask_to_budget(scores, live, enabled, values, budget)
    except RuntimeError:
        _refuse_values(lora_E, scores.numel(), scores.device)
        raise
    torch.autograd.graph.increment_version(lora_E)
    return threshold


def zero_pruned(live: Tensor, lora_E: Sequence[Tensor]) -> None:
    """Zero E wherever ``live`` (bool [total_rank]) is False, in place."""
    ops = _ops(live.device.type)
    _check("live", live, torch.bool, live.numel(), live.device.type)
    try:
        ops.zero_pruned(live, views_of("lora_E", lora_E, live, Layout.CONTIGUOUS_ROWS))
    except RuntimeError:
        _refuse_values(lora_E, live.numel(), live.device)
        raise
    torch.autograd.graph.increment_version(lora_E)


def orthogonality(
    lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], weight: float, squared: bool
) -> tuple[Tensor, Tensor]:
    """Value and slopes of the regulariser over all matrices; see ``reference.orthogonality.orthogonality``.

    Bitwise repeatable, whatever the number of threads.
    """
    ops = _ops("cpu")
    if not lora_A or len(lora_A) != len(lora_B):
        raise ValueError(f"lora_A, lora_B: expected the same number, at least 1, got {len(lora_A)} and {len(lora_B)}")
    factor = weight if squared else weight / (2 * len(lora_A))
    matrices = [*lora_A, *lora_B]
    try:
        table, _held = views_or_copies("lora_A, lora_B", matrices, None)
        result: tuple[Tensor, Tensor] = ops.orthogonality(table, factor, squared)
    except RuntimeError:
        for name, factors in (("lora_A", lora_A), ("lora_B", lora_B)):
            if flat := [i for i, m in enumerate(factors) if m.dim() != 2]:
                i = flat[0]
                raise ValueError(f"{name}[{i}]: expected 2 dimensions, got {list(factors[i].shape)}") from None
        _refuse("lora_A, lora_B", matrices, [m.shape for m in matrices], torch.device("cpu"))
        raise
    return result


def orthogonality_gradients(
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    slopes: Tensor,
    scale: Tensor,
    grads: Sequence[Tensor],
    add: bool,
) -> None:
    """The gradients of all matrices, written or added; see ``reference.orthogonality.orthogonality_gradients``."""
    ops = _ops("cpu")
    table, _held = views_or_copies("lora_A, lora_B", [*lora_A, *lora_B], slopes)
    ops.orthogonality_gradients(table, slopes, scale, views_of("grads", grads, slopes), add)


def dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """x [M, K] with each element dropped with probability p; the mask of ``reference.philox.dropout``."""
    ops = _ops("cpu")
    if x.dim() != 2 or x.device.type != "cpu":
        raise ValueError(f"x: expected 2 dimensions on cpu, got {_describe(x)}")
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"p: expected a probability, got {p}")
    if x.dtype not in _DTYPES:
        raise TypeError(f"x: expected float32, float64, bfloat16 or float16, got {_describe(x)}")
    _check("seed", seed, torch.int64, 1)
    dropped: Tensor = ops.dropout(x, round(p * 2**32), 1.0 / (1.0 - p) if p < 1 else 0.0, seed)
    return dropped


def _ops(device_type: str) -> Any:
    reason = unavailable_reason(device_type)
    if reason is not None:
        raise RuntimeError(f"backend native: {reason}")
    return torch.ops.adalora_native


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"


def _check(name: str, tensor: Tensor, dtype: torch.dtype, numel: int, device_type: str = "cpu") -> None:
    """Hold a tensor of the launcher's own to what the extension reads."""
    if tensor.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype}, got {_describe(tensor)}")
    if tensor.numel() != numel or tensor.device.type != device_type or not tensor.is_contiguous():
        raise ValueError(f"{name}: expected {numel} contiguous elements on {device_type}, got {_describe(tensor)}")


def _refuse(
    name: str, tensors: Sequence[Tensor | None], shapes: Sequence[tuple[int, ...]], device: torch.device
) -> None:
    """Say which of the tensors that the extension would not read is at fault, and why.

    The extension checks them all as it reads them; here it is said in the users' words, which takes longer.
    """
    if len(tensors) != len(shapes):
        raise ValueError(f"{name}: expected {len(shapes)} tensors, got {len(tensors)}")
    for i, (tensor, shape) in enumerate(zip(tensors, shapes, strict=True)):
        if tensor is None:
            continue
        if tensor.shape != shape or tensor.device != device:
            raise ValueError(f"{name}[{i}]: expected shape {list(shape)} on {device}, got {_describe(tensor)}")
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{name}[{i}]: expected float32, float64, bfloat16 or float16, got {_describe(tensor)}")
        if tensor.layout != torch.strided or (tensor.data_ptr() == 0 and tensor.numel() > 0):
            raise TypeError(f"{name}[{i}]: expected a dense tensor with memory of its own, got {type(tensor).__name__}")


def _refuse_parameters(
    layout: TripletLayout, params: Sequence[Tensor], grads: Sequence[Tensor | None], device: torch.device
) -> None:
    shapes = [shape for r, k, n in layout.shapes for shape in ((r, k), (r, 1), (n, r))]
    _refuse("params", params, shapes, device)
    _refuse("grads", grads, shapes, device)


def _refuse_values(lora_E: Sequence[Tensor], total_rank: int, device: torch.device) -> None:
    count = sum(map(Tensor.numel, lora_E))
    if count != total_rank:
        raise ValueError(f"lora_E: expected {total_rank} values, as many as triplets, got {count}")
    _refuse("lora_E", lora_E, [(e.numel(), 1) for e in lora_E], device)


__all__ = [
    "adamw_update",
    "dropout",
    "finish_gradients",
    "importance_layer",
    "importance_update",
    "instruction_set",
    "mask_to_budget",
    "orthogonality",
    "orthogonality_gradients",
    "svd_linear_backward",
    "svd_linear_forward",
    "total_norm",
    "unavailable_reason",
    "zero_pruned",
]
