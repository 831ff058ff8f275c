"""``python -m benchmarks.step.counts``: what a training step costs that is no time, written to results/counts.json.

Operators that reach the backends (views aside), and bytes kept for the backward: the same on every machine with the
same versions, so that a test holds them. torch's operators over lists of tensors count once for each tensor; ours, one
sweep over all layers, once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.cpu import environment
from benchmarks.records import write
from benchmarks.step.case import Case
from benchmarks.step.measure import saved_bytes
from benchmarks.step.models import SMALL, Model, described
from benchmarks.step.names import OURS_AGAIN, PHASES, RANK
from benchmarks.step.systems import systems

RESULTS = Path(__file__).parents[1] / "results" / "counts.json"
DECISIVE = ("torch", "transformers", "peft")  # with other versions of these other operators run


class _Counter(TorchDispatchMode):
    """Counts what reaches the backends."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.name().startswith(("aten::_foreach_", "aten::_fused_")):
            self.count += len(args[0])
        elif not function.is_view:  # views cost the host a little and the device nothing
            self.count += 1
        return function(*args, **(kwargs or {}))


def count(model: Model) -> dict[str, Any]:
    """One model, fp32, on the CPU.

    Returns:
        A record: operators by phase and in all, and saved bytes, of each contestant.
    """
    torch.set_num_threads(1)
    operators: dict[str, dict[str, int]] = {}
    kept: dict[str, int] = {}
    batch = model.batch("cpu", 0)
    for name, system in systems(Case(model, RANK)).items():
        if name == OURS_AGAIN:
            continue
        system.run(batch)  # the first step makes state
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


def main() -> None:
    """Write the record."""
    write(RESULTS, {"environment": environment(), "records": [count(model) for model in SMALL]})
    print(f"written to {RESULTS}")


if __name__ == "__main__":
    main()


__all__ = ["DECISIVE", "RESULTS", "count"]
