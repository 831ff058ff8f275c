"""Runs of the stand-ins that take seconds."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.paper import presets
from benchmarks.paper.records import Run
from benchmarks.paper.run import execute
from benchmarks.paper.standin import STAND_INS, base, rows
from benchmarks.paper.training import Machine

SETTINGS = base.BaseSettings(hidden=32, layers=1, vocabulary=300, longest=48, steps=2, batch=4)


def standin(name: str, method: str, output: Path, bases: dict[str, str], **changes: Any) -> Run:
    """A run of its own preset, cut short."""
    preset = presets.find(name, method, None)
    small = {"epochs": 1, "batch": 8, "length": 32, "overlap": 8 if preset.overlap else 0, "size": min(preset.size, 2)}
    preset = replace(preset, **{**small, **changes})
    return Run(STAND_INS[name], method, preset, 0, bases[preset.model], output)


def some(name: str, parts: rows.Parts, count: int = 24) -> Any:
    """The first rows of each split."""
    return {split: part.select(range(min(count, len(part)))) for split, part in rows.make(name, parts).items()}


def executed(runs: list[Run], data: dict[str, Any], machine: Machine) -> list[dict[str, Any]]:
    """The records, in a process that torchrun has started."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500", LOCAL_WORLD_SIZE=os.environ["WORLD_SIZE"])
    return [execute(run, data[run.task.name], machine) for run in runs]
