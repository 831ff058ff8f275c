"""What stands for a CUDA graph where there is no device, so that a dry run walks the code around it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from adalora_kernels.allocator.graphed import Run
from adalora_kernels.backends import native

_WAITS = ("_local_scalar_dense", "equal", "is_nonzero", "masked_select", "nonzero", "_unique2")  # for the device


class Rehearsal:
    """What ``CudaGraph`` is on a CUDA device, without one: a replay is the step itself.

    Args:
        may_wait: whether steps may read numbers on the host, as torch's AdamW does on a CPU, capturable or not. Else
            what would wait for the device raises in the last warm-up.
    """

    def __init__(self, may_wait: bool = False) -> None:
        self._watch: Callable[[], AbstractContextManager[object]] = nullcontext if may_wait else _NoWaiting

    def obstacle(self, device: torch.device) -> str | None:
        """As ``Recorder``'s."""
        return None

    def warm_up(self, run: Run, times: int) -> None:
        """As ``Recorder``'s."""
        for _ in range(times - 1):
            run()
        with self._watch():
            run()

    def record(self, run: Run) -> tuple[Callable[[], None], Tensor]:
        """As ``Recorder``'s."""
        result = torch.zeros(())

        def replay() -> None:
            result.copy_(run())

        return replay, result


class _NoWaiting(TorchDispatchMode):
    """An error where a number goes to the host, which on a CUDA device waits for it; the CPU's own backend may."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket.__name__ in _WAITS and not any(f.f_globals is vars(native) for f in _callers()):
            raise RuntimeError(f"called a synchronizing operation, {function.name()}")
        return function(*args, **(kwargs or {}))


def _callers() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


__all__ = ["Rehearsal"]
