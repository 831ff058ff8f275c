"""Whole training steps on the device: the real models with random weights, AdaLoRA beside PEFT's, LoRA and full;
eager, as CUDA graphs and by torch.compile."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from adalora_kernels.backends.triton import plans
from benchmarks.gpu.apart import Apart, Failed, Here
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.withheld import ENGINE, GROUP, STEP, Withheld
from benchmarks.records import Sweep
from benchmarks.step import compiled, graphed, measure
from benchmarks.step.case import Case
from benchmarks.step.models import DRY, REAL, Model
from benchmarks.step.names import COMPILED, GRAPHED, RANK, TARGET

Record = dict[str, Any]
MODE_OF_GRAPHS = GRAPHED.rpartition(", ")[2]
SECONDS = 240.0  # for one case; by torch.compile it takes longest


@dataclass(frozen=True)
class Planned:
    """One case.

    Attributes:
        case: as its record has it.
        measure: makes the record.
    """

    case: Record
    measure: Callable[[], Record]

    @property
    def name(self) -> str:
        """Model, mode and LoRA's rank."""
        return f"{self.case['model']}, {self.case.get('mode', 'eager')}, LoRA's rank {self.case['lora']}"


def planned(machine: Machine) -> list[Planned]:
    """Every model in bf16 (in a dry run a short one in fp32), beside LoRA at the initial and at the final rank.

    What ``torch.compile`` makes of them comes last, since it takes longest, and at one rank.
    """
    models = (DRY,) if machine.dry else REAL
    uncompiled = [
        _planned(machine, model, lora, mode) for model in models for lora in (RANK, TARGET) for mode in ("", GRAPHED)
    ]
    return [*uncompiled, *(_planned(machine, model, RANK, COMPILED) for model in models)]


def _planned(machine: Machine, model: Model, lora: int, mode: str) -> Planned:
    dtype = torch.float32 if machine.dry else torch.bfloat16
    case = Case(model, RANK, dtype, machine.device, target=TARGET, lora=lora)
    measures = {"": measure.measure, GRAPHED: graphed.measure, COMPILED: compiled.measure}
    return Planned(case.record(mode), partial(measures[mode], case, machine.rounds))


_chosen: set[str] = set()


def measured(index: int, machine: Machine, withheld: Withheld) -> list[Record]:
    """The record of one of ``planned``.

    Raises:
        AssertionError: a plan that failed its checks was chosen, in this process so far, for any layer.
    """
    choose = plans.choose

    def noting(*args: Any) -> plans.Choice:
        choice = choose(*args)
        _chosen.update((f"triton:{choice.forward}", f"triton:/{choice.backward}"))
        return choice

    with patch.object(plans, "choose", noting):
        record = planned(machine)[index].measure()
    for subject in sorted(_chosen & set(withheld)):
        raise AssertionError(f"{subject}: {withheld[subject]}")
    gc.collect()  # models and their hooks hold each other
    machine.forget()
    return [record]


def run(
    machine: Machine, held: Sweep, deadline: float, runner: Apart | Here, withheld: Withheld
) -> Iterator[tuple[Planned, Record | str]]:
    """What is not held yet, each case with its record or with why it has none; none is begun after the deadline."""
    for index, case in enumerate(planned(machine)):
        graph = case.case.get("mode") == MODE_OF_GRAPHS
        doubted = withheld.get(ENGINE) or withheld.get(GROUP) or (withheld.get(STEP) if graph else None)
        if held.holds(case.case):
            continue
        if doubted is not None or time.monotonic() > deadline:
            yield case, doubted or "left out, for want of time"
            continue
        try:
            (record,) = runner.run(measured, index, machine, withheld, seconds=SECONDS)
        except Failed as failure:
            yield case, str(failure)
        else:
            held.put(case.case, [record])
            yield case, record


__all__ = ["Planned", "measured", "planned", "run"]
