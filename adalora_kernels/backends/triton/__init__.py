"""The Triton backend: kernels and their launchers for CUDA devices, and for CPU tensors under Triton's interpreter.

Importing this module needs torch alone. The kernels are imported when they are first launched, and where triton is not
installed ``unavailable_reason`` says so.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from adalora_kernels.backends.triton.tiles import MAX_RANK, rank_padding
from adalora_kernels.reference.svd_linear import Adapter

PLAN = "one_pass"
_MIN_CAPABILITY = (8, 0)


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
    x: Tensor, weight: Tensor | None, bias: Tensor | None, base: Tensor | None, adapter: Adapter
) -> tuple[Tensor, Tensor]:
    """As ``reference.svd_linear.forward``, with u [M, rank_padding(R)]: 0 in its columns past R."""
    from adalora_kernels.backends.triton.forward import delta, one_pass

    if weight is None:
        assert base is not None
        return delta.forward(x, None, None, base, adapter)
    return one_pass.forward(x, weight, bias, None, adapter)


def svd_linear_backward(
    grad_y: Tensor,
    x: Tensor,
    u: Tensor,
    weight: Tensor | None,
    adapter: Adapter,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """As ``reference.svd_linear.backward``, with the u of ``svd_linear_forward``."""
    from adalora_kernels.backends.triton.backward import split

    return split.backward(grad_y, x, u, weight, adapter, needs)


def explain(rank: int, into_base: bool = False) -> str:
    """The plan in a few words."""
    if rank == 0:
        return f"{PLAN}: the frozen linear alone"
    start = "base output" if into_base else "x Wᵀ"
    return f"{PLAN}: {start} + low-rank term of rank {rank} in one kernel, u recomputed by each N-tile"


__all__ = [
    "MAX_RANK",
    "PLAN",
    "explain",
    "rank_padding",
    "svd_linear_backward",
    "svd_linear_forward",
    "unavailable_reason",
]
