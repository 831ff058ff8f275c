"""Tables of the runs that exist, with mean and standard deviation over seeds, beside the paper's figures."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.paper import presets
from benchmarks.paper.records import Records
from benchmarks.paper.standin import STAND_INS
from benchmarks.paper.tasks import NATS, SUMMARIES, TASKS, Task

NAME_OF_STAND_INS = "stand-ins"
HEAD = "head"
BASELINE = "none"
STANDARD_ERRORS = 2.0  # by which a method must beat what needs no training


def line(record: Mapping[str, Any]) -> str:
    """A run's scores."""
    parts = [
        f"{split}: " + ", ".join(f"{name} {value:.2f}" for name, value in scores.items())
        for split, scores in record["scores"].items()
    ]
    return f"  {'; '.join(parts)}; {record['trained_parameters']:,} parameters, {record['seconds']:.0f} s"


def figures(task: Task, record: Mapping[str, Any]) -> list[float]:
    """A run's metrics in the paper's order: all splits of a task's leading metric, or all metrics of its one split."""
    splits = [record["scores"][split] for split in task.evaluation]
    if len(splits) > 1:
        return [scores[task.metrics[0]] for scores in splits]
    return [splits[0][name] for name in task.metrics]


def table(name: str, held: Records) -> str:
    """A table in Markdown, with a line for each cell that was run.

    Args:
        name: of ``presets.TABLES``.
        held: the records that there are, of this table or others.
    """
    content, cells = presets.table(name), presets.cells(name)
    tasks = STAND_INS if name == NAME_OF_STAND_INS else TASKS
    shown = list(content["tasks"])
    lines = [f"**{content['title']}**: mean ± standard deviation over seeds. {content['source']}", ""]
    lines += [f"| method | budget | parameters | {' | '.join(_title(tasks[t]) for t in shown)} |"]
    lines += ["|---" * (3 + len(shown)) + "|"]
    used: list[dict[str, Any]] = []
    done = [key for key in held if any((c.task, c.budget) == (key[0], key[2]) for c in cells)]
    for method, budget in dict.fromkeys((key[1], key[2]) for key in sorted(done, key=_order(cells))):
        runs = [held.get((task, method, budget), []) for task in shown]
        used += [record for some in runs for record in some]
        parameters = _span(record["trained_parameters"] for some in runs for record in some)
        shown_cells = " | ".join(_cell(tasks[t], r) for t, r in zip(shown, runs, strict=True))
        lines.append(f"| {method} | {budget} | {parameters} | {shown_cells} |")
        known = {c.task: c.paper for c in cells if (c.method, c.budget) == (method.removesuffix("-peft"), budget)}
        if any(known.values()):
            printed = ["/".join(f"{v:.2f}" for v in known.get(t, ())) for t in shown]
            lines.append(f"| | the paper's | | {' | '.join(printed)} |")
    if not used:
        return f"{content['title']}: no run of it."
    if name == NAME_OF_STAND_INS:
        baselines = [next((r for r in used if r["task"] == t), None) for t in shown]
        cells_ = (
            "" if r is None else _cell(tasks[t], [r | {"scores": r["baselines"]}], spread=False)
            for t, r in zip(shown, baselines, strict=True)
        )
        lines.append(f"| no model | {BASELINE} | 0 | {' | '.join(cells_)} |")
    return "\n".join([*lines, "", *_made_with(used)])


def _title(task: Task) -> str:
    names = {"f1_of_positives": "F1", "rougeLsum": "rougeL"}
    metrics = "/".join(names.get(name, name) for name in task.metrics)
    return f"{task.title}: {metrics}" + ("/nats per token" if task.kind == SUMMARIES and task.hub is None else "")


