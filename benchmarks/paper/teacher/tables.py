"""The tables in Markdown, made from the runs that exist and from nothing else."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from benchmarks.paper.teacher import protocol as fixed
from benchmarks.paper.teacher.protocol import AdaLora, Method, Setting, Teacher
from benchmarks.paper.teacher.records import Result, Results
from benchmarks.paper.teacher.runner import losses, tuned_rate, tuning
from benchmarks.paper.teacher.summary import correlations, published, verdicts, wins

TITLES: dict[Method, str] = {
    "lora": "LoRA, same rank",
    "lora-true": "LoRA, true ranks",
    "lora-truncated": "LoRA, truncated",
    "adalora": "AdaLoRA",
}


def table(results: Results) -> str:
    """Everything in Markdown."""
    protocol = results.protocol
    initial = protocol.initial_rank * len(protocol.true_ranks)
    end = protocol.steps - round(AdaLora().final_warmup * protocol.steps)
    marks = {True: "reached", False: "MISSED", None: "open"}
    commits = ", ".join(f"`{about['commit']}`" for about in results.environments)
    lines = [
        "# Who finds the ranks of a teacher's increment",
        "",
        f"Made by `python -m benchmarks.paper.teacher collect` from {len(results.runs)} runs; commit {commits}, torch "
        f"{', '.join(sorted({about['torch'] for about in results.environments}))}. The protocol is "
        "`benchmarks/paper/teacher/protocol.py`, which was committed before the runs.",
        "",
        f"A residual MLP of {len(protocol.true_ranks)} matrices, {protocol.width}×{protocol.width}; the teacher's "
        f"increments have the ranks {', '.join(map(str, protocol.true_ranks))} (control: "
        f"{protocol.uniform_rank(1.0)} each) and singular values that are all equal to the scale. {protocol.steps} "
        "steps. A loss is the held-out error as a share of the frozen network's: median [lowest, highest] of the "
        "seeds. A win is a lower loss on the same seed.",
        "",
        f"**AdaLoRA trains its initial rank, {initial} triplets, until T - t_f (step {end} of {protocol.steps})**: the "
        "budget is what it ends with, where LoRA of the same rank everywhere has no more at any time. LoRA, truncated "
        f"trains {initial} to the last step.",
        "",
        f"At scale {max(protocol.scales):g} and budget 1 must be reached:",
        "",
        *(f"* {text}: **{marks[held]}**" for text, held in verdicts(results)),
    ]
    parts: dict[Teacher, str] = {"varied": "Another rank in each matrix", "uniform": "The control: the same rank"}
    for teacher, title in parts.items():
        lines += ["", f"## {title}", "", *_grid(results, teacher)]
    lines += ["", "## The border: γ against the loss", "", *_border(results)]
    lines += ["", f"## What else was tried, at scale {min(protocol.scales):g} and budget 1", "", *_others(results)]
    lines += ["", "## Learning rates", "", *_rates(results)]
    return "\n".join(lines)


def _grid(results: Results, teacher: Teacher) -> Iterator[str]:
    """A row for each scale and budget that has runs."""
    methods = [m for m in TITLES if teacher == "varied" or m != "lora-true"]
    rivals: tuple[Method, ...] = ("lora", "lora-truncated")
    ranked: tuple[Method, ...] = ("adalora", "lora-truncated") if teacher == "varied" else ()
    yield from _header(
        ["scale", "budget", *(TITLES[m] for m in methods), *(f"AdaLoRA below {TITLES[m]}" for m in rivals)]
        + [f"rank correlation, {TITLES[m]}" for m in ranked]
    )
    for scale in results.protocol.scales:
        for budget in results.protocol.budgets:
            found = {
                m: published(results, Setting(m, teacher, scale, AdaLora() if m == "adalora" else None), budget)
                for m in methods
            }
            if any(found.values()):
                yield _row(
                    [f"{scale:g}", f"{budget:g} ({results.protocol.total_rank(budget)})"]
                    + [_loss(list(found[m].values())) for m in methods]
                    + [_wins(found["adalora"], found[m]) for m in rivals]
                    + [_mean_correlation(list(found[m].values())) for m in ranked]
                )


def _border(results: Results) -> Iterator[str]:
    """A row for each scale and γ, at budget 1."""
    yield (
        "γ weighs a term whose gradient keeps its size while the loss's shrinks with the square of the increment's "
        "scale. Pull: that gradient over all A and B as a share of the loss's, at step t_i, median. Each row has its "
        "learning rate tuned."
    )
    yield ""
    yield from _header(["scale", "γ", "γ / initial loss", "pull", "AdaLoRA", f"below {TITLES['lora']}", "correlation"])
    settings = [s for s in fixed.study_settings(results.protocol) if s.adalora and s.adalora.of_loss]
    settings += [Setting("adalora", "varied", scale, AdaLora()) for scale in results.protocol.scales]
    rows = []
    for setting in settings:
        ours = published(results, setting, 1.0)
        found = [result for result in ours.values() if result["loss"] is not None]
        if not found:
            continue
        of_loss = statistics.median(r["gamma"] / r["start"] for r in found)
        pull = statistics.median(r["regularizer_to_loss"] for r in found)
        gamma = statistics.median(r["gamma"] for r in found)
        rows.append(
            (setting.scale, of_loss, [f"{gamma:.2g}", f"{of_loss:.2g}", f"{pull:.2g}", *_ours(results, setting)])
        )
    for scale, _, cells in sorted(rows):
        yield _row([f"{scale:g}", *cells])


def _others(results: Results) -> Iterator[str]:
    """A row for each setting that was changed alone, at the default γ, and for the default itself."""
    yield from _header(["changed", "AdaLoRA", f"below {TITLES['lora']}", "correlation"])
    default, scale = AdaLora(), min(results.protocol.scales)
    for adalora in (default, *results.protocol.others):
        setting = Setting("adalora", "varied", scale, adalora)
        changed = [f"{name} {value:g}" for name, value in vars(adalora).items() if value != getattr(default, name)]
        if published(results, setting, 1.0):
            yield _row([", ".join(changed) or "nothing", *_ours(results, setting)])


def _rates(results: Results) -> Iterator[str]:
    """A row for each tuned setting: what each rate gave."""
    yield "Geometric mean of the loss on the tuning seeds, at budget 1; the chosen rate in bold."
    yield ""
    rates = results.protocol.rates
    yield from _header(["teacher", "scale", "setting", *(f"{rate:g}" for rate in rates)])
    for setting in dict.fromkeys(run.setting for run in results.runs):
        means, chosen = tuning(results, setting), tuned_rate(results, setting)
        cells = [f"{means[rate]:.2g}" if rate in means else "" for rate in rates]
        yield _row(
            [setting.teacher, f"{setting.scale:g}", _title(setting)]
            + [f"**{cell}**" if rate == chosen else cell for rate, cell in zip(rates, cells, strict=True)]
        )


def _title(setting: Setting) -> str:
    title = TITLES[setting.method]
    if setting.adalora is None:
        return title
    changed = {k: v for k, v in vars(setting.adalora).items() if v != getattr(AdaLora(), k) and k != "of_loss"}
    if setting.adalora.of_loss:
        changed = {"γ / initial loss": setting.adalora.gamma}
    return ", ".join([title, *(f"{name} {value:g}" for name, value in changed.items())])


def _ours(results: Results, setting: Setting) -> list[str]:
    """Loss, wins over LoRA and correlation, at budget 1."""
    ours = published(results, setting, 1.0)
    theirs = published(results, Setting("lora", setting.teacher, setting.scale), 1.0)
    found = list(ours.values())
    return [_loss(found), _wins(ours, theirs), _mean_correlation(found)]


def _loss(found: Sequence[Result]) -> str:
    values = losses(found)
    return f"{statistics.median(values):.2g} [{min(values):.2g}, {max(values):.2g}]" if values else ""


def _wins(ours: dict[int, Result], theirs: dict[int, Result]) -> str:
    won, seen = wins(ours, theirs)
    return f"{won} of {seen}" if seen else ""


def _mean_correlation(found: Sequence[Result]) -> str:
    values = correlations(found)
    return f"{statistics.fmean(values):.3f}" if values else ""


def _header(columns: Sequence[str]) -> list[str]:
    return [_row(columns), "|---" * len(columns) + "|"]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


__all__ = ["table"]
