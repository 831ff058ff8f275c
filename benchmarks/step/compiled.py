"""Whole steps with forward and backward by ``torch.compile``; optimizer and budget engine stay as they are."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch._dynamo

from benchmarks.step.case import Case
from benchmarks.step.graphed import reason
from benchmarks.step.measure import (
    check_losses,
    clocked,
    losses,
    milliseconds,
    peak_bytes,
    turns,
)
from benchmarks.step.names import COMPILED, LORA, OURS, OURS_SWEPT, PEFT, eager
from benchmarks.step.systems import systems
from benchmarks.timing import interleave, ratio

CONTESTANTS = (LORA, OURS, OURS_SWEPT)


# Contestants share code, each with guards of its own. One more than the limit would run uncompiled without a word.
@torch._dynamo.config.patch(recompile_limit=64)
def measure(case: Case, rounds: int, warmup: int = 2) -> dict[str, Any]:
    """One case.

    Args:
        case: the model, and how it is trained. On a CPU, where nothing is timed in earnest, the traced graph is run as
            it is, without a C++ compiler.
        rounds, warmup: timed steps of each contestant, and untimed ones ahead of them.

    Returns:
        A record: milliseconds of compiled steps, and of PEFT's LoRA as it is; ratios within rounds; by contestant that
        can't be compiled, or whose losses are then others, the error that says so; and on a CUDA device the most memory
        that a step takes beyond what it finds.
    """
    torch.set_num_threads(case.threads)
    batches = case.batches()
    plain = systems(case, (LORA, PEFT))
    found = systems(case, CONTESTANTS)
    expected = {name: losses(system.run, batches) for name, system in plain.items()}
    refused: dict[str, str] = {}
    torch._dynamo.reset()
    backend = "eager" if case.device == "cpu" else "inductor"
    for name, system in found.items():
        system.model = torch.compile(system.model, dynamic=False, backend=backend)
        other = LORA if name == LORA else PEFT
        try:
            made = losses(system.run, batches)
            check_losses(f"{name}, compiled", made, other, expected[other], case.tolerance)
        except (AssertionError, RuntimeError) as error:
            refused[name] = reason(error)
    held = {name: system for name, system in found.items() if name not in refused}
    contestants = held | {eager(LORA): plain[LORA]}
    timed = {name: turns(system.run, batches) for name, system in contestants.items()}
    seconds = interleave(timed, rounds, warmup, partial(clocked, device=case.device))
    record = {
        "benchmark": COMPILED,
        "case": case.record(COMPILED),
        "milliseconds": {name: milliseconds(s) for name, s in seconds.items()},
        "ours_over_lora": {
            name: ratio(seconds[name], seconds[LORA]) for name in held if name != LORA and LORA in held
        },
        "not_compiled": refused,
        "rounds": rounds,
    }  # fmt: skip
    peaks = peak_bytes(contestants, batches[0], case.device)
    return record | ({"peak_bytes": peaks} if peaks else {})


__all__ = ["measure"]
