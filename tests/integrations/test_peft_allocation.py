"""Importance, masks and the orthogonality term of a patched model, against PEFT's allocator and its defects."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from adalora_kernels.integrations.peft import patch_model, unpatch_model
from adalora_kernels.testing.tolerances import assert_within_budget
from tests.integrations.small_models import (
    ARCHITECTURES,
    adapter_parameters,
    backward,
    batch,
    build,
    live_total,
    pattern,
    singular_values,
    train,
    twins,
)

BETA = 0.85


def test_lockstep_with_peft_for_200_steps(record_property: Callable[[str, object], None]) -> None:
    """One training; at every step PEFT's allocator gets copies of the same parameters and gradients."""
    settings = {"init_r": 8, "target_r": 3, "tinit": 10, "tfinal": 40, "deltaT": 3, "total_step": 200}
    oracle, ours = twins(build("gpt2", **settings))
    optimizer = torch.optim.AdamW(adapter_parameters(ours).values(), lr=5e-3)
    peft_allocator, tuner = oracle.base_model.rankallocator, ours.base_model
    exact: dict[str, tuple[Tensor, Tensor]] = {}
    ties, ranked = 0, 0
    for step in range(200):
        backward(ours, seed=step)
        optimizer.step()
        for (name, mine), theirs in zip(
            adapter_parameters(ours).items(), adapter_parameters(oracle).values(), strict=True
        ):
            theirs.data, theirs.grad = mine.data.clone(), mine.grad.clone()
            sensitivity = (mine.detach().double() * mine.grad.double()).abs()
            average, uncertainty = exact.get(name, (torch.zeros_like(sensitivity), torch.zeros_like(sensitivity)))
            average = BETA * average + (1 - BETA) * sensitivity
            exact[name] = average, BETA * uncertainty + (1 - BETA) * (sensitivity - average).abs()
        allocator = tuner.rank_allocator()
        scores = allocator.importance.scores.clone()  # the ranking at T - tf is followed by a reset
        oracle.base_model.update_and_allocate(step)
        tuner.update_and_allocate(step)
        if step < 160:
            scores = allocator.importance.scores
            for kind, mine in enumerate(allocator.importance.current()):
                theirs = (peft_allocator.exp_avg_ipt, peft_allocator.exp_avg_unc)[kind]
                names = [name for triplet in allocator.triplets for name in triplet.parameter_names]
                flat = torch.cat([theirs[name].reshape(-1) for name in names])
                reference = torch.cat([exact[f"base_model.model.{name}"][kind].reshape(-1) for name in names])
                assert_within_budget(f"average {kind} at step {step}", mine, flat, reference)
        expected, actual = pattern(oracle), pattern(ours)
        assert (expected is None) == (actual is None)
        if expected is None or actual is None:
            continue
        assert expected.keys() == actual.keys()
        live = torch.tensor([row for triplet in allocator.triplets for row in actual[triplet.parameter_names[1]]])
        theirs_live = torch.tensor([row for t in allocator.triplets for row in expected[t.parameter_names[1]]])
        differing = (live != theirs_live).nonzero().reshape(-1)
        if step <= 160 and step % 3 == 0:
            ranked += 1
            prune = live.numel() - allocator.schedule.budget(step)
            threshold = scores.sort().values[prune - 1] if prune > 0 else scores.min()
            assert ((scores[differing] - threshold).abs() <= 1e-5 * threshold).all(), f"step {step}: no tie"
            ties += len(differing)
        if not len(differing):
            for name, value in singular_values(ours).items():
                assert torch.equal(value, singular_values(oracle)[name])
    assert int(live.sum()) == 3 * len(allocator.triplets)
    record_property("measured", f"{ranked} rankings, {ties} triplets differ, each within 1e-5 of its threshold")


def test_free_running_in_fp64_keeps_the_same_masks_for_300_steps() -> None:
    settings = {"init_r": 6, "target_r": 2, "tinit": 20, "tfinal": 60, "deltaT": 5, "total_step": 300}
    theirs, ours = twins(build("perceptron", dtype=torch.float64, **settings))
    optimizers = {model: torch.optim.AdamW(adapter_parameters(model).values(), lr=5e-3) for model in (theirs, ours)}
    for step in range(300):
        losses = []
        for model, optimizer in optimizers.items():
            loss = model.base_model(**batch(model, seed=step)).loss
            loss.backward()
            optimizer.step()
            model.base_model.update_and_allocate(step)
            optimizer.zero_grad()
            losses.append(loss.item())
        assert pattern(ours) == pattern(theirs), f"step {step}"
        assert losses[1] == pytest.approx(losses[0], rel=1e-9), f"step {step}"
    assert live_total(ours) == 2 * len(pattern(ours))


