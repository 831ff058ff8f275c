"""Runs from rows to records: every kind of task on tiny models, killed and resumed, refused where they don't fit."""

from __future__ import annotations

import json
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from benchmarks.paper import __main__ as command
from benchmarks.paper import presets, tables, training
from benchmarks.paper import run as running
from benchmarks.paper.run import Run, execute
from benchmarks.paper.standin import base, rows
from benchmarks.paper.tasks import TASKS
from benchmarks.paper.training import Machine

SETTINGS = base.BaseSettings(hidden=32, layers=1, vocabulary=300, longest=48, steps=2, batch=4)


@pytest.fixture(scope="module")
def parts() -> rows.Parts:
    """A corner of the standard library."""
    return rows.read(Path(sysconfig.get_path("stdlib")) / "email")


@pytest.fixture(scope="module")
def bases(parts: rows.Parts, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("bases")
    return {kind: str(base.pretrained(kind, parts, SETTINGS, folder)) for kind in base.KINDS}


def standin(name: str, method: str, output: Path, bases: dict[str, str], **changes: Any) -> Run:
    preset = presets.find(name, method, None)
    small = {"epochs": 1, "batch": 8, "length": 32, "overlap": 8 if preset.overlap else 0, "size": min(preset.size, 2)}
    preset = replace(preset, **{**small, **changes})
    return Run(rows.TASKS[name], method, preset, 0, bases[preset.model], output)


def some(name: str, parts: rows.Parts, count: int = 24) -> Any:
    return {split: part.select(range(min(count, len(part)))) for split, part in rows.make(name, parts).items()}


@pytest.mark.parametrize("name", rows.TASKS)
def test_every_kind_of_task_from_rows_to_record(
    name: str, parts: rows.Parts, bases: dict[str, str], tmp_path: Path
) -> None:
    run = standin(name, "adalora", tmp_path, bases)
    record = execute(run, some(name, parts), Machine(device_batch=4))
    assert run.record == json.loads(json.dumps(record))
    scores = record["scores"]["validation"]
    assert set(scores) >= set(rows.TASKS[name].metrics) and set(record["baselines"]["validation"]) == set(scores)
    assert record["setting"]["total_steps"] == len(record["losses"]) > 1
    assert 0 < record["trained_parameters"] < record["parameters"] and record["commit"]
    assert execute(run, {}, Machine(device_batch=4)) == run.record  # done: no row is read
    assert "± one seed" in tables.table("stand-ins", tmp_path)


class _Killed(Exception):
    """In place of the signal."""


class _Kill(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            raise _Killed


@pytest.mark.parametrize("method", ["adalora", "lora", "houlsby", "adalora-peft"])
def test_a_killed_run_resumes(
    method: str, parts: rows.Parts, bases: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine, data = Machine(device_batch=8, save_steps=3), some("order", parts, 64)
    whole = execute(standin("order", method, tmp_path / "whole", bases), data, machine)
    run = standin("order", method, tmp_path / "cut", bases)
    prepare = running.prepare

    def with_a_kill(*args: Any) -> Any:
        prepared = prepare(*args)
        prepared.callbacks.append(_Kill())
        return prepared

    with monkeypatch.context() as patch:
        patch.setattr(running, "prepare", with_a_kill)
        with pytest.raises(_Killed):
            execute(run, data, machine)
    assert run.record is None
    assert any(run.folder.glob("checkpoint-*")) == (method not in training.NOT_RESUMED)
    resumed = execute(run, data, machine)
    assert resumed["losses"] == whole["losses"] and resumed["scores"] == whole["scores"]


def test_ours_and_pefts_adalora_agree(parts: rows.Parts, bases: dict[str, str], tmp_path: Path) -> None:
    ours, peft = (
        execute(standin("order", method, tmp_path, bases, epochs=3), some("order", parts, 64), Machine())["losses"]
        for method in ("adalora", "adalora-peft")
    )
    assert len(ours) >= 20
    assert ours[:20] == pytest.approx(peft[:20], rel=1e-4)


def test_a_folder_with_another_run_is_refused(parts: rows.Parts, bases: dict[str, str], tmp_path: Path) -> None:
    run = standin("order", "lora", tmp_path, bases)
    execute(run, some("order", parts), Machine())
    other = replace(run, preset=replace(run.preset, learning_rate=1.0))
    with pytest.raises(ValueError, match="holds a run with another preset; give another folder"):
        execute(other, some("order", parts), Machine())


def test_warm_ups_shrink_with_the_training() -> None:
    preset = presets.find("rte", "adalora", "0.32M")
    full = training.setting(preset, 2490)
    assert (full.total_steps, full.initial_warmup, full.final_warmup) == (50 * 78, 600, 1800)
    small = training.setting(preset, 64)
    assert (small.total_steps, small.initial_warmup, small.final_warmup) == (100, 12, 37)


@pytest.mark.parametrize(
    ("machine", "message"),
    [(Machine("fp8"), "precision: expected one of fp32"), (Machine(device_batch=3), "device_batch: expected a share")],
)
def test_machines_that_do_not_fit(
    machine: Machine, message: str, parts: rows.Parts, bases: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        execute(standin("order", "lora", tmp_path, bases), some("order", parts), machine)


def test_every_cell_has_a_method_and_a_task() -> None:
    names = {name: rows.TASKS if name == "stand-ins" else TASKS for name in presets.TABLES}
    counted = {name: len(presets.cells(name)) for name in presets.TABLES}
    assert counted == {"ablation": 13, "glue": 96, "squad": 18, "stand-ins": 35, "summaries": 18}
    for name, tasks in names.items():
        for cell in presets.cells(name):
            assert cell.method in command.METHODS and cell.task in tasks
            figures = tables.figures(
                tasks[cell.task],
                {"scores": {s: dict.fromkeys(tasks[cell.task].metrics, 0.0) for s in tasks[cell.task].evaluation}},
            )
            assert name == "stand-ins" or len(cell.paper) in (len(figures), 1)


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (("rte", "adalora", "9M"), "budget: expected one of 0.65%, 1.27M, 0.32M for rte and adalora"),
        (("rte", "adalora", None), "budget: expected one of 0.65%, 1.27M, 0.32M, got None"),
        (("xsum", "bitfit", None), "the paper's tables have no cell of xsum and bitfit"),
    ],
)
def test_cells_that_are_not_there(cell: tuple[str, str, str | None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        presets.find(*cell)


def test_the_command_says_what_is_wrong_in_a_line(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    arguments = ["run", "--task", "rte", "--method", "adalora", "--budget", "0.32M", "--data", str(tmp_path / "none")]
    monkeypatch.setattr(sys, "argv", ["benchmarks.paper", *arguments])
    assert command.main() == 2
    assert "found no folder" in capsys.readouterr().err


def record(task: str, method: str, seed: int, score: float, budget: str = "b") -> dict[str, Any]:
    return {"task": task, "method": method, "budget": budget, "seed": seed, "commit": "abc", "trained_parameters": 1,
            "scores": {"validation": {"accuracy": score}}, "baselines": {"validation": {"accuracy": 50.0}}}  # fmt: skip


def put(output: Path, *records: dict[str, Any]) -> None:
    for held in records:
        folder = output / held["task"] / held["method"] / f"seed{held['seed']}"
        folder.mkdir(parents=True)
        (folder / "record.json").write_text(json.dumps(held))


def test_the_table_shows_runs_that_exist_beside_the_paper(tmp_path: Path) -> None:
    assert "no run of it" in tables.table("glue", tmp_path)
    put(tmp_path, *(record("rte", "adalora", seed, score, "0.32M") for seed, score in enumerate((86.0, 88.0))))
    shown = tables.table("glue", tmp_path).splitlines()
    assert any("| adalora | 0.32M |" in row and "87.00 ± 1.41" in row for row in shown)
    assert any(row.startswith("| | paper |") and "87.36" in row and "95.80" in row for row in shown)
    assert "2 runs; seeds 0, 1; commits abc" in shown[-1] and not any("bitfit" in row for row in shown)


def test_a_method_must_beat_both_rivals_by_two_standard_errors(tmp_path: Path) -> None:
    put(tmp_path, *(record("order", "head", seed, score) for seed, score in enumerate((59.0, 60.0, 61.0))))
    put(tmp_path, *(record("order", "lora", seed, score) for seed, score in enumerate((69.0, 70.0, 71.0))))
    assert tables.not_beaten(tmp_path) == []
    put(tmp_path, *(record("order", "bitfit", seed, score) for seed, score in enumerate((60.0, 61.0, 62.0))))
    assert len(tables.not_beaten(tmp_path)) == 1 and "a head on the frozen model" in tables.not_beaten(tmp_path)[0]
    put(tmp_path, *(record("order", "full", seed, score) for seed, score in enumerate((40.0, 50.0, 45.0))))
    assert sum("order, full" in line for line in tables.not_beaten(tmp_path)) == 2
