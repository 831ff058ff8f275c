"""Makes the runs that the protocol names and the log doesn't hold yet."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.paper.teacher import protocol as fixed
from benchmarks.paper.teacher.methods import execute
from benchmarks.paper.teacher.protocol import Protocol, Run, Setting
from benchmarks.paper.teacher.records import Log, Result, Results

Execute = Callable[[Protocol, Run], Result]
# The grid, and the study of its border: by different logs two processes can make them side by side.
PARTS = {
    "grid": (fixed.main_settings, fixed.final_runs),
    "study": (fixed.study_settings, fixed.study_runs),
}


def losses(results: Iterable[Result]) -> list[float]:
    """Of these, with infinity for a training that diverged."""
    return [math.inf if result["loss"] is None else result["loss"] for result in results]


def geometric_mean(values: Iterable[float]) -> float:
    """For losses that lie orders of magnitude apart."""
    logarithms = [math.log(max(value, 1e-300)) for value in values]
    return math.exp(sum(logarithms) / len(logarithms))


def tuning(results: Results, setting: Setting) -> dict[float, float]:
    """Geometric mean of the tuning seeds' losses at each candidate rate of which all have been run."""
    runs = fixed.tuning_runs(results.protocol, setting)
    by_rate = {rate: [run for run in runs if run.rate == rate] for rate in results.protocol.rates}
    done = {rate: results.of(runs) for rate, runs in by_rate.items()}
    return {rate: geometric_mean(losses(found)) for rate, found in done.items() if len(found) == len(by_rate[rate])}


def tuned_rate(results: Results, setting: Setting) -> float | None:
    """The candidate of the lowest loss, or None where not all of them have been run."""
    means = tuning(results, setting)
    return min(means, key=lambda rate: means[rate]) if len(means) == len(results.protocol.rates) else None


def run_all(
    log: Log, parts: Sequence[str] = tuple(PARTS), execute: Execute = execute, tell: Callable[[str], Any] = print
) -> None:
    """Each setting of each part, tuned first. Runs that the log holds are not made again."""
    protocol = log.results.protocol
    todo = [
        (setting, published)
        for settings, published in (PARTS[part] for part in parts)
        for setting in settings(protocol)
    ]
    for i, (setting, published) in enumerate(todo, 1):
        _make(log, fixed.tuning_runs(protocol, setting), execute)
        rate = tuned_rate(log.results, setting)
        assert rate is not None  # all candidates have been run
        _make(log, published(protocol, setting, rate), execute)
        tell(f"{i} of {len(todo)}: {setting}, rate {rate}")


def _make(log: Log, runs: Iterable[Run], execute: Execute) -> None:
    for run in runs:
        if run not in log.results.runs:
            log.put(run, execute(log.results.protocol, run))


__all__ = ["PARTS", "geometric_mean", "losses", "run_all", "tuned_rate", "tuning"]
