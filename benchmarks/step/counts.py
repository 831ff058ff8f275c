"""What a training step costs that is no time: operators that reach the dispatcher, and bytes kept for the backward.

The same on every machine that has the same versions, so that a test can hold them. An operator that loops over tensors
(``torch._foreach_*``, ours over all layers) counts once for each tensor of its first list.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.step.measure import saved_bytes
from benchmarks.step.models import Model, described
from benchmarks.step.systems import OURS_AGAIN, PHASES, systems

RANK = 12


class _Counter(TorchDispatchMode):
    """Counts what reaches the backends."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name()
        loops = name.startswith("aten::_foreach_") or name.startswith("aten::_fused_")
        self.count += len(args[0]) if loops else not _is_view(function)
        return function(*args, **(kwargs or {}))


def _is_view(function: Any) -> bool:
    """Views cost the host a little and the device nothing."""
    return bool(function.is_view)


def count(model: Model) -> dict[str, Any]:
    """One model, fp32, on the CPU.

    Returns:
        A record: operators by phase and in all, and saved bytes, of each contestant.
    """
    torch.set_num_threads(1)
    operators: dict[str, dict[str, int]] = {}
    kept: dict[str, int] = {}
    batch = model.batch("cpu", 0)
    for name, system in systems(model, RANK, torch.float32, "cpu").items():
        if name == OURS_AGAIN:
            continue
        for _, run in system.phases(batch):  # the first step makes state
            run()
        operators[name] = {}
        for phase, run in system.phases(batch):
            with _Counter() as counter:
                run()
            operators[name][phase] = counter.count
        kept[name] = saved_bytes(system, batch)
    return {
        "benchmark": "operators of a training step",
        "case": described(model, RANK, torch.float32),
        "operators": {name: by | {"step": sum(by[phase] for phase in PHASES)} for name, by in operators.items()},
        "saved_bytes": kept,
    }


__all__ = ["count"]
