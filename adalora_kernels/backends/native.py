"""Typed launchers over the compiled extension: C++ on the CPU, and ``importance_update`` in CUDA C++ too.

The CUDA code compiles without spills for sm_80, sm_90a and sm_100a, but has not run on a GPU yet.

Tensors reach the extension through tables of addresses rather than one by one: handing the 216 parameters of
DeBERTa-v3-base through the dispatcher would cost more than the work on them. Importing this module never fails;
``unavailable_reason`` says why the extension can't be used.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import import_module
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from adalora_kernels.backends.native_layer import svd_linear_backward, svd_linear_forward
from adalora_kernels.reference.importance import TripletLayout

_shape, _device, _dtype = attrgetter("shape"), attrgetter("device"), attrgetter("dtype")
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
    sizes, shapes = _layout_tables(layout)
    read_params, param_rows = _described("params", params, shapes, state.device)
    read_grads, grad_rows = _described("grads", grads, shapes, state.device)
    finite: Tensor = ops.importance_update(state, half, scores, sizes, _table(*param_rows, *grad_rows), beta1, beta2)
    del read_params, read_grads  # until here they keep copies alive, whose addresses the table holds
    return finite


@lru_cache(maxsize=16)
def _layout_tables(layout: TripletLayout) -> tuple[Tensor, list[tuple[int, ...]]]:
    """R, K, N of each layer as int64 [3, n], and the shapes of the 3n parameters."""
    sizes = torch.tensor(layout.shapes, dtype=torch.int64).reshape(-1, 3).t().contiguous()
    return sizes, [shape for r, k, n in layout.shapes for shape in ((r, k), (r, 1), (n, r))]


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


def orthogonality(
    lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], weight: float, squared: bool, need_grad: bool
) -> tuple[Tensor, list[Tensor]]:
    """Value and gradient of the regulariser over all matrices; see ``reference.orthogonality.orthogonality``.

    Bitwise repeatable, whatever the number of threads. Gradients of one shape and dtype are slices of one buffer.
    """
    ops = _ops("cpu")
    if not lora_A or len(lora_A) != len(lora_B):
        raise ValueError(f"lora_A, lora_B: expected the same number, at least 1, got {len(lora_A)} and {len(lora_B)}")
    matrices = [*lora_A, *lora_B]
    shapes, dtypes = tuple(map(_shape, matrices)), tuple(map(_dtype, matrices))
    plan = _orthogonality_plan(shapes, dtypes)
    read, (addresses, codes) = _described("lora_A, lora_B", matrices, list(shapes), torch.device("cpu"))
    grads, targets = _gradients(plan) if need_grad else ([], [0] * len(matrices))
    table = _table(addresses, codes, plan.ranks, plan.lengths, targets)
    factor = weight if squared else weight / len(matrices)
    value: Tensor = ops.orthogonality(table, factor, squared, torch.float64 in dtypes)
    del read  # until here it keeps copies alive, whose addresses the table holds
    return value, grads


def dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """x [M, K] with each element dropped with probability p; the mask of ``reference.philox.dropout``."""
    ops = _ops("cpu")
    if x.dim() != 2 or x.device.type != "cpu":
        raise ValueError(f"x: expected 2 dimensions on cpu, got {_describe(x)}")
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"p: expected a probability, got {p}")
    _codes("x", [x])
    _check("seed", seed, torch.int64, 1)
    dropped: Tensor = ops.dropout(x, round(p * 2**32), 1.0 / (1.0 - p) if p < 1 else 0.0, seed)
    return dropped


@dataclass(frozen=True)
class _OrthogonalityPlan:
    """What depends on shapes and dtypes alone: the table's rows, and which matrices are alike in both."""

    ranks: list[int]
    lengths: list[int]
    alike: list[tuple[torch.dtype, torch.Size, list[int]]]


@lru_cache(maxsize=16)
def _orthogonality_plan(shapes: tuple[torch.Size, ...], dtypes: tuple[torch.dtype, ...]) -> _OrthogonalityPlan:
    layers = len(shapes) // 2
    if flat := [i for i, shape in enumerate(shapes) if len(shape) != 2]:
        name = f"lora_A[{flat[0]}]" if flat[0] < layers else f"lora_B[{flat[0] - layers}]"
        raise ValueError(f"{name}: expected 2 dimensions, got {list(shapes[flat[0]])}")
    alike: dict[tuple[torch.dtype, torch.Size], list[int]] = {}
    for i, key in enumerate(zip(dtypes, shapes, strict=True)):
        alike.setdefault(key, []).append(i)
    return _OrthogonalityPlan(
        ranks=[shape[i >= layers] for i, shape in enumerate(shapes)],
        lengths=[shape[i < layers] for i, shape in enumerate(shapes)],
        alike=[(dtype, shape, places) for (dtype, shape), places in alike.items()],
    )


