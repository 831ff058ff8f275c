"""What a training step of AdaLoRA costs beside LoRA's, at the budgets of the paper's table 15: by PEFT and by ours.

Every step that is timed updates the importance, ranks the triplets and masks them, as if ΔT were 1: the dearest there
is. LoRA's rank is AdaLoRA's target, so that both end with as many parameters.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from benchmarks.environment import commit
from benchmarks.paper import presets
from benchmarks.paper.methods import Setting
from benchmarks.step.case import Case
from benchmarks.step.measure import (
    check_equal,
    clocked,
    milliseconds,
    peak_bytes,
    saved_bytes,
    turns,
)
from benchmarks.step.models import REAL, SMALL, Batch, Model, described
from benchmarks.step.names import LORA, OURS, OURS_SWEPT, PEFT
from benchmarks.step.systems import System, systems
from benchmarks.timing import interleave, ratio

TIMED = (LORA, PEFT, OURS, OURS_SWEPT)
MEGABYTE = 1e6
# Rows and tokens of a batch. DeBERTa-v3-base's are those of the released scripts, each input padded to the longest.
BATCH = {"cuda": {"mnli": (32, 256), "sst2": (32, 128)}, "cpu": {"mnli": (4, 64), "sst2": (4, 32)}}
CLOCK = {"cuda": "until the device is idle", "cpu": "CPU time of one thread"}
COUNTED = {
    "cuda": "parameters, optimizer state, and the most that a step allocates",
    "cpu": "trained parameters, optimizer state, and what the forward keeps for the backward",
}


def measured(device: str, rounds: int) -> dict[str, Any]:
    """Both tasks at the three budgets.

    Args:
        device: "cuda" for DeBERTa-v3-base and the paper's batches; "cpu" for a small one.
        rounds: timed steps of each contestant.

    Returns:
        The record.

    Raises:
        ValueError: a device that isn't there, or too few rounds.
    """
    if device not in BATCH or (device == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device: expected cpu, or cuda where there is a GPU, got {device!r}")
    if rounds < 2:
        raise ValueError(f"rounds: expected at least 2, got {rounds}")
    torch.set_num_threads(1)
    model = SMALL[0] if device == "cpu" else REAL[0]
    records = []
    for task, (rows, columns) in BATCH[device].items():
        for budget, target in presets.table(presets.COST)["budgets"].items():
            sized = replace(model, rows=rows, columns=columns)
            records.append(_record(task, budget, sized, target, device, rounds))
    return {
        "environment": {
            "device": torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU",
            "threads": torch.get_num_threads(), "commit": commit(),
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "peft")},
        },
        "records": records,
    }  # fmt: skip


def _record(task: str, budget: str, model: Model, target: int, device: str, rounds: int) -> dict[str, Any]:
    rank = Setting(target).first_rank
    case = Case(model, rank, device=device, target=target, lora=target)
    found, batches = systems(case), case.batches()
    check_equal(found, batches, case.tolerance)
    contestants = {name: turns(found[name].run, batches) for name in TIMED}
    seconds = interleave(contestants, rounds, clock=_cpu_seconds if device == "cpu" else _until_idle)
    about = {"task": task, "budget": budget, "target": target, "model": model.name.split(", 32×")[0]}
    return {
        "benchmark": "AdaLoRA beside LoRA",
        "case": described(model, rank, torch.float32) | about,
        "milliseconds": {name: milliseconds(taken) for name, taken in seconds.items()},
        "over_lora": {name: ratio(seconds[name], seconds[LORA]) for name in TIMED[1:]},
        "rounds": rounds,
        "clock": CLOCK[device],
        "memory": COUNTED[device],
        "megabytes": {name: _bytes(name, found[name], batches[0], device) / MEGABYTE for name in TIMED},
    }  # fmt: skip


def _cpu_seconds(run: Callable[[], object]) -> float:
    """Of one thread, which is what an idle machine would take: others may use this one at the same time."""
    start = time.process_time()
    run()
    return time.process_time() - start


def _until_idle(run: Callable[[], object]) -> float:
    return clocked(run, "cuda")


def _bytes(name: str, system: System, batch: Batch, device: str) -> int:
    """As ``COUNTED`` says."""
    assert system.optimizer is not None
    state = [t for held in system.optimizer.state.values() for t in held.values() if isinstance(t, Tensor)]
    if device == "cpu":
        kept = [p for p in system.model.parameters() if p.requires_grad] + state
        return sum(t.nbytes for t in kept) + saved_bytes(system, batch)
    step = peak_bytes({name: system}, batch, device)[name]
    return sum(t.nbytes for t in [*system.model.parameters(), *state]) + step


__all__ = ["measured"]
