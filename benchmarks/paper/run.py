"""One run: a task, a method, a budget and a seed, from the rows to a record on disk."""

from __future__ import annotations

import json
import platform
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer, set_seed

from benchmarks.environment import commit
from benchmarks.paper import evaluation, training
from benchmarks.paper.methods import prepare, trained_parameters
from benchmarks.paper.presets import Preset
from benchmarks.paper.tasks import SUMMARIES, Task
from benchmarks.paper.tasks.load import TRAINING
from benchmarks.records import write

RECORD = "record.json"


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
    def name(self) -> str:
        """For people."""
        return f"{self.task.name}, {self.method}, {self.preset.budget}, seed {self.seed}"


def execute(run: Run, rows: Mapping[str, Dataset], machine: training.Machine) -> dict[str, Any]:
    """Train and judge, from the last checkpoint if there is one; what has ended is not done again.

    Args:
        run: what.
        rows: of ``tasks.load`` or of a stand-in.
        machine: how.

    Returns:
        The record, which lies in ``run.folder`` as well (of several processes, the first writes it).

    Raises:
        ValueError: the folder holds a run with other settings.
    """
    settings = _settings(run, machine)
    if run.record is not None:
        _same(run, settings)
        return run.record
    set_seed(run.seed)
    tokenizer = AutoTokenizer.from_pretrained(run.model)
    model = training.pretrained(run.task, run.model)
    total = sum(p.numel() for p in model.parameters())
    preset = run.preset
    trained_on = training.features(run.task, rows[TRAINING], tokenizer, preset, machine.workers, training=True)
    setting = training.setting(preset, len(trained_on))
    prepared = prepare(model, run.method, setting)
    resumable = run.method not in training.NOT_RESUMED
    trainer = training.trainer(
        run.task, prepared, tokenizer, trained_on, preset, setting, run.seed, machine, run.folder, resumable
    )
    begun = time.perf_counter()
    training.train(trainer, run.folder)
    seconds = time.perf_counter() - begun
    scores, baselines = {}, {}
    for split in run.task.evaluation:
        judged_by = training.features(run.task, rows[split], tokenizer, preset, machine.workers, training=False)
        scores[split] = evaluation.scores(run.task, trainer, rows[split], judged_by)
        tokens = [*trained_on["labels"], *judged_by["labels"]] if run.task.kind == SUMMARIES else []
        baselines[split] = evaluation.baselines(run.task, rows[TRAINING], rows[split], tokens)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    record = settings | {
        "scores": scores, "baselines": baselines, "rows": {split: len(part) for split, part in rows.items()},
        "trained_parameters": trained_parameters(prepared.model), "parameters": total, "setting": asdict(setting),
        "losses": losses, "seconds": seconds, "commit": commit(), "device": str(trainer.args.device),
        "python": platform.python_version(), **{name: version(name) for name in ("torch", "transformers", "peft")},
    }  # fmt: skip
    if trainer.is_world_process_zero():
        write(run.folder / RECORD, record)
    return record


def _settings(run: Run, machine: training.Machine) -> dict[str, Any]:
    preset = asdict(replace(run.preset, paper=()))
    del preset["paper"]
    return {
        "task": run.task.name, "method": run.method, "budget": run.preset.budget, "seed": run.seed,
        "model": Path(run.model).name, "preset": preset, "precision": machine.precision,
    }  # fmt: skip


def _same(run: Run, settings: dict[str, Any]) -> None:
    held = run.record or {}
    other = [name for name, value in settings.items() if held.get(name) != json.loads(json.dumps(value))]
    if other:
        raise ValueError(
            f"output: {run.folder} holds a run with another {', '.join(other)}; give another folder, or remove it"
        )


__all__ = ["RECORD", "Run", "execute"]