def _gradients(plan: _OrthogonalityPlan) -> tuple[list[Tensor], list[int]]:
    """Room for the gradients, those of one shape and dtype in one buffer, and their addresses."""
    grads: list[Tensor] = [torch.empty(0)] * len(plan.ranks)
    addresses = [0] * len(plan.ranks)
    for dtype, shape, places in plan.alike:
        buffer = torch.empty((len(places), *shape), dtype=dtype)
        begin, size = buffer.data_ptr(), shape.numel() * dtype.itemsize
        for j, (place, grad) in enumerate(zip(places, buffer.unbind(0), strict=True)):
            grads[place], addresses[place] = grad, begin + j * size
    return grads, addresses


def _values_table(lora_E: Sequence[Tensor], total_rank: int) -> Tensor:
    """Address, dtype, size and stride of each E."""
    counts = list(map(Tensor.numel, lora_E))
    if sum(counts) != total_rank:
        raise ValueError(f"lora_E: expected {total_rank} values, as many as triplets, got {sum(counts)}")
    _checked("lora_E", lora_E, [(count, 1) for count in counts], torch.device("cpu"))
    addresses, codes = list(map(Tensor.data_ptr, lora_E)), _codes("lora_E", lora_E)
    return _table(addresses, codes, counts, [e.stride(0) for e in lora_E])


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


def _checked(
    name: str, tensors: Sequence[Tensor | None], shapes: list[tuple[int, ...]], device: torch.device
) -> list[Tensor]:
    """The tensors that are there, after a check of shapes and device: all at once, since this runs in every step."""
    if len(tensors) != len(shapes):
        raise ValueError(f"{name}: expected {len(shapes)} tensors, got {len(tensors)}")
    present = [t for t in tensors if t is not None]
    if len(present) < len(shapes):
        expected = [shape for shape, t in zip(shapes, tensors, strict=True) if t is not None]
    else:
        expected = shapes
    if list(map(_shape, present)) != expected or not set(map(_device, present)) <= {device}:
        for i, (tensor, shape) in enumerate(zip(tensors, shapes, strict=True)):
            if tensor is not None and (tensor.shape != shape or tensor.device != device):
                raise ValueError(f"{name}[{i}]: expected shape {list(shape)} on {device}, got {_describe(tensor)}")
    return present


def _described(
    name: str, tensors: Sequence[Tensor | None], shapes: list[tuple[int, ...]], device: torch.device
) -> tuple[list[Tensor], tuple[list[int], list[int]]]:
    """The tensors that are there, contiguous, and addresses and dtype codes of all, 0 where one is missing."""
    present = _checked(name, tensors, shapes, device)
    if not all(map(Tensor.is_contiguous, present)):
        present = [t.contiguous() for t in present]
    addresses, codes = list(map(Tensor.data_ptr, present)), _codes(name, present)
    if len(present) < len(shapes):
        remaining = zip(addresses, codes, strict=True)
        pairs = [(0, 0) if t is None else next(remaining) for t in tensors]
        addresses, codes = [address for address, _ in pairs], [code for _, code in pairs]
    return present, (addresses, codes)


def _codes(name: str, tensors: Sequence[Tensor]) -> list[int]:
    dtypes = set(map(_dtype, tensors))
    if unknown := dtypes - _DTYPE_CODES.keys():
        raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {unknown.pop()}")
    if len(dtypes) == 1:
        return [_DTYPE_CODES[dtypes.pop()]] * len(tensors)
    return [_DTYPE_CODES[t.dtype] for t in tensors]


def _table(*rows: Iterable[int]) -> Tensor:
    """int64 [rows, count] on the CPU; through a buffer, which is several times faster than ``torch.tensor``."""
    values = array("q")
    for row in rows:
        values.extend(row)
    if not values:
        return torch.empty(len(rows), 0, dtype=torch.int64)
    return torch.frombuffer(values, dtype=torch.int64).view(len(rows), -1)


__all__ = [
    "dropout",
    "importance_update",
    "instruction_set",
    "mask_to_budget",
    "orthogonality",
    "svd_linear_backward",
    "svd_linear_forward",
    "unavailable_reason",
    "zero_pruned",
]