@pytest.mark.parametrize("switch", [7, 16, 18], ids=["while-pruning", "at-the-end", "after-it"])
def test_patching_and_unpatching_on_the_way_go_on_as_peft(switch: int) -> None:
    """fp64, so that the trajectories can be held to each other."""
    model = build("perceptron", dtype=torch.float64)
    reference = copy.deepcopy(model)
    expected = train(reference, switch) + train(reference, 20 - switch, start=switch)
    patched_later, unpatched_later = copy.deepcopy(model), patch_model(copy.deepcopy(model))
    losses = [train(patched_later, switch), train(unpatched_later, switch)]
    patch_model(patched_later), unpatch_model(unpatched_later)
    losses[0] += train(patched_later, 20 - switch, start=switch)
    losses[1] += train(unpatched_later, 20 - switch, start=switch)
    for run in losses:
        assert run == pytest.approx(expected, rel=1e-9)
    assert pattern(patched_later) == pattern(unpatched_later) == pattern(reference)


def test_the_pattern_changes_on_masking_steps_only() -> None:
    model = patch_model(build("llama"))
    history = []
    for step in range(20):
        backward(model, step)
        model.base_model.update_and_allocate(step)
        history.append(model.peft_config["default"].rank_pattern)
    assert all(rows is None for rows in history[:4])  # tinit 2, deltaT 2
    changed = [step for step in range(1, 20) if history[step] is not history[step - 1]]
    assert changed == [4, 6, 8, 10, 12, 14, 16]


def test_a_parameter_without_a_gradient_keeps_its_averages() -> None:
    model = patch_model(build("llama"))
    train(model, 3)
    allocator = model.base_model.rank_allocator()
    before = torch.stack(allocator.importance.current())
    backward(model, 3)
    skipped = allocator.triplets[2]
    for parameter in skipped.parameters:
        parameter.grad = None
    model.base_model.update_and_allocate(3)
    after = torch.stack(allocator.importance.current())
    start, end = allocator.importance.layout.offsets[6], allocator.importance.layout.offsets[9]
    assert torch.equal(after[:, start:end], before[:, start:end])
    assert not torch.equal(after[:, :start], before[:, :start])


def test_a_skipped_last_ranking_is_caught_up_with() -> None:
    model = patch_model(build("llama"))
    train(model, 16)
    train(model, 3, start=17)
    assert live_total(model) == 3 * len(pattern(model))


@pytest.mark.parametrize("moment", ["before backward", "after zero_grad"])
def test_update_without_gradients_is_refused_and_changes_nothing(moment: str) -> None:
    model = patch_model(build("llama"))
    if moment == "after zero_grad":
        train(model, 5)
    averages = torch.stack(model.base_model.rank_allocator().importance.current())
    values, rows = singular_values(model), pattern(model)
    with pytest.raises(ValueError, match=r"after backward\(\) and before zero_grad\(\)"):
        model.base_model.update_and_allocate(6)
    assert torch.equal(torch.stack(model.base_model.rank_allocator().importance.current()), averages)
    assert all(torch.equal(now, values[name]) for name, now in singular_values(model).items())
    assert pattern(model) == rows
    model.base_model.update_and_allocate(17)  # past T - tf no gradient is needed


def test_the_term_is_added_in_training_only() -> None:
    model = patch_model(build("llama"))
    assert model.base_model.last_orthogonality is None
    with_term = model(**batch(model)).loss
    term = model.base_model.last_orthogonality
    model.eval()
    without = model(**batch(model)).loss
    assert term is not None and term > 0 and not term.requires_grad
    torch.testing.assert_close(with_term, without + term)


def test_the_term_counts_once_per_step_where_the_loss_is_a_share() -> None:
    """With a token count, transformers' Trainer does not divide a micro-batch's loss."""
    model = patch_model(build("llama"))
    items = {"num_items_in_batch": torch.tensor(40)}

    def share(**options: Tensor) -> Tensor:
        return model(**batch(model), **options).loss

    plain = model.eval()(**batch(model), **items).loss
    model.train()
    for _ in range(2):
        first = share(**items)
        first.backward()
        torch.testing.assert_close(first, plain + model.base_model.last_orthogonality)
        for _ in range(2):
            later = share(**items)
            later.backward()
            torch.testing.assert_close(later, plain)
        model.zero_grad()


