"""The benchmarks run, compare equal things, and fail where a contestant computes something else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cpu
from benchmarks.micro import budget_engine, growth, layer
from benchmarks.records import complaints
from benchmarks.step import models
from benchmarks.step.case import Case
from benchmarks.step.measure import measure as measure_step
from benchmarks.timing import Sample, interleave, ratio


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_layer_record() -> None:
    record = layer.measure(32, 48, 16, 4, torch.float32, 1, rounds=3)
    assert set(record["ratio_to_frozen"]) == {"frozen", "ours", "peft", "addmm_", "PEFT LoRA", "original"}
    assert record["ratio_to_frozen"]["frozen"] == 1.0 and record["noise"] >= 0
    assert record["milliseconds"].keys() - record["ratio_to_frozen"].keys() == {layer.AGAIN}
    assert record["flop_floor"] == pytest.approx(1 + 1.5 * 4 * (1 / 32 + 1 / 48))
    assert "32x48 M=16" in cpu.show(record)


def test_layer_contestants_must_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    right = layer.svd_linear
    monkeypatch.setattr(layer, "svd_linear", lambda *args, **options: right(*args, **options) * 1.001)
    with pytest.raises(AssertionError, match="ours differs from PEFT's layer"):
        layer.measure(32, 48, 16, 4, torch.float32, 1, rounds=3)


def test_another_peft_takes_its_turn_in_a_process_of_its_own() -> None:
    import peft

    record = layer.measure(32, 48, 16, 4, torch.float32, 1, rounds=2, other_peft=Path(peft.__file__).parents[1])
    assert record["ratio_to_frozen"][f"PEFT {peft.__version__}"] > 0


def test_budget_engine_record() -> None:
    record = budget_engine.measure(1, 4, 1, rounds=3)
    assert record["case"]["matrices"] == 6 and record["case"]["elements"] > 6 * 4 * 2 * 768
    assert set(record["peft_over_ours"]) == {"ours", cpu.ENGINE}
    assert "6 matrices" in cpu.show(record)


def test_misses_are_named() -> None:
    case: dict[str, Any] = {"K": 8, "N": 8, "M": 8, "R": 1, "dtype": "float32", "threads": 1}
    ratios = {"ours": 1.2, "peft": 1.1, "addmm_": 1.1}
    slow = {"benchmark": layer.NAME, "case": case, "flop_floor": 1.0, "ratio_to_frozen": ratios}
    engine = {"benchmark": "engine", "case": case, "peft_over_ours": {cpu.ENGINE: 9.9}}
    step = {"benchmark": "training step", "case": case, "peft_over_ours": {"ours": 0.99, cpu.ENGINE: 1.2}}
    assert len(cpu.misses([slow, engine, step])) == 5
    fine = slow | {"ratio_to_frozen": {"ours": 1.05, "peft": 1.1, "addmm_": 1.1}}
    steps = step | {"peft_over_ours": {"ours": 1.01, cpu.ENGINE: 1.2}}
    assert cpu.misses([fine, engine | {"peft_over_ours": {cpu.ENGINE: 10.1}}, steps]) == []


def test_pruned_rank_record() -> None:
    record = growth.measure_pruned(3, 1, rounds=2)
    assert set(record["ratio_to_frozen"]) == {"frozen", "ours, pruned", "ours, compacted"}
    assert "3 live" in cpu.show(record)
    assert list(complaints({"environment": cpu.environment(), "records": [record]})) == []


def test_records_are_as_the_schema_says() -> None:
    step = next(m for m in models.SMALL if "Llama" in m.name)
    records = [
        layer.measure(32, 48, 16, 4, torch.float32, 1, rounds=2),
        measure_step(Case(replace(step, rows=2, columns=8), 4), rounds=2, warmup=0),
    ]
    content = {"environment": cpu.environment(), "records": records}
    assert list(complaints(content)) == []
    assert all(cpu.show(record) for record in records)
    records[0]["milliseconds"]["ours"]["p20"] = float("nan")
    del records[1]["case"]
    assert len(list(complaints(content))) == 2


def test_interleaving_rotates_and_times_only_the_run() -> None:
    order: list[str] = []

    def contestant(name: str) -> Any:
        def prepare() -> Any:
            order.append(f"prepare {name}")
            return lambda: order.append(name)

        return prepare

    seconds = interleave({"a": contestant("a"), "b": contestant("b")}, rounds=2, warmup=0)
    assert order == ["prepare a", "a", "prepare b", "b", "prepare b", "b", "prepare a", "a"]
    assert {len(s) for s in seconds.values()} == {2}


def test_ratio_is_within_rounds() -> None:
    assert ratio([1.0, 20.0, 3.0], [1.0, 10.0, 3.0]) == 1.0
    assert Sample.of([1.0, 2.0, 3.0, 4.0, 5.0]).median == 3.0
