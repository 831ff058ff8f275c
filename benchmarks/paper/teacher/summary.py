"""What the runs that exist say: which are published, who wins, and whether the criteria are reached."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from benchmarks.paper.teacher.protocol import AdaLora, Run, Setting, Teacher
from benchmarks.paper.teacher.records import Result, Results
from benchmarks.paper.teacher.runner import losses, tuned_rate


def published(results: Results, setting: Setting, budget: float) -> dict[int, Result]:
    """By seed, the runs of a setting with its tuned rate, at one budget."""
    rate = tuned_rate(results, setting)
    runs = [] if rate is None else [Run(setting, budget, rate, seed) for seed in results.protocol.seeds]
    return {run.seed: results.runs[run] for run in runs if run in results.runs}


def wins(ours: dict[int, Result], theirs: dict[int, Result]) -> tuple[int, int]:
    """In how many of the seeds that both have run our loss is the lower one, and how many those are."""
    seeds = sorted(ours.keys() & theirs.keys())
    pairs = zip(losses(ours[s] for s in seeds), losses(theirs[s] for s in seeds), strict=True)
    return sum(mine < other for mine, other in pairs), len(seeds)


def against_lora(results: Results, teacher: Teacher, scale: float, budget: float) -> tuple[int, int]:
    """``wins`` of AdaLoRA, at its default settings, over LoRA of the same rank everywhere."""
    ours = published(results, Setting("adalora", teacher, scale, AdaLora()), budget)
    return wins(ours, published(results, Setting("lora", teacher, scale), budget))


def correlations(found: Iterable[Result]) -> list[float]:
    """Those that are defined."""
    return [result["correlation"] for result in found if result["correlation"] is not None]


def verdicts(results: Results) -> list[tuple[str, bool | None]]:
    """What must be reached at budget 1 and the largest scale, and whether it is; None where runs are missing."""
    protocol, scale = results.protocol, max(results.protocol.scales)
    count = len(protocol.seeds)
    won, seen = against_lora(results, "varied", scale, 1.0)
    lost, controls = against_lora(results, "uniform", scale, 1.0)
    found = correlations(published(results, Setting("adalora", "varied", scale, AdaLora()), 1.0).values())
    mean = statistics.fmean(found) if found else 0.0
    return [
        (
            f"loss below LoRA's in at least {protocol.must_win} of {count} seeds: {won} of {seen}",
            won >= protocol.must_win if seen == count else None,
        ),
        (
            f"mean rank correlation of at least {protocol.must_correlate}: {mean:.3f}",
            mean >= protocol.must_correlate if seen == count else None,
        ),
        (
            f"on the uniform control in at most {protocol.may_win} of {count} seeds: {lost} of {controls}",
            lost <= protocol.may_win if controls == count else None,
        ),
    ]


__all__ = ["against_lora", "correlations", "published", "verdicts", "wins"]
