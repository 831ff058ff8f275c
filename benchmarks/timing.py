"""Interleaved timing: all contestants run in turn, round after round, so that a change of the machine's speed meets
all of them."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Contestant = Callable[[], Callable[[], object]]


@dataclass(frozen=True)
class Sample:
    """Times of one contestant, in seconds."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, seconds: list[float]) -> Sample:
        """Median and 20/80 percentiles."""
        fifths = statistics.quantiles(seconds, n=5)
        return cls(statistics.median(seconds), fifths[0], fifths[3])


def wall_seconds(run: Callable[[], object]) -> float:
    """Host time of one run."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def interleave(
    contestants: Mapping[str, Contestant],
    rounds: int,
    warmup: int = 3,
    clock: Callable[[Callable[[], object]], float] = wall_seconds,
) -> dict[str, list[float]]:
    """Time each contestant once per round, in an order that rotates.

    Args:
        contestants: for each name a function that prepares one run, untimed, and returns the run to be timed.
        rounds: timed rounds.
        warmup: rounds thrown away first.
        clock: the seconds that a run takes.

    Returns:
        The seconds of each contestant, by round.
    """
    names = list(contestants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        for i in range(warmup + rounds):
            for j in range(len(names)):
                name = names[(i + j) % len(names)]
                elapsed = clock(contestants[name]())
                if i >= warmup:
                    seconds[name].append(elapsed)
    finally:
        gc.enable()
    return seconds


def ratio(numerator: list[float], denominator: list[float]) -> float:
    """Median over rounds of the ratio within a round, where both sides met the same machine."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


__all__ = ["Contestant", "Sample", "interleave", "ratio", "wall_seconds"]
