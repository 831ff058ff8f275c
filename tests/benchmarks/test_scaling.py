"""Growth with the number of layers, and importance in a backward: equal things are compared, figures add up."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from adalora_kernels.reference.importance import TripletLayout
from benchmarks import cpu
from benchmarks.micro import fused_importance, scaling
from benchmarks.report import engine
from benchmarks.report.sources import Measured, Origin, Source


def titles(record: dict[str, Any]) -> list[str]:
    """Of the report's figures."""
    origin = Origin("cpu.json", "make bench", {"device": "a CPU", "commit": "c"})
    source = Source(origin.file, {}, (origin,), (Measured(record, origin),))
    return [figure.title for section in engine.sections([source]) for figure in section.figures]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_layouts_are_the_models() -> None:
    shapes = scaling.deberta(12).shapes
    counts = {shape: shapes.count(shape) for shape in set(shapes)}
    assert counts == {(12, 768, 768): 48, (12, 768, 3072): 12, (12, 3072, 768): 12}
    assert scaling.square(3, 256, 12).shapes == ((12, 256, 256),) * 3


def test_scaling_record() -> None:
    record = scaling.measure("tiny", TripletLayout(((3, 16, 24), (4, 40, 8))), 1, rounds=3)
    assert record["case"]["layers"] == 2 and record["case"]["elements"] == 3 * 41 + 4 * 49
    assert list(record["microseconds_per_layer"]) == list(scaling.PARTS)
    for part, by_backend in record["microseconds_per_layer"].items():
        for backend, value in by_backend.items():
            assert 2 * value == pytest.approx(1e3 * record["milliseconds"][f"{part}, {backend}"]["median"])
    assert record["importance_to_copy"] > 0
    assert "tiny, 2 layers" in cpu.show(record)
    (title,) = titles(record)
    assert title.startswith("Importance against the copy floor, tiny, 2 layers")


@pytest.mark.parametrize(
    ("part", "argument", "name"),
    [
        ("importance_update", -1, "importance: the state"),
        ("adamw_update", -3, "adamw: the params"),
        ("orthogonality_loss", -1, "orthogonality: the grads"),
        ("mask_to_budget", 2, "masking: the params"),
    ],
)
def test_backends_must_agree(monkeypatch: pytest.MonkeyPatch, part: str, argument: int, name: str) -> None:
    right = getattr(scaling, part)

    def wrong(*args: Any, backend: str, **options: Any) -> Any:
        changed = list(args)
        if backend == "native":
            changed[argument] = args[argument] // 2 if part == "mask_to_budget" else args[argument] * 0.9
        return right(*changed, backend=backend, **options)

    monkeypatch.setattr(scaling, part, wrong)
    with pytest.raises(AssertionError, match=f"{name} of backends native and reference differ"):
        scaling.measure("tiny", scaling.square(2, 32, 4), 1, rounds=3)


def test_importance_of_deberta_is_held_to_the_copy() -> None:
    case: dict[str, Any] = {"model": scaling.DEBERTA, "threads": 1}
    (missed,) = cpu.misses([{"case": case, "importance_to_copy": 1.51}])
    assert "1.51 x the time of a plain copy" in missed
    assert cpu.misses([{"case": case, "importance_to_copy": 1.49}]) == []
    assert cpu.misses([{"case": {"model": "256x256"}, "importance_to_copy": 9.0}]) == []


def test_fused_record() -> None:
    record = fused_importance.measure(2, 16, 8, 4, 1, rounds=3)
    assert set(record["added_to_backward"]) == {"launched", "fused"}
    assert set(record["milliseconds"]) == {"backward alone", "launched", "fused"}
    assert "2 layers 16x16 M=8" in cpu.show(record)
    assert titles(record) == ["Importance in a backward, 16×16, 2 layers, 8 tokens, rank 4, float32, 1 thread"]


def test_fused_must_be_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    build = fused_importance.build

    def hooked(*args: int) -> Any:
        model, allocator = build(*args)
        model.get_parameter("0.lora_A").register_hook(lambda grad: grad * 2)
        return model, allocator

    monkeypatch.setattr(fused_importance, "build", hooked)
    with pytest.raises(AssertionError, match="was launched before the step: the gradient of 0 was written to"):
        fused_importance.measure(2, 16, 8, 4, 1, rounds=3)


def test_every_case_is_measured() -> None:
    calls = [(case.func, case.args) for case in cpu.cases(2, 25)]  # type: ignore[attr-defined]
    models = [(args[0], len(args[1].shapes), args[2]) for func, args in calls if func is scaling.measure]
    assert models[:2] == [(scaling.DEBERTA, 72, 1), (scaling.DEBERTA, 72, 2)]
    assert models[2:] == [("256x256", layers, 2) for layers in (12, 72, 224, 1000)]
    assert [args[2] for func, args in calls if func is fused_importance.measure] == [256, 1024]
