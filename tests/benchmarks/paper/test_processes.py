"""Two processes, as torchrun starts them, do what one does; so do accumulated steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from benchmarks.paper.run import execute
from benchmarks.paper.standin import rows
from benchmarks.paper.training import Machine
from tests.benchmarks.paper.small import executed, some, standin
from tests.distributed import worlds

TASKS = ("order", "first-line")
SHORT = {"first-line": {"target_length": 4}}  # as many tokens in every summary: means of means are means


def data_of(name: str, parts: rows.Parts) -> dict[str, Dataset]:
    found = some(name, parts)
    return found | {"validation": found["validation"].select(range(21))}  # the last batch isn't full


def same(record: dict[str, Any], whole: dict[str, Any]) -> None:
    assert record["setting"] == whole["setting"] and len(record["losses"]) == len(whole["losses"]) > 1
    assert record["losses"] == pytest.approx(whole["losses"], rel=1e-4)
    assert record["scores"]["validation"] == pytest.approx(whole["scores"]["validation"], rel=1e-4)


def test_two_processes_share_each_batch(parts: rows.Parts, bases: dict[str, str], tmp_path: Path) -> None:
    data = {name: data_of(name, parts) for name in TASKS}
    one, two = (
        [standin(name, "adalora", tmp_path / of, bases, **SHORT.get(name, {})) for name in TASKS]
        for of in ("one", "two")
    )
    whole = [execute(run, data[run.task.name], Machine()) for run in one]
    shared = worlds.run(2, tmp_path / "world", executed, two, data, Machine(device_batch=4), timeout=120)
    for i, run in enumerate(two):
        for records in shared:
            same(records[i], whole[i])
        assert run.record == json.loads(json.dumps(shared[0][i]))  # the first has written it, the other nothing
        assert len(list(run.folder.rglob("events*"))) == 1


def test_accumulated_steps_are_one_step(parts: rows.Parts, bases: dict[str, str], tmp_path: Path) -> None:
    data = data_of("order", parts)
    whole = execute(standin("order", "adalora", tmp_path / "whole", bases), data, Machine())
    same(execute(standin("order", "adalora", tmp_path / "parts", bases), data, Machine(device_batch=2)), whole)