def _made_with(used: Sequence[Mapping[str, Any]]) -> list[str]:
    """How many runs, and what they were set to: from the records alone."""
    steps: dict[str, set[str]] = {}
    rates: dict[tuple[str, float], set[str]] = {}
    for record in used:
        preset, setting = record["preset"], record["setting"]
        warm = f"t_i {setting['initial_warmup']}, t_f {setting['final_warmup']}, ΔT {setting['mask_interval']}"
        steps.setdefault(record["task"], set()).add(f"{setting['total_steps']} steps of {preset['batch']}, {warm}")
        rates.setdefault((record["method"], preset["learning_rate"]), set()).add(record["task"])
    tasks = [f"{task}: {'; or '.join(sorted(how))}" for task, how in sorted(steps.items())]
    chosen: dict[str, list[str]] = {}
    for (method, rate), of in sorted(rates.items()):
        alone = sum(m == method for m, _ in rates) == 1
        chosen.setdefault(method, []).append(f"{rate:g}" + ("" if alone else f" ({', '.join(sorted(of))})"))
    return [
        f"{len(used)} runs; seeds {_names(r['seed'] for r in used)}; commit {_names(r['commit'] for r in used)}; "
        f"{_names(r['precision'] for r in used)} on {_names(r['device'] for r in used)}; "
        + "; ".join(f"{name} {_names(r[name] for r in used)}" for name in ("torch", "transformers", "peft"))
        + ".",
        f"Training: {'. '.join(tasks)}.",
        f"Learning rates: {'; '.join(f'{method} {chr(44).join(of)}' for method, of in chosen.items())}.",
    ]


def _names(values: Iterable[Any]) -> str:
    return ", ".join(map(str, sorted(set(values))))


def _span(counts: Iterable[int]) -> str:
    """A number of parameters, or its least and greatest over tasks."""
    known = sorted(set(counts))
    return "–".join(f"{count:,}" for count in dict.fromkeys((known[0], known[-1])))


def _cell(task: Task, runs: Sequence[Mapping[str, Any]], spread: bool = True) -> str:
    if not runs:
        return ""
    columns = list(zip(*(figures(task, record) for record in runs), strict=True))
    if task.kind == SUMMARIES and all(NATS in scores for r in runs for scores in r["scores"].values()):
        columns.append(tuple(r["scores"][task.evaluation[0]][NATS] for r in runs))
    shown = "/".join(f"{statistics.mean(values):.2f}" for values in columns)
    if not spread:
        return shown
    deviations = "/".join(f"{statistics.stdev(values):.2f}" for values in columns) if len(runs) > 1 else "one seed"
    return f"{shown} ± {deviations}"


def _order(cells: Sequence[presets.Preset]) -> Any:
    place = {(c.method, c.budget): i for i, c in reversed(list(enumerate(cells)))}
    return lambda key: (place.get((key[1].removesuffix("-peft"), key[2]), len(cells)), key)


def not_beaten(held: Records) -> list[str]:
    """Which methods don't beat, by two standard errors, what needs no training, or a head on the frozen model."""
    missed = []
    for (name, method, _), runs in held.items():
        if name not in STAND_INS or method == HEAD:
            continue
        task = STAND_INS[name]
        metric, sign = (NATS, -1) if task.kind == SUMMARIES else (task.metrics[0], 1)
        split = task.evaluation[0]
        scores = [sign * r["scores"][split][metric] for r in runs]
        rivals = {"the baseline": [sign * runs[0]["baselines"][split][metric]]}
        heads = [r for key, some in held.items() if key[:2] == (name, HEAD) for r in some]
        if heads:
            rivals["a head on the frozen model"] = [sign * r["scores"][split][metric] for r in heads]
        if len(runs) < 2:
            missed.append(f"{name}, {method}: 1 seed, which has no standard error")
            continue
        for rival, others in rivals.items():
            gain = statistics.mean(scores) - statistics.mean(others)
            error = (_squared_error(scores) + _squared_error(others)) ** 0.5
            if gain <= STANDARD_ERRORS * error:
                missed.append(f"{name}, {method}: {gain:+.2f} ± {error:.2f} against {rival}")
    return missed


def _squared_error(values: Sequence[float]) -> float:
    return statistics.variance(values) / len(values) if len(values) > 1 else 0.0


__all__ = ["HEAD", "NAME_OF_STAND_INS", "figures", "line", "not_beaten", "table"]
