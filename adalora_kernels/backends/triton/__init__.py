"""The Triton backend: kernels and their launchers for CUDA devices, and for CPU tensors under Triton's interpreter.

Importing this module needs torch alone; without triton it has no launchers, and ``unavailable_reason`` says so.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch

from adalora_kernels.backends.triton.tiles import MAX_RANK, rank_padding

if find_spec("triton") is not None:
    # Not on first use: the launchers bear the names of their modules, and importing a module binds its name here.
    from adalora_kernels.backends.triton.svd_linear_backward import svd_linear_backward
    from adalora_kernels.backends.triton.svd_linear_forward import svd_linear_forward

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