def test_a_loss_made_outside_of_the_model_is_warned_about_once() -> None:
    model = patch_model(build("llama"))
    tokens = {"input_ids": batch(model)["input_ids"]}

    def step(index: int, add: bool) -> None:
        loss = model(**tokens).logits.square().mean()
        (loss + model.base_model.orthogonality_loss() if add else loss).backward()
        model.base_model.update_and_allocate(index)

    with pytest.warns(UserWarning, match="orthogonality term is in no loss"):
        step(0, add=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(1, add=False)
        model = patch_model(build("llama"))
        step(0, add=True)


def test_the_schedule_follows_the_config() -> None:
    theirs, ours = twins(build("perceptron", dtype=torch.float64))
    for model in (theirs, ours):
        train(model, 3)
        config = model.peft_config["default"]
        config.total_step, config.tfinal, config.deltaT = 26, 6, 3
        train(model, 16, start=3)
    assert pattern(ours) == pattern(theirs)
    ours.peft_config["default"].target_r = 2  # PEFT ignores this one
    train(ours, 7, start=19)
    assert live_total(ours) == 2 * len(pattern(ours))


def test_an_attached_optimizer_needs_no_calls() -> None:
    called, attached = (patch_model(build("llama")) for _ in range(2))
    expected = train(called, 20)
    optimizer = torch.optim.AdamW(adapter_parameters(attached).values(), lr=1e-2)
    attached.base_model.rank_allocator().attach(optimizer)
    losses = []
    for step in range(20):
        loss = attached(**batch(attached, seed=step)).loss
        loss.backward()
        optimizer.step()
        if step % 2:
            attached.base_model.update_and_allocate(step)  # has nothing to do
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == expected
    assert pattern(attached) == pattern(called) is not None


def test_a_patched_model_that_nobody_allocates_is_warned_about_once() -> None:
    model = patch_model(build("perceptron"))
    with pytest.warns(UserWarning, match=r"AdaLoRA: patch_model was called, and .*update_and_allocate") as caught:
        train(model, 30, allocate=False)
    assert len([w for w in caught if str(w.message).startswith("AdaLoRA:")]) == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="AdaLoRA:")
        train(patch_model(build("perceptron")), 15)
        train(unpatch_model(patch_model(build("perceptron"))), 15, allocate=False)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compaction_keeps_outputs_training_and_checkpoints(architecture: str, tmp_path: Path) -> None:
    model = patch_model(build(architecture, target_r=1))
    allocator = model.base_model.rank_allocator()
    optimizer = torch.optim.AdamW(adapter_parameters(model).values(), lr=1e-2)

    def steps(numbers: range) -> None:
        for step in numbers:
            optimizer.zero_grad()
            model(**batch(model, seed=step)).loss.backward()
            optimizer.step()
            model.base_model.update_and_allocate(step)

    steps(range(16))
    with pytest.raises(ValueError, match=r"^step: expected the final phase"):
        allocator.compact(optimizer)
    steps(range(16, 18))
    model.eval()
    before, rows = model(**batch(model)).logits, pattern(model)
    ranks = allocator.compact(optimizer)
    torch.testing.assert_close(model(**batch(model)).logits, before, rtol=1e-5, atol=1e-6)
    assert 0 in ranks.values() and sum(ranks.values()) == len(ranks)
    assert {t.name: t.shape[0] for t in allocator.triplets} == ranks
    model.train()
    steps(range(18, 23))
    assert model.base_model.rank_allocator() is allocator and pattern(model) == rows

    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(architecture).unload(), tmp_path)
    tokens = batch(model)["input_ids"]
    for other in (loaded, patch_model(copy.deepcopy(loaded))):
        torch.testing.assert_close(other.eval()(input_ids=tokens).logits, model(input_ids=tokens).logits)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("target_r", -1, "config.target_r: expected at least 0"),
        ("target_r", "3", "config.target_r: expected a number, got '3'"),
        ("deltaT", 0, "config.deltaT: expected at least 1, got 0"),
        ("deltaT", 1.5, "config.deltaT: expected a whole number, got 1.5"),
        ("tinit", -1, "config.tinit: expected at least 0, got -1"),
        ("tfinal", "4", "config.tfinal: expected a number, got '4'"),
        ("total_step", 5, r"config.total_step: expected more than tinit \+ tfinal = 6, got 5"),
        ("beta1", 2.0, "config.beta1: expected a number between 0 and 1, got 2.0"),
    ],
)
def test_settings_are_named_as_in_the_config(setting: str, value: Any, message: str) -> None:
    """Both where the allocator is made and where a setting changes on the way."""
    model = patch_model(build("perceptron"))
    if setting != "target_r":
        good = getattr(model.peft_config["default"], setting)
        setattr(model.peft_config["default"], setting, value)
        with pytest.raises((TypeError, ValueError), match=f"^{message}"):
            model.base_model.rank_allocator()
        setattr(model.peft_config["default"], setting, good)
    backward(model)
    model.base_model.update_and_allocate(0)
    before = model.base_model.rank_allocator().state_dict()
    setattr(model.peft_config["default"], setting, value)
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        model.base_model.update_and_allocate(1)
    allocator = model.base_model.fused_state.allocator
    assert allocator.next_step == 1 and torch.equal(allocator.importance.scores, before["scores"])
