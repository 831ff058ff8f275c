"""The checks of user input: each message names the argument, what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from adalora_kernels.backends.launcher import launcher

_MOST = 4096  # layouts that are known at a time
_passed: set[bytes] = set()
_transformed = torch._C._are_functorch_transforms_active


def check_layer(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base: Tensor | None,
    lora_A: Tensor,
    lora_E: Tensor,
    lora_B: Tensor,
    mask: Tensor | None,
    dropout_p: float,
) -> None:
    """Hold the arguments of one layer call to each other.

    What they are held to follows from their layout alone. One on CUDA that has passed isn't looked at again where the
    extension tells layouts apart, which takes a tenth of the time.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: a shape, device or probability does not fit.
    """
    tensors = (x, weight, bias, base, lora_A, lora_E, lora_B, mask)
    layout = _layout_of(*tensors)
    if layout is None or layout not in _passed:
        _check_tensors(*tensors)
        if layout is not None:
            if len(_passed) >= _MOST:
                _passed.clear()
            _passed.add(layout)
    if not isinstance(dropout_p, (int, float)):
        raise TypeError(f"dropout_p: expected a number, got {type(dropout_p).__name__}")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p: expected a probability in [0, 1], got {dropout_p}")


def _layout_of(x: Any, *others: Any) -> bytes | None:
    """The layout of all; None off CUDA, where it would cost as much as the check, and where calls are traced."""
    if not getattr(x, "is_cuda", False) or torch.compiler.is_compiling() or _transformed():
        return None
    found = launcher()
    return None if isinstance(found, str) else found.layout(x, *others)


def _check_tensors(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base: Tensor | None,
    lora_A: Tensor,
    lora_E: Tensor,
    lora_B: Tensor,
    mask: Tensor | None,
) -> None:
    floating = (("x", x), ("weight", weight), ("bias", bias), ("base_output", base),
                ("lora_A", lora_A), ("lora_E", lora_E), ("lora_B", lora_B))  # fmt: skip
    for name, tensor in floating:
        if tensor is None and name in ("weight", "bias", "base_output"):
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
            raise TypeError(f"{name}: expected a 16-, 32- or 64-bit floating-point tensor, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name}: expected on {x.device}, the device of x, got {tensor.device}")
    if x.dim() == 0:
        raise ValueError("x: expected [..., K], got a 0-d tensor")
    k = x.shape[-1]
    if lora_A.dim() != 2 or lora_A.shape[1] != k:
        raise ValueError(f"lora_A: expected [R, {k}] (x has {k} features), got {list(lora_A.shape)}")
    r = lora_A.shape[0]
    if lora_B.dim() != 2 or lora_B.shape[1] != r:
        raise ValueError(f"lora_B: expected [N, {r}] (lora_A has rank {r}), got {list(lora_B.shape)}")
    n = lora_B.shape[0]
    _check_rank_vector("lora_E", lora_E, r)
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.is_complex():
            raise TypeError(f"mask: expected a tensor of real numbers or booleans, got {mask!r:.60}")
        if mask.device != x.device:
            raise ValueError(f"mask: expected on {x.device}, the device of x, got {mask.device}")
        _check_rank_vector("mask", mask, r)
    if weight is not None and (weight.dim() != 2 or weight.shape[0] != n or weight.shape[1] != k):
        raise ValueError(f"weight: expected [{n}, {k}], got {list(weight.shape)}")
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != n):
        raise ValueError(f"bias: expected [{n}], got {list(bias.shape)}")
    if base is not None and base.shape != (*x.shape[:-1], n):
        raise ValueError(f"base_output: expected {[*x.shape[:-1], n]}, got {list(base.shape)}")


def _check_rank_vector(name: str, tensor: Tensor, r: int) -> None:
    if tensor.dim() not in (1, 2) or tensor.shape[0] != r or (tensor.dim() == 2 and tensor.shape[1] != 1):
        raise ValueError(f"{name}: expected [{r}, 1] or [{r}], got {list(tensor.shape)}")


def as_float(name: str, value: Any) -> float:
    """A number of whatever kind, also a tensor of one element, as Python's.

    Raises:
        TypeError: it is none.
    """
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected a number, got {value!r:.60}") from None


def check_number(name: str, value: Any, *, whole: bool = False) -> None:
    """Hold a setting to be a finite number, or a whole one.

    Raises:
        TypeError: it is no number.
        ValueError: it is not finite, or has a fraction where ``whole``.
    """
    if not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {value!r:.60}")
    if not math.isfinite(value) or (whole and value % 1):
        raise ValueError(f"{name}: expected a {'whole' if whole else 'finite'} number, got {value}")


def check_share(name: str, value: Any) -> None:
    """Hold a setting to lie between 0 and 1, both excluded.

    Raises:
        TypeError: it is no number.
        ValueError: it lies elsewhere.
    """
    check_number(name, value)
    if not 0 < value < 1:
        raise ValueError(f"{name}: expected a number between 0 and 1, got {value}")


def floating_state_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """The dtype of state kept for these parameters: fp64 if any of them is fp64, else fp32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


__all__ = ["as_float", "check_layer", "check_number", "check_share", "floating_state_dtype"]
