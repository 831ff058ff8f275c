"""Steps of all contestants in turn, phase by phase, after a check that the AdaLoRAs among them train alike."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.step.models import Model, described
from benchmarks.step.systems import FULL, LORA, OURS, OURS_AGAIN, OURS_SWEPT, PEFT, PHASES, System, systems
from benchmarks.timing import Contestant, Sample, interleave, ratio

COMPARED, TOLERANCE = 5, 1e-4
BATCHES = 4


def measure(
    model: Model, rank: int, dtype: torch.dtype, device: str, threads: int, rounds: int, warmup: int = 2,
    target: int | None = None, lora: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """One model.

    Args:
        model, rank, dtype, device, target, lora: as in ``systems``.
        threads: of the CPU.
        rounds: timed steps of each contestant; a third as many more are timed phase by phase.
        warmup: steps ahead of them, untimed.

    Returns:
        A record: milliseconds of whole steps and of their phases; ratios within rounds; how far two copies of ours are
        apart, which is the noise; bytes that the forward leaves for the backward; and on a CUDA device the most memory
        that a step takes beyond what it finds.

    Raises:
        AssertionError: the AdaLoRAs' losses differ.
    """
    torch.set_num_threads(threads)
    contestants = systems(model, rank, dtype, device, target, lora)
    batches = [model.batch(device, seed) for seed in range(BATCHES)]
    check_equal(contestants, batches, 1e-2 if dtype.itemsize == 2 else TOLERANCE)

    def whole_step(name: str) -> Contestant:
        turns = itertools.cycle(batches)

        def prepare() -> Callable[[], object]:
            parts = contestants[name].phases(next(turns))
            return lambda: [run() for _, run in parts]

        return prepare

    clock = partial(clocked, device=device)
    whole = interleave({name: whole_step(name) for name in contestants}, rounds, warmup, clock)
    phases: dict[str, dict[str, list[float]]] = {name: {phase: [] for phase in PHASES} for name in contestants}
    for i in range(max(2, rounds // 3)):
        for name, system in contestants.items():
            for phase, run in system.phases(batches[i % BATCHES]):
                phases[name][phase].append(clock(run))
    case = described(model, rank, dtype) | {"threads": threads, "device": device, "lora": lora or rank}
    record = {
        "benchmark": "training step",
        "case": case,
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
    if device != "cpu":
        record["peak_bytes"] = {name: peak_bytes(system, batches[0]) for name, system in contestants.items()}
    return record


def clocked(run: Callable[[], object], device: str) -> float:
    """Seconds of one part, until the device is idle."""
    start = time.perf_counter()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_bytes(system: System, batch: dict[str, Tensor]) -> int:
    """The most that a step allocates on the CUDA device beyond what was allocated before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _, run in system.phases(batch):
        run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def milliseconds(seconds: list[float]) -> dict[str, float]:
    """Median with 20/80 percentiles."""
    return {name: 1e3 * value for name, value in vars(Sample.of(seconds)).items()}


def check_equal(contestants: dict[str, System], batches: list[dict[str, Tensor]], tolerance: float) -> None:
    """The AdaLoRAs' losses over a few steps, before anything is timed."""
    losses: dict[str, list[float]] = {}
    for name in (PEFT, OURS, OURS_SWEPT, OURS_AGAIN):
        losses[name] = []
        for i in range(COMPARED):
            for _, run in contestants[name].phases(batches[i % len(batches)]):
                run()
            loss = contestants[name].loss
            assert loss is not None
            losses[name].append(loss.item())
    for name, values in losses.items():
        apart = max(abs(a - b) / abs(b) for a, b in zip(values, losses[PEFT], strict=True))
        if not apart <= tolerance:
            raise AssertionError(f"{name}: losses differ from PEFT's by {apart:.1e}, relative")


def saved_bytes(system: System, batch: dict[str, Tensor]) -> int:
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


__all__ = ["check_equal", "measure", "saved_bytes"]
