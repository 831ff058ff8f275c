"""What a run is, where its record lies, and what of the records is committed."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.paper.presets import Preset
from benchmarks.paper.tasks import Task
from benchmarks.records import read

RECORD = "record.json"
SETTINGS = "settings.json"

CASE = ("task", "method", "budget")
ENVIRONMENT = ("device", "commit", "python", "torch", "transformers", "peft")

Key = tuple[str, str, str]  # task, method, budget
Records = dict[Key, list[dict[str, Any]]]


@dataclass(frozen=True)
class Run:
    """What is run, and where its record goes.

    Attributes:
        task: with its rows from elsewhere.
        method: of ``methods.METHODS``.
        preset: settings; its method may be another name for this one's cells.
        seed: of the head, the adapters and the order of the rows.
        model: folder or repository of the pretrained model and its tokenizer.
        output: holds a folder for each run.
    """

    task: Task
    method: str
    preset: Preset
    seed: int
    model: str
    output: Path

    @property
    def folder(self) -> Path:
        """Where checkpoints, logs and the record lie."""
        budget = re.sub(r"[^\w.]+", "", self.preset.budget)
        return self.output / self.task.name / f"{self.method}-{budget}" / f"seed{self.seed}"

    @property
    def record(self) -> dict[str, Any] | None:
        """What came out; None where the run has not ended."""
        path = self.folder / RECORD
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    @property
    def begun(self) -> dict[str, Any] | None:
        """What a run that lies there was set to, ended or not; None where there is none."""
        path = self.folder / SETTINGS
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.task.name}, {self.method}, {self.preset.budget}, seed {self.seed}"

    def settings(self, precision: str) -> dict[str, Any]:
        """What a record must say to be this run's."""
        preset = {key: value for key, value in asdict(self.preset).items() if key != "paper"}
        return {
            "task": self.task.name, "method": self.method, "budget": self.preset.budget, "seed": self.seed,
            "model": Path(self.model).name, "preset": preset, "precision": precision,
        }  # fmt: skip


def by_cell(records: Iterable[dict[str, Any]]) -> Records:
    """Records by task, method and budget, in the order of their seeds."""
    found = defaultdict(list)
    for record in sorted(records, key=lambda record: record["seed"]):
        found[record["task"], record["method"], record["budget"]].append(record)
    return dict(found)


def below(output: Path) -> Records:
    """Every record of a folder of runs."""
    return by_cell(json.loads(path.read_text(encoding="utf-8")) for path in sorted(output.glob(f"*/*/*/{RECORD}")))


def kept(records: Records) -> dict[str, Any]:
    """What of the records is committed, as ``benchmarks.records`` lays it out: all but the losses.

    Runs that differ in nothing but the seed and what came out are one record.
    """
    environments: list[dict[str, Any]] = []
    cells: dict[str, dict[str, Any]] = {}
    for record in (record for cell in sorted(records) for record in records[cell]):
        environment = {name: record[name] for name in ENVIRONMENT}
        if environment not in environments:
            environments.append(environment)
        own = {name: record[name] for name in ("seed", "scores", "seconds")}
        shared = {name: v for name, v in record.items() if name not in {*own, *ENVIRONMENT, *CASE, "losses"}}
        cell = {"benchmark": "paper", "case": {name: record[name] for name in CASE}, **shared, "runs": []}
        held = cells.setdefault(json.dumps(cell, sort_keys=True), cell)
        held["runs"].append(own | {"environment": environments.index(environment)})
    return {"environments": environments, "records": [{"environment": 0} | cell for cell in cells.values()]}


def committed(path: Path) -> Records:
    """The records of a file that holds what ``kept`` gives."""
    content = read(path)
    found = []
    for record in content["records"]:
        shared = {name: v for name, v in record.items() if name not in ("benchmark", "case", "runs", "environment")}
        for run in record["runs"]:
            made_in = content["environments"][run["environment"]]
            found.append(record["case"] | shared | run | made_in)
    return by_cell(found)


__all__ = ["RECORD", "SETTINGS", "Records", "Run", "below", "by_cell", "committed", "kept"]
