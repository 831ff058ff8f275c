"""Defects of PEFT's AdaLoRA that a replacement must not have; those that users reported are in ``test_pains_*``.

A scenario runs on both sides: unpatched PEFT shows the defect, ours doesn't. Where PEFT can't show it here, the
docstring says why.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch
from peft import AdaLoraConfig, PeftModel

from adalora_kernels import AdaLoraCallback
from adalora_kernels.integrations.peft import patch_model, patch_peft, unpatch_peft
from tests.integrations.small_models import (
    adapter_parameters,
    backward,
    build,
    live_total,
    pattern,
    singular_values,
    train,
    twins,
)
from tests.integrations.small_models_trainer import make_trainer

THREADS = (
    "P1327", "P1801", "P3373", "P432", "P2337", "P2341", "P855", "P1231", "P1721", "A21", "P1539", "P1540", "P571",
    "P745", "P1625", "P927", "P581", "P1852", "P1309", "P1495", "P1146", "A27", "P2322", "P3193", "P1846", "P529",
    "A19", "A22", "P233", "A12",
)  # fmt: skip


def test_every_thread_and_every_defect_has_a_test() -> None:
    names = [
        name
        for path in Path(__file__).parents[1].rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    for tag in (*THREADS, *(f"defect_{number}" for number in range(1, 13))):
        assert any(re.search(rf"_{tag}(_|$)", name) for name in names), tag


@pytest.mark.parametrize("target_r", [3, 5])
def test_defect_3_nothing_to_prune(target_r: int) -> None:
    """A target at or above the initial rank: kthvalue of nothing."""
    theirs, ours = twins(build("llama", init_r=3, target_r=target_r))
    with pytest.raises((RuntimeError, IndexError)):
        train(theirs, 20)
    train(ours, 20)
    assert all(all(row) for row in pattern(ours).values())


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_defect_4_one_overflow_step(value: float) -> None:
    """NaN in PEFT's averages for good: no threshold is found any more, and nothing is pruned."""
    theirs, ours = twins(build("llama"))
    for model in (theirs, ours):
        train(model, 5)
    allocator = ours.base_model.rank_allocator()
    averages, before, values = torch.stack(allocator.importance.current()), pattern(ours), singular_values(ours)
    for model in (theirs, ours):
        backward(model, 6)
        gradients = [parameter.grad for parameter in adapter_parameters(model).values()]
        for gradient in gradients if model is theirs else gradients[:1]:  # one is enough for ours to skip the step
            gradient.view(-1)[0] = value
        model.base_model.update_and_allocate(6)  # a masking step
    assert torch.equal(torch.stack(allocator.importance.current()), averages)
    assert pattern(ours) == before
    assert all(torch.equal(now, values[name]) for name, now in singular_values(ours).items())
    for model in (theirs, ours):
        train(model, 13, start=7)
    assert live_total(ours) == 3 * len(pattern(ours))
    assert live_total(theirs) == 6 * len(pattern(theirs))


def test_defect_4_before_the_model_was_patched() -> None:
    """Of NaN averages every score is NaN, which is above no threshold: to go on with them would prune all there is."""
    model = build("llama")
    train(model, 5)
    backward(model, 6)
    for parameter in adapter_parameters(model).values():
        parameter.grad.fill_(torch.inf)
    model.base_model.update_and_allocate(6)
    model.zero_grad()
    patch_model(model)
    with pytest.warns(UserWarning, match="PEFT's importance averages are not finite, .*: they start anew"):
        model.base_model.rank_allocator()
    train(model, 13, start=7)
    assert live_total(model) == 3 * len(pattern(model))


def test_gradients_that_were_zeroed_before_the_allocator_came() -> None:
    """It can't tell them from others without waiting for the device, but it reads the pattern that they leave."""
    model = patch_model(build("llama", layers=1))
    for step in range(5):
        backward(model, step)
        model.zero_grad(set_to_none=False)
        if step == 4:
            with pytest.warns(UserWarning, match="step 4 has pruned every triplet for a budget of .*before zero_grad"):
                model.base_model.update_and_allocate(step)
        else:
            model.base_model.update_and_allocate(step)


def test_defect_10_adapter_names_are_matched_whole() -> None:
    """PEFT takes "a" for a part of "ab", and of every "lora_A": it asks the frozen adapter for gradients."""
    model = build("llama", adapter="a")
    model.add_adapter("ab", AdaLoraConfig(target_modules=["q_proj"], total_step=9, init_r=5, inference_mode=True))
    model.set_adapter("a")  # adding an adapter for inference has frozen the active one
    theirs, ours = twins(model)
    with pytest.raises(TypeError, match="'Parameter' and 'NoneType'"):
        train(theirs, 20)
    other = {name: p.detach().clone() for name, p in ours.named_parameters() if name.endswith(".ab")}
    alone = patch_model(build("llama", adapter="a"))
    assert train(ours, 20) == pytest.approx(train(alone, 20), rel=1e-6)
    assert pattern(ours, "a") == pattern(alone, "a")
    for name, parameter in ours.named_parameters():
        if name in other:
            assert torch.equal(parameter, other[name])


@pytest.mark.parametrize("step", [10, 16, 18], ids=["while-pruning", "at-the-end", "after-it"])
def test_defect_7_training_on_from_a_checkpoint(step: int, tmp_path: Path) -> None:
    """A checkpoint holds live rows alone: PEFT's next masks prune too much, or their names or sizes are wrong."""
    model = build("llama")
    train(model, step)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no vocabulary to compare with
        model.save_pretrained(tmp_path)
    theirs, ours = (_resumed(tmp_path, patched) for patched in (False, True))
    if step == 10:
        train(theirs, 20 - step, start=step)
        assert live_total(theirs) < 3 * len(pattern(theirs))
    else:
        with pytest.raises((KeyError, RuntimeError)):
            train(theirs, 20 - step, start=step)
    train(ours, 20 - step, start=step)
    assert live_total(ours) == 3 * len(pattern(ours))


@pytest.mark.parametrize("step", [10, 16, 18], ids=["while-pruning", "at-the-end", "after-it"])
def test_defect_7_resuming_a_trainer(step: int, tmp_path: Path) -> None:
    """Sizes don't fit, before any callback is called. That ours goes on exactly is in ``test_resume``."""
    options = {"save_strategy": "steps", "save_steps": step}
    for patched in (False, True):
        make = patch_model if patched else lambda model: model
        folder = tmp_path / str(patched)
        make_trainer(make(build("llama")), folder, AdaLoraCallback(), **options).train()
        resumed = make(build("llama"))
        trainer = make_trainer(resumed, folder, AdaLoraCallback())
        if patched:
            trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
            assert live_total(resumed) == 3 * len(pattern(resumed))
        else:
            with pytest.raises(RuntimeError, match=r"size mismatch for .*lora_"):
                trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))


def _resumed(folder: Path, patched: bool) -> PeftModel:
    base = build("llama").unload()
    if patched:
        patch_peft()
    try:
        return PeftModel.from_pretrained(base, folder, is_trainable=True).train()
    finally:
        unpatch_peft()
