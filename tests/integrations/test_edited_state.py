"""A training state that somebody has edited, cut or mixed: refused by name, and nothing has changed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from adalora_kernels import load_training_state
from adalora_kernels.integrations.checkpoint import STATE_FILE
from tests.integrations.test_resume_files import STOP, adamw, advance, assert_same, everything, fresh, rewrite, save

Edit = Callable[[dict[str, torch.Tensor], dict[str, Any]], Any]


def _tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Edit:
    return lambda tensors, content: tensors.update({name: change(tensors[name]).contiguous()})


def _entry(name: str, value: Any) -> Edit:
    return lambda tensors, content: content["allocator"].update({name: value})


def _cut_first(tensors: dict[str, torch.Tensor], content: dict[str, Any]) -> None:
    """Of the first layer's rows, but not of its averages."""
    for name, rows in (("first.lora_A", 0), ("first.lora_E", 0), ("first.lora_B", 1)):
        tensors[name] = tensors[name].narrow(rows, 0, 5).contiguous()
    content["allocator"]["shapes"][0][0] = 5


def _rename(tensors: dict[str, torch.Tensor], content: dict[str, Any]) -> None:
    content["layers"][0] = "ninth"
    for kind in ("lora_A", "lora_E", "lora_B"):
        tensors[f"ninth.{kind}"] = tensors.pop(f"first.{kind}")


EDITS: dict[str, tuple[Edit, str]] = {
    "negative averages": (_tensor("average", torch.neg), r"state\['average'\]: expected finite numbers of at least 0"),
    "negative scores": (_tensor("scores", lambda t: t - 1), r"state\['scores'\]: expected finite numbers of at least"),
    "infinite": (_tensor("uncertainty", lambda t: t / 0), r"state\['uncertainty'\]: expected finite numbers"),
    "integer averages": (_tensor("average", lambda t: t.int()), r"expected finite numbers .* got torch.int32 \[\d+\]"),
    "short averages": (_tensor("average", lambda t: t[1:]), r"state\['average'\]: expected a tensor of \d+ elements"),
    "a pattern of numbers": (_tensor("live", lambda t: t.float()), r"state\['live'\]: expected booleans"),
    "a pattern of bytes": (_tensor("live", lambda t: t.to(torch.uint8)), r"state\['live'\]: expected booleans"),
    "a threshold of NaN": (_tensor("threshold", lambda t: t * torch.nan), r"state\['threshold'\]: expected a tensor"),
    "integer weights": (_tensor("first.lora_A", lambda t: t.int()), "found first.lora_A of torch.int32"),
    "extra tensor": (lambda t, _: t.update({"fourth.lora_A": torch.zeros(6, 4)}), "found fourth.lora_A besides"),
    "extra entry": (_entry("total_step", 20), "found 'total_step' besides"),
    "no entry": (lambda _, c: c["allocator"].pop("next_step"), "found no next_step"),
    "negative step": (_entry("next_step", -3), r"state\['next_step'\]: expected .* at least 0, got -3"),
    "half a step": (_entry("global_step", 7.5), r"state\['global_step'\]: expected an optimizer step, .* got 7\.5"),
    "negative count": (_entry("updates", -1), r"state\['updates'\]: expected an integer of at least 0, got -1"),
    "a word for yes": (_entry("settled", "no"), r"state\['settled'\]: expected a boolean, got 'no'"),
    "another word": (_entry("ranked", "no"), r"state\['ranked'\]: expected a boolean, got 'no'"),
    "kept is a number": (_entry("kept", 3), r"state\['kept'\]: expected None, or a list of booleans"),
    "kept of fewer rows": (_entry("kept", [[True] * 5, [True] * 6, [True] * 6]), r"state\['kept'\]: expected None, or"),
    "loaded is a list": (_entry("loaded_rows", [1]), r"state\['loaded_rows'\]: expected lists of booleans by layer"),
    "loaded elsewhere": (_entry("loaded_rows", {"ninth": [True]}), r"\['ninth'\]: expected one of this model's layers"),
    "loaded too few": (_entry("loaded_rows", {"first": [True, False]}), r"\['first'\]: expected 6 of its rows"),
    "shapes of numbers": (_entry("shapes", [6, 12, 24]), r"state\['shapes'\]: expected a list of \[R, K, N\]"),
    "fractional shapes": (_entry("shapes", [[6.5, 12, 24]]), r"state\['shapes'\]: expected a list of \[R, K, N\]"),
    "fewer shapes": (lambda _, c: c["allocator"]["shapes"].pop(), r"state\['average'\]: expected a tensor of"),
    "fewer rows": (_cut_first, r"state\['average'\]: expected a tensor of"),
    "other names": (_rename, "expected the 3 adapted layers of this model, found 3 that differ in 'first'"),
    "layers by number": (lambda _, c: c.update(layers=[1, 2, 3]), "found first.lora_[AB] besides"),
    "no layers": (lambda _, c: c.update(layers=None), "expected the allocator's state in its metadata"),
    "no allocator": (lambda _, c: c.update(allocator=[1]), "expected the allocator's state in its metadata"),
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved while pruning."""
    folder = tmp_path_factory.mktemp("run") / "checkpoint"
    torch.manual_seed(0)
    model = fresh()
    optimizer = adamw(model)
    advance(model, optimizer, range(STOP))
    save(model, optimizer, folder)
    return folder


@pytest.fixture(scope="module")
def trained() -> Iterator[tuple[PeftModel, dict[str, Any]]]:
    """What every file is loaded into, with what it holds before and after each."""
    model = fresh(seed=5)
    advance(model, adamw(model), range(STOP + 2))
    yield model, everything(model)


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_state(
    edit: str, checkpoint: Path, trained: tuple[PeftModel, dict[str, Any]], tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    change, message = EDITS[edit]
    rewrite(broken / STATE_FILE, change)
    model, before = trained
    for load in (
        lambda: load_training_state(model, broken),
        lambda: model.load_adapter(broken, "default", is_trainable=True),
    ):
        with pytest.raises(ValueError, match=message) as error:
            load()
        assert str(error.value).startswith(str(broken)) and "take another checkpoint" in str(error.value)
        assert_same(everything(model), before)
