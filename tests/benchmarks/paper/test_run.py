"""Runs from rows to records: every kind of task on tiny models, killed and resumed, refused where they don't fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, TrainerCallback

from benchmarks.paper import presets, records, tables, training
from benchmarks.paper import run as running
from benchmarks.paper.methods import prepare
from benchmarks.paper.run import execute
from benchmarks.paper.standin import STAND_INS, rows
from benchmarks.paper.training import Machine
from tests.benchmarks.paper.small import some, standin


@pytest.mark.parametrize("name", STAND_INS)
def test_every_kind_of_task_from_rows_to_record(
    name: str, parts: rows.Parts, bases: dict[str, str], tmp_path: Path
) -> None:
    run = standin(name, "adalora", tmp_path, bases)
    record = execute(run, some(name, parts), Machine(device_batch=4))
    assert run.record == json.loads(json.dumps(record))
    scores = record["scores"]["validation"]
    assert set(scores) >= set(STAND_INS[name].metrics) and set(record["baselines"]["validation"]) == set(scores)
    assert record["setting"]["total_steps"] == len(record["losses"]) > 1
    assert 0 < record["trained_parameters"] < record["parameters"] and record["commit"]
    assert execute(run, {}, Machine(device_batch=4)) == run.record  # done: no row is read
    assert "± one seed" in tables.table("stand-ins", records.below(tmp_path))


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


def test_the_presets_training_is_the_trainers(tmp_path: Path, bases: dict[str, str], parts: Any) -> None:
    run = standin("order", "lora", tmp_path, bases, warmup=3, weight_decay=0.5, head_dropout=0.25)
    model = training.pretrained(run.task, run.model, run.preset.head_dropout)
    assert model.dropout.p == 0.25
    setting = training.setting(run.preset, 64)
    prepared = prepare(model, run.method, setting)
    tokenizer = AutoTokenizer.from_pretrained(run.model)
    encoded = training.features(run.task, some("order", parts)["train"], tokenizer, run.preset, 1, True)
    for steps, warmup in ((8, 3), (5, 0)):
        setting = replace(setting, total_steps=steps)
        made = training.trainer(
            run.task, prepared, tokenizer, encoded, run.preset, setting, 0, Machine(device_batch=8), tmp_path, False
        )
        assert (made.args.warmup_steps, made.args.weight_decay) == (warmup, 0.5)


@pytest.mark.parametrize(
    ("machine", "message"),
    [
        (Machine("fp8"), "precision: expected one of fp32"),
        (Machine("fp16"), "precision: fp16 needs a GPU, and there is none; take bf16 or fp32"),
        (Machine(device_batch=3), "device_batch: expected a share"),
    ],
)
def test_machines_that_do_not_fit(
    machine: Machine, message: str, parts: rows.Parts, bases: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        execute(standin("order", "lora", tmp_path, bases), some("order", parts), machine)


@pytest.mark.parametrize("name", ["order", "first-line"])
def test_bf16_is_near_fp32(name: str, parts: rows.Parts, bases: dict[str, str], tmp_path: Path) -> None:
    near, whole = (
        execute(standin(name, "adalora", tmp_path / precision, bases), some(name, parts), Machine(precision))
        for precision in ("bf16", "fp32")
    )
    assert near["precision"] == "bf16" and near["losses"] != whole["losses"]
    assert near["losses"] == pytest.approx(whole["losses"], rel=0.05)


def test_logs_lie_beside_the_checkpoints(parts: rows.Parts, bases: dict[str, str], tmp_path: Path) -> None:
    run = standin("order", "adalora", tmp_path, bases)
    execute(run, some("order", parts), Machine(bars=False))
    assert [path.stat().st_size > 0 for path in run.folder.rglob("events.out.tfevents*")] == [True]


def test_a_begun_run_with_other_settings_is_refused(parts: rows.Parts, bases: dict[str, str], tmp_path: Path) -> None:
    run = standin("order", "lora", tmp_path, bases)
    with pytest.raises(KeyError):  # it ends after its training, since nothing is there to judge it by
        execute(run, {"train": some("order", parts)["train"]}, Machine())
    assert run.record is None
    with pytest.raises(ValueError, match="holds a run with another seed"):
        other = replace(run, seed=1)
        run.folder.rename(other.folder)
        execute(other, some("order", parts), Machine())
