"""One run: a task, a method, a budget and a seed, from the rows to a record on disk."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer, set_seed

from benchmarks.environment import commit
from benchmarks.paper import evaluation, training
from benchmarks.paper.methods import prepare, trained_parameters
from benchmarks.paper.records import RECORD, SETTINGS, Run
from benchmarks.paper.tasks import SUMMARIES, TRAINING
from benchmarks.records import write


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
    settings = run.settings(machine.precision)
    if run.begun is not None:
        _same(run, settings)
    if run.record is not None:
        return run.record
    set_seed(run.seed)
    tokenizer = AutoTokenizer.from_pretrained(run.model)
    model = training.pretrained(run.task, run.model, run.preset.head_dropout)
    total = sum(p.numel() for p in model.parameters())
    preset = run.preset
    trained_on = _features(run, rows[TRAINING], tokenizer, machine, learning=True)
    setting = training.setting(preset, len(trained_on))
    prepared = prepare(model, run.method, setting)
    resumable = run.method not in training.NOT_RESUMED
    trainer = training.trainer(
        run.task, prepared, tokenizer, trained_on, preset, setting, run.seed, machine, run.folder, resumable
    )
    if trainer.is_world_process_zero():
        write(run.folder / SETTINGS, settings)
    begun = time.perf_counter()
    training.train(trainer, run.folder)
    seconds = time.perf_counter() - begun
    scores, baselines = {}, {}
    for split in run.task.evaluation:
        judged_by = _features(run, rows[split], tokenizer, machine, learning=False)
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


def _features(run: Run, rows: Dataset, tokenizer: Any, machine: training.Machine, learning: bool) -> Dataset:
    with training.processes().main_process_first():  # the others find what it has put into the cache
        return training.features(run.task, rows, tokenizer, run.preset, machine.workers, training=learning)


def _same(run: Run, settings: dict[str, Any]) -> None:
    held = run.begun or {}
    other = [name for name, value in settings.items() if held.get(name) != json.loads(json.dumps(value))]
    if other:
        raise ValueError(
            f"output: {run.folder} holds a run with another {', '.join(other)}; give another folder, or remove it"
        )


__all__ = ["execute"]
