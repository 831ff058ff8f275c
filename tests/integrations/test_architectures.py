"""Thirty steps of seven transformers, patched and unpatched from the same seed: losses, masks and checkpoints."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from adalora_kernels.integrations.peft import layer_report
from tests.integrations.small_models import ALL_ARCHITECTURES, adapter_parameters, batch, build, twins

STEPS = 30
SCHEDULE = {"total_step": STEPS, "tinit": 3, "tfinal": 8, "deltaT": 2}
SAVED_AFTER = (15, STEPS)  # while pruning and at the end

Record = Callable[[str, object], None]


class _Run(NamedTuple):
    losses: Tensor  # [STEPS], fp64
    loss_dtype: torch.dtype
    patterns: list[Any]  # config.rank_pattern after each step


def _train(model: PeftModel, folder: Path | None = None) -> _Run:
    """Thirty steps with the allocator after each, with checkpoints in ``folder``."""
    optimizer = torch.optim.AdamW(adapter_parameters(model).values(), lr=5e-3)
    losses, patterns = [], []
    for step in range(STEPS):
        # By way of the AdaLoRA model: where there is no task type, PEFT adds its orthogonality term there alone.
        loss = model.base_model(**batch(model, seed=step)).loss
        loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(loss.detach().double())
        patterns.append(model.peft_config["default"].rank_pattern)
        if folder is not None and step + 1 in SAVED_AFTER:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # no vocabulary to compare with
                model.save_pretrained(folder / str(step + 1))
    return _Run(torch.stack(losses), loss.dtype, patterns)


def _pair(architecture: str, dtype: torch.dtype) -> tuple[PeftModel, PeftModel]:
    """An unpatched model and a patched one, each layer of it fused."""
    head = {"modules_to_save": ["classifier"]} if architecture == "vit" else {}
    theirs, ours = twins(build(architecture, dtype=dtype, layers=1, **SCHEDULE, **head))
    reports = layer_report(ours)
    kinds = {report.name.split(".")[-1] for report in reports}
    assert all(report.fused for report in reports)
    assert kinds == set(ours.peft_config["default"].target_modules)  # attention and feed-forward
    return theirs, ours


def _relative(actual: Tensor, expected: Tensor) -> float:
    return float(((actual - expected) / expected).abs().max())


def _live(run: _Run) -> int:
    return sum(map(sum, run.patterns[-1].values()))


@pytest.mark.parametrize("architecture", ALL_ARCHITECTURES)
def test_masks_and_checkpoints_in_fp64(architecture: str, tmp_path: Path, record_property: Record) -> None:
    """In fp64 free-running trainings can be held to the same masks at every step."""
    theirs, ours = _pair(architecture, torch.float64)
    expected, actual = _train(theirs, tmp_path / "peft"), _train(ours, tmp_path / "fused")
    # Where transformers computes the loss in fp32, its last bits and those of its gradient are chance.
    loose = expected.loss_dtype != torch.float64
    deviation = _relative(actual.losses, expected.losses)
    assert deviation <= (4 * torch.finfo(torch.float32).eps if loose else 1e-12)
    assert actual.patterns == expected.patterns
    assert _live(actual) == 3 * len(layer_report(ours)) < 6 * len(layer_report(ours))
    values = max(_checkpoint_deviation(tmp_path, str(step)) for step in SAVED_AFTER)
    assert values <= (1e-5 if loose else 1e-9)
    record_property("measured", f"losses within {deviation:.0e}, checkpoints within {values:.0e}, the same masks")


def _checkpoint_deviation(folder: Path, step: str) -> float:
    """The largest one of a value, relative to its tensor's largest; files, settings and shapes are PEFT's."""
    peft, fused = folder / "peft" / step, folder / "fused" / step
    assert sorted(p.name for p in peft.iterdir()) == sorted(p.name for p in fused.iterdir())
    assert json.loads((peft / "adapter_config.json").read_text()) == json.loads(
        (fused / "adapter_config.json").read_text()
    )
    expected, actual = (load_file(path / "adapter_model.safetensors") for path in (peft, fused))
    assert {n: (t.shape, t.dtype) for n, t in expected.items()} == {n: (t.shape, t.dtype) for n, t in actual.items()}
    pairs = [(actual[name], value) for name, value in expected.items() if value.numel()]
    return max(float((a - e).abs().max() / e.abs().max()) for a, e in pairs)


@pytest.mark.parametrize("architecture", ALL_ARCHITECTURES)
def test_losses_in_fp32(architecture: str, record_property: Record) -> None:
    theirs, ours = _pair(architecture, torch.float32)
    expected, actual = _train(theirs), _train(ours)
    deviation = _relative(actual.losses, expected.losses)
    assert deviation <= 1e-4
    assert _live(actual) == _live(expected) == 3 * len(layer_report(ours))
    differ = sum(a != e for a, e in zip(actual.patterns, expected.patterns, strict=True))
    record_property("measured", f"losses within {deviation:.0e} relative, masks differ after {differ} of {STEPS} steps")


@pytest.mark.parametrize("architecture", ALL_ARCHITECTURES)
def test_losses_over_a_bf16_base(architecture: str, record_property: Record) -> None:
    """Roundings of 16 bits part the trainings, so both are held to the same training in fp64, over all steps."""
    theirs, ours = _pair(architecture, torch.bfloat16)
    assert all(p.dtype == torch.float32 for name, p in adapter_parameters(ours).items() if "lora_" in name)
    exact = _train(copy.deepcopy(theirs).double()).losses
    expected, actual = _train(theirs), _train(ours)
    allowance, error = ((run.losses - exact).norm() / exact.norm() for run in (expected, actual))
    rounding = torch.finfo(torch.bfloat16).eps / 2
    assert error <= 2 * allowance + rounding
    assert _live(actual) == _live(expected) == 3 * len(layer_report(ours))
    record_property("measured", f"losses off by {error:.1e} of the fp64 training's, PEFT's by {allowance:.1e}")
