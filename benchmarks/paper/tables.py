"""Tables of the runs that exist, with mean and standard deviation over seeds, beside the paper's figures."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.paper import presets
from benchmarks.paper.evaluation import NATS
from benchmarks.paper.run import RECORD
from benchmarks.paper.standin import rows as standin
from benchmarks.paper.tasks import SUMMARIES, TASKS, Task

STAND_INS = "stand-ins"
HEAD = "head"
STANDARD_ERRORS = 2.0  # by which a method must beat what needs no training

Key = tuple[str, str, str]  # task, method, budget


def records(output: Path) -> dict[Key, list[dict[str, Any]]]:
    """Every record below ``output``, by task, method and budget, in the order of their seeds."""
    found = defaultdict(list)
    for path in sorted(output.glob(f"*/*/*/{RECORD}")):
        record = json.loads(path.read_text(encoding="utf-8"))
        found[record["task"], record["method"], record["budget"]].append(record)
    return {key: sorted(held, key=lambda r: r["seed"]) for key, held in found.items()}


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


def table(name: str, output: Path) -> str:
    """A table in Markdown, with a line for each cell that was run.

    Args:
        name: of ``presets.TABLES``.
        output: the folder of the runs.
    """
    content, cells, held = presets.table(name), presets.cells(name), records(output)
    tasks = standin.TASKS if name == STAND_INS else TASKS
    shown = [task for task in content["tasks"]]
    lines = [f"**{content['title']}**: mean ± standard deviation over seeds, in percent; below it the paper's.", ""]
    lines += [f"| method | budget | {' | '.join(tasks[t].title for t in shown)} |", "|---" * (2 + len(shown)) + "|"]
    used: list[dict[str, Any]] = []
    done = [key for key in held if any((c.task, c.budget) == (key[0], key[2]) for c in cells)]
    for method, budget in dict.fromkeys((key[1], key[2]) for key in sorted(done, key=_order(cells))):
        runs = [held.get((task, method, budget), []) for task in shown]
        used += [record for some in runs for record in some]
        lines.append(
            f"| {method} | {budget} | {' | '.join(_cell(tasks[t], r) for t, r in zip(shown, runs, strict=True))} |"
        )
        known = {c.task: c.paper for c in cells if (c.method, c.budget) == (method.removesuffix("-peft"), budget)}
        if any(known.values()):
            printed = ["/".join(f"{v:.2f}" for v in known.get(t, ())) for t in shown]
            lines.append(f"| | paper | {' | '.join(printed)} |")
    if not used:
        return f"{content['title']}: no run of it in {output}."
    commits = sorted({record["commit"] for record in used})
    seeds = sorted({record["seed"] for record in used})
    lines += [
        "",
        f"{len(used)} runs; seeds {', '.join(map(str, seeds))}; commits {', '.join(commits)}; {content['source']}",
    ]
    return "\n".join(lines)


def _cell(task: Task, runs: Sequence[Mapping[str, Any]]) -> str:
    if not runs:
        return ""
    columns = list(zip(*(figures(task, record) for record in runs), strict=True))
    if task.kind == SUMMARIES and all(NATS in scores for r in runs for scores in r["scores"].values()):
        columns.append(tuple(r["scores"][task.evaluation[0]][NATS] for r in runs))
    shown = "/".join(f"{statistics.mean(values):.2f}" for values in columns)
    spread = "/".join(f"{statistics.stdev(values):.2f}" for values in columns) if len(runs) > 1 else "one seed"
    return f"{shown} ± {spread}"


def _order(cells: Sequence[presets.Preset]) -> Any:
    place = {(c.method, c.budget): i for i, c in reversed(list(enumerate(cells)))}
    return lambda key: (place.get((key[1].removesuffix("-peft"), key[2]), len(cells)), key)


def not_beaten(output: Path) -> list[str]:
    """Which methods don't beat, by two standard errors, what needs no training, or a head on the frozen model."""
    held = records(output)
    missed = []
    for (name, method, _), runs in held.items():
        if name not in standin.TASKS or method == HEAD:
            continue
        task = standin.TASKS[name]
        metric, sign = (NATS, -1) if task.kind == SUMMARIES else (task.metrics[0], 1)
        split = task.evaluation[0]
        scores = [sign * r["scores"][split][metric] for r in runs]
        rivals = {"the baseline": [sign * runs[0]["baselines"][split][metric]]}
        heads = [r for key, some in held.items() if key[:2] == (name, HEAD) for r in some]
        if heads:
            rivals["a head on the frozen model"] = [sign * r["scores"][split][metric] for r in heads]
        for rival, others in rivals.items():
            gain = statistics.mean(scores) - statistics.mean(others)
            error = (_squared_error(scores) + _squared_error(others)) ** 0.5
            if gain <= STANDARD_ERRORS * error:
                missed.append(f"{name}, {method}: {gain:+.2f} ± {error:.2f} against {rival}")
    return missed


def _squared_error(values: Sequence[float]) -> float:
    return statistics.variance(values) / len(values) if len(values) > 1 else 0.0


__all__ = ["figures", "line", "not_beaten", "records", "table"]
