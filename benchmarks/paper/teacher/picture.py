"""The pictures: the ranks that were found against the true ones, and the border where AdaLoRA stops winning."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.paper.teacher import protocol as fixed
from benchmarks.paper.teacher.protocol import AdaLora, Method, Setting
from benchmarks.paper.teacher.records import Result, Results
from benchmarks.paper.teacher.runner import geometric_mean, losses
from benchmarks.paper.teacher.summary import published
from benchmarks.paper.teacher.tables import TITLES

DRAWN: dict[Method, tuple[str, str]] = {"adalora": ("o", "#0072b2"), "lora-truncated": ("x", "#d55e00")}
MARKERS = ("o", "s", "^", "D", "v", "P")


def _by_true_rank(found: Iterable[Result]) -> dict[int, list[int]]:
    ranks = defaultdict(list)
    for result in found:
        if result["loss"] is None:
            continue
        for true, rank in zip(result["true_ranks"], result["ranks"], strict=True):
            ranks[true].append(rank)
    return dict(sorted(ranks.items()))


def draw_ranks(results: Results, path: Path) -> None:
    """Mean, lowest and highest rank found over the seeds, by the true one, for each scale and budget."""
    protocol = results.protocol
    rows, columns = len(protocol.budgets), len(protocol.scales)
    figure = Figure(figsize=(2.9 * columns, 2.6 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for row, budget in zip(grid, protocol.budgets, strict=True):
        for ax, scale in zip(row, protocol.scales, strict=True):
            ax.axline((0, 0), slope=1, color="0.8", linewidth=1)
            ax.set(xticks=range(0, max(protocol.true_ranks) + 1, 2), yticks=range(0, protocol.initial_rank + 1, 2))
            for method, (marker, colour) in DRAWN.items():
                setting = Setting(method, "varied", scale, AdaLora() if method == "adalora" else None)
                ranks = _by_true_rank(published(results, setting, budget).values())
                if ranks:
                    _points(ax, ranks, marker, colour, TITLES[method])
            ax.set_title(f"scale {scale:g}, budget {budget:g}", fontsize="small")
    figure.supxlabel("true rank of the matrix", fontsize="medium")
    figure.supylabel("rank found", fontsize="medium")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(DRAWN), frameon=False)
    figure.savefig(path, dpi=100)


def _points(ax: Any, ranks: dict[int, list[int]], marker: str, colour: str, label: str) -> None:
    means = [statistics.fmean(found) for found in ranks.values()]
    below = [mean - min(found) for mean, found in zip(means, ranks.values(), strict=True)]
    above = [max(found) - mean for mean, found in zip(means, ranks.values(), strict=True)]
    shift = 0.12 if marker == "x" else -0.12
    at = [true + shift for true in ranks]
    ax.errorbar(at, means, (below, above), fmt=marker, color=colour, markersize=4, linewidth=0.8, label=label)


def draw_border(results: Results, path: Path) -> None:
    """AdaLoRA's loss as a multiple of LoRA's by γ in units of the initial loss, at budget 1; one line a scale."""
    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    ax = figure.subplots()
    gammas = [gamma for gamma in results.protocol.gammas if gamma > 0]
    for scale, marker in zip(results.protocol.scales, MARKERS, strict=False):
        settings = [
            s for s in fixed.study_settings(results.protocol) if s.scale == scale and s.adalora and s.adalora.of_loss
        ]
        points = {s.adalora.gamma: _times_lora(results, s) for s in settings if s.adalora}
        drawn = [(gamma, points[gamma]) for gamma in gammas if points.get(gamma) is not None]
        if not drawn:
            continue
        (line,) = ax.plot(*zip(*drawn, strict=True), marker=marker, markersize=5, label=f"scale {scale:g}")
        at = _default(results, scale)
        if at is not None:
            ax.plot(*at, marker=marker, color=line.get_color(), markersize=9, fillstyle="none", linestyle="none")
    ax.axhline(1, color="0.6", linewidth=1)
    ax.set(xscale="log", yscale="log", xlabel="γ / initial loss", ylabel="AdaLoRA's loss / LoRA's")
    ax.set_title(f"Budget 1; large open marks: γ = {AdaLora().gamma:g}", fontsize="medium")
    if ax.lines[1:]:
        ax.legend(frameon=False)
    figure.savefig(path, dpi=100)


def _times_lora(results: Results, setting: Setting) -> float | None:
    """Geometric mean over the seeds that both have run."""
    ours = published(results, setting, 1.0)
    theirs = published(results, Setting("lora", setting.teacher, setting.scale), 1.0)
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    return geometric_mean(losses(ours[s] for s in seeds)) / geometric_mean(losses(theirs[s] for s in seeds))


def _default(results: Results, scale: float) -> tuple[float, float] | None:
    """Where the default γ lies."""
    setting = Setting("adalora", "varied", scale, AdaLora())
    found, times = published(results, setting, 1.0).values(), _times_lora(results, setting)
    if times is None:
        return None
    return statistics.median(result["gamma"] / result["start"] for result in found), times


__all__ = ["draw_border", "draw_ranks"]
