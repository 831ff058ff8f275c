"""Whole steps are measured between things that train alike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu import rows
from benchmarks.step import compiled, graphed, measure, models, names, systems
from benchmarks.step.case import Case
from benchmarks.step.rehearsal import Rehearsal

TINY = [replace(model, rows=2, columns=8) for model in models.SMALL]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("model", TINY, ids=lambda model: model.name.split(",")[0])
def test_record(model: models.Model) -> None:
    record = measure.measure(Case(model, 4), rounds=2, warmup=0)
    assert set(record["milliseconds"]) == set(record["phases"]) >= {names.PEFT, names.OURS, names.LORA}
    for name, whole in record["milliseconds"].items():
        assert whole["median"] > 0 and set(record["phases"][name]) == set(names.PHASES)
    assert record["noise"] >= 0
    # Ours keeps u for each matrix where PEFT keeps what autograd makes of its expression.
    assert record["saved_bytes"][names.OURS] <= record["saved_bytes"][names.PEFT]


def test_contestants_must_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_model = systems.patch_model

    def faulty(model: torch.nn.Module) -> torch.nn.Module:
        patched = patch_model(model)
        for layer in patched.modules():
            if hasattr(layer, "scaling") and isinstance(layer.scaling, dict):
                layer.scaling["default"] *= 1.1
        return patched

    monkeypatch.setattr(systems, "patch_model", faulty)
    with pytest.raises(AssertionError, match="ours: losses differ from PEFT AdaLoRA's"):
        measure.measure(Case(TINY[0], 4), rounds=2, warmup=0)


def test_bounds_on_a_gpu_or_open() -> None:
    """At both ranks of LoRA, eager and graphed, each with any optimizer and with AdaLoraAdamW."""

    def record(mode: str, lora: int, over_lora: float) -> dict[str, Any]:
        ratios = {names.OURS: over_lora, names.OURS_SWEPT: over_lora}
        over_peft = {"peft_over_ours": {names.OURS: 3.5, names.OURS_SWEPT: 2.5}} if mode == names.EAGER else {}
        case = {"model": names.DEBERTA, "lora": lora}
        return {"benchmark": mode, "case": case, "ours_over_lora": ratios, **over_peft}

    def states(*records: dict[str, Any]) -> list[str]:
        found = list(rows.step_rows(list(records)))
        assert len(found) == 10 and len({row.name for row in found}) == 10
        return [row.state for row in found]

    assert set(states()) == {rows.OPEN}
    eager = record(names.EAGER, names.RANK, 0.9)
    assert states(eager).count(rows.HELD) == 3 and states(eager).count(rows.MISSED) == 1
    eager["case"]["model"] = "another"
    assert set(states(eager)) == {rows.OPEN}
    graphs = [record(names.GRAPHED, lora, over) for lora, over in ((names.RANK, 1.0), (names.TARGET, 1.01))]
    assert [states(*graphs).count(state) for state in (rows.HELD, rows.MISSED, rows.OPEN)] == [2, 2, 6]


def test_captured_steps_must_train_as_eager_ones_do(monkeypatch: pytest.MonkeyPatch) -> None:
    captured = graphed.captured

    def faulty(system: systems.System, *args: Any) -> graphed.Step:
        for module in system.model.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.eps = 0.1
        return captured(system, *args)

    monkeypatch.setattr(graphed, "captured", faulty)
    with pytest.raises(AssertionError, match="frozen model, captured: losses differ from frozen model's"):
        graphed.measure(Case(models.DRY, 4), rounds=2, warmup=0)


def test_what_cannot_be_compiled_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that raises, and those that train otherwise."""

    def faulty(model: torch.nn.Module, **_: Any) -> Any:
        def refusing(**batch: torch.Tensor) -> Any:
            raise RuntimeError("no compiler")

        if model.peft_type == "LORA":
            return refusing
        for name, parameter in model.named_parameters():
            parameter.data *= 2 if ".lora_E." in name else 1
        return model

    monkeypatch.setattr(torch, "compile", faulty)
    record = compiled.measure(Case(models.DRY, 4), rounds=2, warmup=0)
    assert record["not_compiled"].pop(names.LORA) == "RuntimeError: no compiler"
    assert set(record["not_compiled"]) == {names.OURS, names.OURS_SWEPT} and record["ours_over_lora"] == {}
    assert all("losses differ from PEFT AdaLoRA's" in why for why in record["not_compiled"].values())
    assert list(record["milliseconds"]) == [names.eager(names.LORA)]


def test_reasons_begin_where_the_error_did() -> None:
    assert graphed.reason(ValueError("one\n  thing")) == "ValueError: one thing"
    try:
        try:
            raise RuntimeError("not permitted when capturing")
        finally:
            raise RuntimeError("a previous error during capture")
    except RuntimeError as error:
        said = graphed.reason(error)
    assert said == "RuntimeError: not permitted when capturing; then RuntimeError: a previous error during capture"


class _Crossings(TorchDispatchMode):
    """Counts copies from one device to another."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket.__name__ == "_to_copy":
            self.count += (kwargs or {}).get("device") not in (None, args[0].device)
        return function(*args, **(kwargs or {}))


def test_deberta_as_captured_waits_for_no_device() -> None:
    """On a device of its own, where what needs a value on the host raises and copies from there are seen."""

    def crossings(prepared: bool) -> int:
        with FakeTensorMode():
            with torch.device("cpu:1"):
                model = models.DRY.build()
            model.config.problem_type = "single_label_classification"
            if prepared:
                graphed.without_waits(model)
            batch = models.DRY.batch("cpu:1", 0)
            with _Crossings() as seen:
                model(**batch).loss.backward()
            seen.count = 0
            with seen:
                model(**batch).loss.backward()
        return seen.count

    assert crossings(False) > 0 == crossings(True)


def test_bart_as_captured_waits_for_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    bart = TINY[1]

    def capture() -> None:
        (system,) = systems.systems(Case(bart, 4), (names.FROZEN,)).values()
        graphed.captured(system, bart.batch("cpu", 0), Rehearsal())

    capture()
    monkeypatch.setattr(graphed, "without_waits", lambda model: None)
    with pytest.raises(RuntimeError, match="synchronizing"):
        capture()


def test_saved_bytes_count_each_storage_once() -> None:
    found = systems.systems(Case(TINY[0], 4))
    x = torch.randn(64, 64, requires_grad=True)

    class Twice(torch.nn.Module):
        def forward(self) -> object:
            return type("Output", (), {"loss": ((x * 2).sin() * (x * 2).sin().cos()).sum()})

    system = replace(found[names.FULL], model=Twice())
    # Two products under sin, sin and cos under the product, and sin under cos: x itself is a leaf of none of them.
    assert measure.saved_bytes(system, {}) == 5 * x.nbytes
