"""Steps of all contestants in turn, phase by phase, after a check that the AdaLoRAs among them train alike."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from benchmarks.step.case import Case
from benchmarks.step.models import Batch
from benchmarks.step.names import EAGER, FULL, LORA, OURS, OURS_AGAIN, OURS_SWEPT, PEFT, PHASES
from benchmarks.step.systems import System, systems
from benchmarks.timing import Contestant, Sample, interleave, ratio

Result = TypeVar("Result")
COMPARED = 5


def measure(case: Case, rounds: int, warmup: int = 2) -> dict[str, Any]:
    """One case.

    Args:
        case: the model, and how it is trained.
        rounds: timed steps of each contestant; a third as many more are timed phase by phase.
        warmup: steps ahead of them, untimed.

    Returns:
        A record: milliseconds of whole steps and of their phases; ratios within rounds; how far two copies of ours are
        apart, which is the noise; bytes that the forward leaves for the backward; and on a CUDA device the most memory
        that a step takes beyond what it finds.

    Raises:
        AssertionError: the AdaLoRAs' losses differ.
    """
    torch.set_num_threads(case.threads)
    contestants, batches = systems(case), case.batches()
    check_equal(contestants, batches, case.tolerance)
    clock = partial(clocked, device=case.device)
    whole = interleave({name: turns(s.run, batches) for name, s in contestants.items()}, rounds, warmup, clock)
    phases: dict[str, dict[str, list[float]]] = {name: {phase: [] for phase in PHASES} for name in contestants}
    for i in range(max(2, rounds // 3)):
        for name, system in contestants.items():
            for phase, run in system.phases(batches[i % len(batches)]):
                phases[name][phase].append(clock(run))
    record = {
        "benchmark": EAGER,
        "case": case.record(),
        "milliseconds": {name: milliseconds(s) for name, s in whole.items()},
        "phases": {name: {p: 1e3 * statistics.median(s) for p, s in by.items()} for name, by in phases.items()},
        "peft_over_ours": {name: ratio(whole[PEFT], whole[name]) for name in (OURS, OURS_SWEPT)},
        "ours_over_lora": {name: ratio(whole[name], whole[LORA]) for name in (OURS, OURS_SWEPT)},
        "noise": abs(ratio(whole[OURS_AGAIN], whole[OURS]) - 1),
        "saved_bytes": {
            name: saved_bytes(contestants[name], batches[0]) for name in (PEFT, OURS, LORA, FULL)
        },
        "rounds": rounds,
    }  # fmt: skip
    if peaks := peak_bytes(contestants, batches[0], case.device):
        record["peak_bytes"] = peaks
    return record


def turns(step: Callable[[Batch], object], batches: Sequence[Batch]) -> Contestant:
    """What times whole steps, each on the next batch."""
    order = itertools.cycle(batches)
    return lambda: partial(step, next(order))


def clocked(run: Callable[[], object], device: str) -> float:
    """Seconds of one part, until the device is idle."""
    start = time.perf_counter()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def weighed(run: Callable[[], Result], device: str) -> tuple[Result, int | None]:
    """The most that a run allocates on the CUDA device beyond what was allocated before it; None on a CPU."""
    if device == "cpu":
        return run(), None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    torch.cuda.synchronize()
    return result, torch.cuda.max_memory_allocated() - before


def peak_bytes(systems: Mapping[str, System], batch: Batch, device: str) -> dict[str, int]:
    """The most that a step of each allocates beyond what it finds; empty on a CPU."""
    peaks = {name: weighed(partial(system.run, batch), device)[1] for name, system in systems.items()}
    return {name: peak for name, peak in peaks.items() if peak is not None}


def milliseconds(seconds: list[float]) -> dict[str, float]:
    """Median with 20/80 percentiles."""
    return {name: 1e3 * value for name, value in vars(Sample.of(seconds)).items()}


def check_equal(contestants: Mapping[str, System], batches: Sequence[Batch], tolerance: float) -> None:
    """The AdaLoRAs' losses over a few steps, before anything is timed."""
    expected = losses(contestants[PEFT].run, batches)
    for name in (OURS, OURS_SWEPT, OURS_AGAIN):
        check_losses(name, losses(contestants[name].run, batches), PEFT, expected, tolerance)


def losses(step: Callable[[Batch], Tensor], batches: Sequence[Batch]) -> list[float]:
    """Those of the next few steps."""
    return [step(batches[i % len(batches)]).item() for i in range(COMPARED)]


def check_losses(name: str, found: Sequence[float], other: str, expected: Sequence[float], tolerance: float) -> None:
    """Hold a contestant to the losses of another.

    Raises:
        AssertionError: they differ.
    """
    apart = max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))
    if not apart <= tolerance:
        raise AssertionError(f"{name}: losses differ from {other}'s by {apart:.1e}, relative")


def saved_bytes(system: System, batch: Batch) -> int:
    """Bytes of the distinct storages that a forward keeps for its backward, parameters aside."""
    own = {p.untyped_storage().data_ptr() for p in system.model.parameters()}
    saved: dict[int, int] = {}
    held: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)  # or its address would be given to another
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = system.model(**batch).loss
    del loss
    return sum(saved.values())


__all__ = [
    "check_equal",
    "check_losses",
    "losses",
    "measure",
    "peak_bytes",
    "saved_bytes",
    "turns",
    "weighed",
]
