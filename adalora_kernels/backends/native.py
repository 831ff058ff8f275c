"""Typed launchers over the compiled extension: C++ on the CPU, CUDA C++ on a GPU.

Tensors reach the extension through tables of addresses rather than one by one: handing the 216 parameters of
DeBERTa-v3-base through the dispatcher would cost more than the work on them. Importing this module never fails;
``unavailable_reason`` says why the extension can't be used.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from functools import cache, lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from adalora_kernels.backends.native_layer import svd_linear_backward, svd_linear_forward
from adalora_kernels.reference.importance import TripletLayout

_DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # csrc/common/dtype.h


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
) -> Tensor:
    """One step of the averages of all layers in one sweep; see ``reference.importance.importance_update``.

    Bitwise repeatable, whatever the number of threads. Parameters and gradients that aren't contiguous are copied.

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
    shapes, expected = _layout_tables(layout)
    read_params = _readable("params", params, expected, device_type)
    read_grads = _readable("grads", grads, expected, device_type)
    tensors = _table(*_columns("params", read_params), *_columns("grads", read_grads))
    finite: Tensor = ops.importance_update(state, half, scores, shapes, tensors, beta1, beta2)
    return finite


@lru_cache(maxsize=16)
def _layout_tables(layout: TripletLayout) -> tuple[Tensor, list[tuple[int, int]]]:
    """R, K, N of each layer as int64 [3, n], and the shapes of the 3n parameters."""
    shapes = _table(*zip(*layout.shapes, strict=True)) if layout.shapes else torch.empty(3, 0, dtype=torch.int64)
    return shapes, [shape for r, k, n in layout.shapes for shape in ((r, k), (r, 1), (n, r))]


def _readable(
    name: str, tensors: Sequence[Tensor | None], expected: list[tuple[int, int]], device_type: str
) -> list[Tensor | None]:
    """The tensors, contiguous, after a check of number, shapes and devices."""
    if len(tensors) != len(expected):
        raise ValueError(f"{name}: expected {len(expected)} tensors, three a layer, got {len(tensors)}")
    for i, (tensor, shape) in enumerate(zip(tensors, expected, strict=True)):
        if tensor is not None and (tensor.shape != shape or tensor.device.type != device_type):
            raise ValueError(f"{name}[{i}]: expected shape {list(shape)} on {device_type}, got {_describe(tensor)}")
    return [t if t is None or t.is_contiguous() else t.contiguous() for t in tensors]


def _columns(name: str, tensors: Sequence[Tensor | None]) -> tuple[list[int], list[int]]:
    """Addresses and dtype codes; 0 and 0 for None."""
    dtypes = _dtypes(name, [t for t in tensors if t is not None])
    codes = iter(dtypes)
    return [0 if t is None else t.data_ptr() for t in tensors], [0 if t is None else next(codes) for t in tensors]


def mask_to_budget(
    scores: Tensor, lora_E: Sequence[Tensor], budget: int, live: Tensor, enabled: Tensor | None = None
) -> Tensor:
    """Zero E at or below the (total - budget)-th smallest score; see ``reference.allocation.mask_to_budget``."""
    ops = _ops("cpu")
    if scores.dtype not in (torch.float32, torch.float64) or scores.dim() != 1:
        raise TypeError(f"scores: expected 1-d float32 or float64, got {_describe(scores)}")
    if budget < 0:
        raise ValueError(f"budget: expected at least 0, got {budget}")
    _check("scores", scores, scores.dtype, scores.numel())
    _check("live", live, torch.bool, scores.numel())
    enabled = torch.ones(1, dtype=torch.bool) if enabled is None else enabled
    _check("enabled", enabled, torch.bool, 1)
    threshold: Tensor = ops.mask_to_budget(scores, live, enabled, _values_table(lora_E, scores.numel()), budget)
    torch.autograd.graph.increment_version(lora_E)
    return threshold


def zero_pruned(live: Tensor, lora_E: Sequence[Tensor]) -> None:
    """Zero E wherever ``live`` (bool [total_rank]) is False, in place."""
    ops = _ops("cpu")
    _check("live", live, torch.bool, live.numel())
    ops.zero_pruned(live, _values_table(lora_E, live.numel()))
    torch.autograd.graph.increment_version(lora_E)


def _values_table(lora_E: Sequence[Tensor], total_rank: int) -> Tensor:
    """Address, dtype, size and stride of each E."""
    counts = [e.numel() for e in lora_E]
    if sum(counts) != total_rank:
        raise ValueError(f"lora_E: expected {total_rank} values, as many as triplets, got {sum(counts)}")
    for i, e in enumerate(lora_E):
        if e.shape not in ((counts[i], 1), (counts[i],)):
            raise ValueError(f"lora_E[{i}]: expected shape [R, 1], got {_describe(e)}")
    return _table(_addresses("lora_E", lora_E), _dtypes("lora_E", lora_E), counts, [e.stride(0) for e in lora_E])


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


def _dtypes(name: str, tensors: Sequence[Tensor]) -> list[int]:
    try:
        return [_DTYPE_CODES[t.dtype] for t in tensors]
    except KeyError as error:
        raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {error.args[0]}") from None


def _addresses(name: str, tensors: Sequence[Tensor], device_type: str = "cpu") -> list[int]:
    if any(t.device.type != device_type for t in tensors):
        found = sorted({str(t.device) for t in tensors})
        raise ValueError(f"{name}: expected tensors on {device_type}, got {', '.join(found)}")
    return [t.data_ptr() for t in tensors]


def _table(*rows: Iterable[int]) -> Tensor:
    """int64 [rows, count] on the CPU; through a buffer, which is several times faster than ``torch.tensor``."""
    values = array("q")
    for row in rows:
        values.extend(row)
    if not values:
        return torch.empty(len(rows), 0, dtype=torch.int64)
    return torch.frombuffer(values, dtype=torch.int64).view(len(rows), -1)


__all__ = [
    "importance_update",
    "instruction_set",
    "mask_to_budget",
    "svd_linear_backward",
    "svd_linear_forward",
    "unavailable_reason",
    "zero_pruned",
]
