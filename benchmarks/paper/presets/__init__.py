"""The cells of the paper's tables, one data file for each table: what was run, and what the paper says came out."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SHARED = ("model", "alpha", "length", "overlap", "target_length", "beams", "batch", "epochs", "warmup")
FOLDER = Path(__file__).parent
COST = "cost"  # the one table without cells to be trained
TABLES = tuple(sorted(path.stem for path in FOLDER.glob("*.json") if path.stem != COST))


@dataclass(frozen=True)
class Preset:
    """One cell of a table.

    Attributes:
        table, task, method, budget: which; the budget as the paper prints it.
        model: repository on the hub.
        size: as ``methods.Setting.size``.
        alpha: likewise.
        learning_rate, batch, epochs: of the training; ``batch`` over all devices and accumulated steps.
        warmup: steps in which the learning rate rises; 0 for a share of all steps.
        weight_decay: of AdamW.
        head_dropout: in front of a classifier; the model's own where None.
        orthogonality, initial_warmup, mask_interval, final_warmup: AdaLoRA's γ, t_i, ΔT and t_f.
        length, overlap, target_length, beams: tokens of an input, of two windows' overlap and of a summary; and width
            of the search for a summary. 0 where there is none.
        paper: the paper's figures, in the order of the task's metrics (MNLI: matched, mismatched).
    """

    table: str
    task: str
    method: str
    budget: str
    model: str
    size: int
    alpha: float
    learning_rate: float
    batch: int
    epochs: float
    orthogonality: float
    initial_warmup: int
    mask_interval: int
    final_warmup: int
    length: int
    warmup: int = 0
    weight_decay: float = 0.01
    head_dropout: float | None = None
    overlap: int = 0
    target_length: int = 0
    beams: int = 0
    paper: tuple[float, ...] = ()


def table(name: str) -> dict[str, Any]:
    """A table's data file.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in (*TABLES, COST):
        raise ValueError(f"table: expected one of {', '.join(TABLES)}, got {name!r}")
    content: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return content


def cells(name: str) -> list[Preset]:
    """Every cell of a table."""
    content = table(name)
    shared = {key: content[key] for key in _SHARED if key in content}
    found = []
    for row in content["cells"]:
        for task, figures in row["paper"].items():
            own = dict(content["tasks"][task])
            rates = content["other_methods"] | own.pop("other_methods", {})
            settings = shared | own
            settings["learning_rate"] = rates.get(row["method"], settings["learning_rate"])
            about = {"table": name, "task": task, **{key: row[key] for key in ("method", "budget", "size")}}
            found.append(Preset(**about, **settings, paper=tuple(figures)))
    return found


def methods(*names: str) -> tuple[str, ...]:
    """The methods of the tables of these names, of all tables where none is given; PEFT's AdaLoRA beside ours."""
    found = dict.fromkeys(row["method"] for name in names or TABLES for row in table(name)["cells"])
    return tuple(m for method in found for m in ([method, "adalora-peft"] if method == "adalora" else [method]))


def find(task: str, method: str, budget: str | None) -> Preset:
    """The cell of a task, a method and a budget.

    Args:
        task: as in ``tasks.TASKS``.
        method: as in ``methods.METHODS``; "adalora-peft" takes the cells of "adalora".
        budget: as the paper prints it; None where the method has one alone.

    Raises:
        ValueError: no such cell, or several.
    """
    named = "adalora" if method == "adalora-peft" else method
    rows = [p for name in TABLES for p in cells(name) if (p.task, p.method) == (task, named)]
    if budget is not None:
        rows = [p for p in rows if p.budget.lower() == budget.lower()] or _none(task, method, rows)
    if not rows:
        raise ValueError(f"task, method: the paper's tables have no cell of {task} and {method}")
    if len({(p.budget, p.size) for p in rows}) > 1:
        raise ValueError(f"budget: expected one of {', '.join(dict.fromkeys(p.budget for p in rows))}, got {budget}")
    return rows[0]


def _none(task: str, method: str, rows: list[Preset]) -> list[Preset]:
    known = ", ".join(dict.fromkeys(p.budget for p in rows))
    raise ValueError(f"budget: expected one of {known or 'none'} for {task} and {method}")


__all__ = ["COST", "TABLES", "Preset", "cells", "find", "methods", "table"]
