"""Whole steps are measured between things that train alike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from benchmarks.gpu import steps as gpu_steps
from benchmarks.step import measure, models, systems

TINY = [replace(model, rows=2, columns=8) for model in models.SMALL]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("model", TINY, ids=lambda model: model.name.split(",")[0])
def test_record(model: models.Model) -> None:
    record = measure.measure(model, 4, torch.float32, "cpu", 1, rounds=2, warmup=0)
    assert set(record["milliseconds"]) == set(record["phases"]) >= {systems.PEFT, systems.OURS, systems.LORA}
    for name, whole in record["milliseconds"].items():
        assert whole["median"] > 0 and set(record["phases"][name]) == set(systems.PHASES)
    assert record["noise"] >= 0
    # Ours keeps u for each matrix where PEFT keeps what autograd makes of its expression.
    assert record["saved_bytes"][systems.OURS] <= record["saved_bytes"][systems.PEFT]


def test_contestants_must_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_model = systems.patch_model

    def faulty(model: torch.nn.Module) -> torch.nn.Module:
        patched = patch_model(model)
        for layer in patched.modules():
            if hasattr(layer, "scaling") and isinstance(layer.scaling, dict):
                layer.scaling["default"] *= 1.1
        return patched

    monkeypatch.setattr(systems, "patch_model", faulty)
    with pytest.raises(AssertionError, match="ours: losses differ from PEFT's"):
        measure.measure(TINY[0], 4, torch.float32, "cpu", 1, rounds=2, warmup=0)


def test_rows_of_the_gpu_name_both_ranks_of_lora() -> None:
    case = {"model": models.REAL[0].name, "lora": gpu_steps.RANK}
    ratios = {systems.OURS: 3.5, systems.OURS_SWEPT: 2.5}
    record = {"case": case, "peft_over_ours": ratios, "ours_over_lora": {systems.OURS: 0.9, systems.OURS_SWEPT: 1.1}}
    found = list(gpu_steps.rows([record, record | {"case": case | {"lora": gpu_steps.TARGET}}]))
    assert len(found) == 6 and sum(row.holds for row in found) == 3
    assert list(gpu_steps.rows([record | {"case": case | {"model": "another"}}])) == []


def test_saved_bytes_count_each_storage_once() -> None:
    found = systems.systems(TINY[0], 4, torch.float32, "cpu")
    x = torch.randn(64, 64, requires_grad=True)

    class Twice(torch.nn.Module):
        def forward(self) -> object:
            return type("Output", (), {"loss": ((x * 2).sin() * (x * 2).sin().cos()).sum()})

    system = replace(found[systems.FULL], model=Twice())
    # Two products under sin, sin and cos under the product, and sin under cos: x itself is a leaf of none of them.
    assert measure.saved_bytes(system, {}) == 5 * x.nbytes
