"""The callback in transformers' Trainer."""

from __future__ import annotations

import shutil
import warnings
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerState

from adalora_kernels.allocator import RankAllocator, compute_orth_regu
from adalora_kernels.integrations.checkpoint import STATE_FILE
from adalora_kernels.integrations.peft import patch_model
from adalora_kernels.integrations.trainer import AdaLoraCallback
from adalora_kernels.nn import SVDLinear
from tests.integrations.small_models import VOCABULARY, adapter_parameters, build, live_total
from tests.integrations.small_models_trainer import make_trainer

STEPS = 20


def _trainer(model: nn.Module, folder: Path, callbacks: list[Any], **options: Any) -> Trainer:
    return make_trainer(model, folder, *callbacks, **{"gradient_accumulation_steps": 2, **options})


def _record_calls(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps at which the allocator is called, with gradients alive."""
    tuner, steps = model.base_model, []
    original = type(tuner).update_and_allocate

    def record(self: Any, global_step: int) -> None:
        assert all(p.grad is not None for p in adapter_parameters(model).values())
        steps.append(global_step)
        original(self, global_step)

    monkeypatch.setattr(type(tuner), "update_and_allocate", record)
    return steps


@pytest.mark.parametrize("patched", [False, True], ids=["peft", "patched"])
def test_once_per_optimizer_step_under_accumulation(
    patched: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("llama", total_step=STEPS)
    if patched:
        patch_model(model)
    steps = _record_calls(model, monkeypatch)
    callback = AdaLoraCallback()
    trainer = _trainer(model, tmp_path, [callback])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="AdaLoRA")
        trainer.train()
    assert steps == list(range(STEPS))
    pattern = model.peft_config["default"].rank_pattern
    assert sum(map(sum, pattern.values())) == 3 * len(pattern)
    records = [record for record in trainer.state.log_history if "loss" in record]
    assert [record["step"] for record in records] == [5, 10, 15, 20]
    assert records[-1]["adalora/live_rank"] == records[-1]["adalora/budget"] == 3 * len(pattern)
    assert records[0]["adalora/budget"] > records[-1]["adalora/budget"]
    assert all(("adalora/orthogonality" in record) is patched for record in records)


def test_patched_and_unpatched_trainings_agree(tmp_path: Path) -> None:
    """Without accumulation, where PEFT counts the orthogonality term once."""
    losses = []
    for patched in (False, True):
        model = build("llama", total_step=STEPS)
        trainer = _trainer(
            patch_model(model) if patched else model, tmp_path, [AdaLoraCallback()],
            gradient_accumulation_steps=1, logging_steps=1,
        )  # fmt: skip
        trainer.train()
        losses.append([record["loss"] for record in trainer.state.log_history if "loss" in record])
    assert len(losses[0]) == STEPS
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_defect_9_the_term_counts_once_under_accumulation(tmp_path: Path) -> None:
    """The loss of a step doesn't depend on how the step is cut; PEFT's holds the term once for each micro-batch."""
    totals = {}
    for patched in (False, True):
        for accumulation in (1, 4):
            model = build("llama", total_step=STEPS, orth_reg_weight=1.0)
            trainer = _trainer(
                patch_model(model) if patched else model, tmp_path, [AdaLoraCallback()], max_steps=9,
                gradient_accumulation_steps=accumulation, per_device_train_batch_size=8 // accumulation,
                logging_steps=1,
            )  # fmt: skip
            trainer.train()
            totals[patched, accumulation] = next(r["loss"] for r in trainer.state.log_history if "loss" in r)
    assert totals[True, 4] == pytest.approx(totals[True, 1], rel=1e-4)
    assert totals[True, 1] == pytest.approx(totals[False, 1], rel=1e-4)
    assert totals[False, 4] > totals[False, 1] + 1.0


def test_the_schedule_takes_the_trainers_length(tmp_path: Path) -> None:
    model = patch_model(build("llama", total_step=500))
    _trainer(model, tmp_path, [AdaLoraCallback()]).train()
    assert model.peft_config["default"].total_step == STEPS
    pattern = model.peft_config["default"].rank_pattern
    assert sum(map(sum, pattern.values())) == 3 * len(pattern)


@pytest.mark.parametrize("total_step", [None, 50])
def test_a_schedule_of_another_length_is_warned_about_once(total_step: int | None, tmp_path: Path) -> None:
    model = patch_model(build("llama", total_step=500))
    with pytest.warns(UserWarning, match=f"schedule has {total_step or 500} steps, the training {STEPS}") as caught:
        _trainer(model, tmp_path, [AdaLoraCallback(total_step=total_step)]).train()
    assert sum("AdaLoRA's schedule" in str(warning.message) for warning in caught) == 1
    assert model.peft_config["default"].total_step == (total_step or 500)


@pytest.mark.parametrize("how", ["callbacks", "add_callback"])
def test_its_figures_reach_reporters(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which the Trainer puts before a user's callbacks."""
    seen: list[dict[str, float]] = []

    class Reporter(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            seen.append(dict(logs))

    monkeypatch.setattr("transformers.trainer.get_reporting_integration_callbacks", lambda names: [Reporter])
    callback = AdaLoraCallback(layer_ranks=True)
    model = patch_model(build("llama", layers=1))
    trainer = _trainer(model, tmp_path, [callback] if how == "callbacks" else [])
    if how == "add_callback":
        trainer.add_callback(callback)
    trainer.train()
    figures = {"live_rank", "budget", "orthogonality"}
    assert figures < {key.removeprefix("adalora/") for key in seen[0]} and "adalora/threshold" in seen[-2]
    ranks = {key.removeprefix("adalora/rank/"): rank for key, rank in seen[-2].items() if "/rank/" in key}
    assert ranks == model.base_model.rank_allocator().live_ranks() and sum(ranks.values()) == 3 * len(ranks)
    assert not any(key.startswith("adalora/") for key in seen[-1])  # the summary of the run
    assert sum(c is callback for c in trainer.callback_handler.callbacks) == 1
    assert [type(c).__name__ for c in trainer.callback_handler.callbacks[1:3]] == ["DefaultFlowCallback", "Reporter"]


def _with_scaler(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """What accelerate does for fp16 on a GPU, without autocast: a power of 2 changes no digit."""
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    trainer.accelerator.native_amp = True
    monkeypatch.setattr(Accelerator, "mixed_precision", property(lambda self: "fp16"))
    disabled = torch.autocast("cpu", enabled=False)
    monkeypatch.setattr("accelerate.accelerator.get_mixed_precision_context_manager", lambda *_: disabled)


@pytest.mark.filterwarnings("ignore:AdaLoRA's schedule")
@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_torch_fused"])
@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_under_a_grad_scaler(clip: float, optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    for scaled in (False, True):
        model = patch_model(build("llama", layers=1, total_step=STEPS))
        options = {"max_grad_norm": clip, "optim": optimizer, "max_steps": 12}
        trainer = _trainer(model, tmp_path, [AdaLoraCallback(total_step=None)], logging_steps=1, **options)
        if scaled:
            _with_scaler(trainer, monkeypatch)
        trainer.train()
        records = [record for record in trainer.state.log_history if "loss" in record]
        importance = model.base_model.rank_allocator().importance
        runs.append((records, [*adapter_parameters(model).values(), *importance.current(), importance.scores]))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_torch_fused"])
def test_an_overflow_step_of_a_grad_scaler(optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a parameter that is no adapter: every adapter's gradient is finite."""
    model = patch_model(build("llama", layers=1, total_step=STEPS, modules_to_save=["lm_head"]))
    states: list[tuple[Tensor, ...]] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            importance = model.base_model.rank_allocator().importance
            held = [p.detach().clone() for p in adapter_parameters(model).values()]
            states.append((*held, *importance.current(), importance.live.clone()))

    trainer = _trainer(model, tmp_path, [AdaLoraCallback(), Watch()], gradient_accumulation_steps=1, optim=optimizer)
    _with_scaler(trainer, monkeypatch)
    head = model.get_base_model().lm_head.modules_to_save["default"].weight
    head.register_hook(lambda grad: grad * torch.inf if len(states) in (7, 8) else grad)
    trainer.train()
    same = [all(map(torch.equal, before, after)) for before, after in pairwise(states[:16])]
    assert [step + 1 for step, unchanged in enumerate(same) if unchanged] == [7, 8]
    allocator = model.base_model.rank_allocator()
    assert (
        allocator.next_step == STEPS
        and not allocator.attached
        and sum(allocator.live_ranks().values()) == 3 * len(allocator.triplets)
    )


def test_resume_without_the_file_warns_once(tmp_path: Path) -> None:
    """As from a checkpoint that another program wrote."""
    _trainer(patch_model(build("llama", layers=1)), tmp_path, [AdaLoraCallback()], save_strategy="steps",
             save_steps=10).train()  # fmt: skip
    (tmp_path / "checkpoint-10" / STATE_FILE).unlink()
    model = patch_model(build("llama", layers=1, seed=1))
    with pytest.warns(UserWarning, match="averages start anew") as caught:
        _trainer(model, tmp_path, [AdaLoraCallback()]).train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert sum("averages start anew" in str(warning.message) for warning in caught) == 1
    pattern = model.peft_config["default"].rank_pattern
    assert sum(map(sum, pattern.values())) == 3 * len(pattern)


class _Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.hidden = SVDLinear(16, 16, r=6, lora_alpha=12, merge_weights=False)
        self.out = SVDLinear(16, VOCABULARY, r=6, lora_alpha=12, merge_weights=False)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.out(torch.tanh(self.hidden(self.embed(input_ids))))
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


@pytest.mark.parametrize("place", ["usual", "named", "moved"])
def test_our_own_layers_resume(place: str, tmp_path: Path) -> None:
    """The Trainer loads their weights without a word of where from; a file of other weights isn't taken."""

    def train(folder: Path, resume: Path | None = None, **options: Any) -> tuple[_Network, RankAllocator]:
        torch.manual_seed(0 if resume is None else 9)
        model = _Network()
        allocator = RankAllocator(model, 6, 2, 2, 5, 1, 0.85, 0.85)
        trainer = _trainer(model, folder, [AdaLoraCallback(allocator)], max_steps=STEPS, **options)
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        return model, allocator

    whole = train(tmp_path, save_strategy="steps", save_steps=8)
    checkpoint, options = tmp_path / "checkpoint-8", {}
    if place != "usual":
        checkpoint = checkpoint.rename(tmp_path / "moved")
        # What lies in the usual place is of another run.
        shutil.copytree(tmp_path / "checkpoint-16", tmp_path / "checkpoint-8")
    if place == "named":
        options = {"resume_from_checkpoint": str(checkpoint)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resumed = train(tmp_path, checkpoint, **options)
    assert any("averages start anew" in str(warning.message) for warning in caught) is (place == "moved")
    if place != "moved":
        assert all(torch.equal(a, b) for a, b in zip(resumed[0].parameters(), whole[0].parameters(), strict=True))
    assert (resumed[1].importance.updates == whole[1].importance.updates) is (place != "moved")


def test_our_own_layers_with_an_allocator(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = _Network()
    allocator = RankAllocator(model, 6, 2, 2, 5, 1, 0.85, 0.85)
    trainer = _trainer(model, tmp_path, [AdaLoraCallback(allocator)])
    trainer.train()
    assert allocator.total_step == STEPS and allocator.global_step == STEPS - 1
    assert sum(allocator.live_ranks().values()) <= 4
    records = [record for record in trainer.state.log_history if "loss" in record]
    assert records[-1]["adalora/budget"] == 4.0 and "adalora/live_rank" in records[-1]
    assert records[-1]["adalora/threshold"] == allocator.importance.threshold.item()
    assert records[-1]["adalora/orthogonality"] == compute_orth_regu(model, 1.0).item()


@pytest.mark.parametrize("variant", ["original", "paper"])
def test_callback_and_attached_optimizer_update_once(variant: str, tmp_path: Path) -> None:
    """Also where the callback is there twice; the Trainer's count is the schedule's."""
    ranks, losses = [], []
    for attach in (False, True):
        torch.manual_seed(0)
        model = _Network()
        allocator = RankAllocator(model, 6, 2, 2, 5, 1, 0.85, 0.85, variant=variant)
        trainer = _trainer(model, tmp_path, [AdaLoraCallback(allocator)] * (1 + attach), logging_steps=1)
        if attach:
            trainer.create_optimizer()
            allocator.attach(trainer.optimizer)
        trainer.train()
        assert allocator.importance.updates == STEPS - 5 and allocator.next_step == STEPS
        ranks.append(allocator.get_rank_pattern())
        losses.append([record["loss"] for record in trainer.state.log_history if "loss" in record])
    assert losses[0] == losses[1] and ranks[0] == ranks[1]


@pytest.mark.parametrize("kind", ["allocator", "peft"])
def test_a_step_that_accelerate_skips_is_left_out(kind: str) -> None:
    """Its gradients may be finite in every adapter."""
    tokens = {"input_ids": torch.ones(2, 5, dtype=torch.int64), "labels": torch.ones(2, 5, dtype=torch.int64)}
    if kind == "peft":
        model: Any = patch_model(build("llama", total_step=STEPS))
        allocator, callback = model.base_model.rank_allocator(), AdaLoraCallback()
    else:
        model = _Network()
        allocator = RankAllocator(model, 6, 2, 2, 5, 1, 0.85, 0.85, total_step=STEPS)
        callback = AdaLoraCallback(allocator)
    for step in range(6):
        model.zero_grad()
        outputs = model(**tokens)
        (outputs["loss"] if isinstance(outputs, dict) else outputs.loss).backward()
        optimizer = SimpleNamespace(step_was_skipped=step in (1, 4))
        state, call = TrainerState(global_step=step), {"model": model, "optimizer": optimizer}
        callback.on_pre_optimizer_step(None, state, None, **call)
        callback.on_optimizer_step(None, state, None, **call)
        assert allocator.importance.updates == (1, 1, 2, 3, 3, 4)[step]
        assert allocator.global_step == (0, 0, 2, 3, 3, 5)[step]


@pytest.mark.parametrize("step", [3, 16], ids=["while pruning", "T - t_f"])
def test_unpatched_peft_gets_no_gradient_of_a_skipped_step(step: int) -> None:
    """Infinite ones would stay in its averages, and nothing would be pruned any more."""
    model, callback = build("llama", layers=1, total_step=STEPS), AdaLoraCallback()
    tokens = {"input_ids": torch.ones(2, 5, dtype=torch.int64), "labels": torch.ones(2, 5, dtype=torch.int64)}
    for i in range(STEPS):
        model.zero_grad()
        model(**tokens).loss.backward()
        for parameter in adapter_parameters(model).values() if i == step else ():
            parameter.grad.fill_(torch.inf)
        optimizer = SimpleNamespace(step_was_skipped=i == step)
        callback.on_optimizer_step(None, TrainerState(global_step=i), None, model=model, optimizer=optimizer)
    assert live_total(model) == 3 * len(model.peft_config["default"].rank_pattern)


def test_callback_and_attached_optimizer_on_a_patched_model(tmp_path: Path) -> None:
    losses = []
    for attach in (False, True):
        model = patch_model(build("llama", total_step=STEPS))
        trainer = _trainer(model, tmp_path, [AdaLoraCallback()] * (1 + attach), logging_steps=1)
        if attach:
            trainer.create_optimizer()
            model.base_model.rank_allocator().attach(trainer.optimizer)
        trainer.train()
        assert model.base_model.rank_allocator().next_step == STEPS
        losses.append([record["loss"] for record in trainer.state.log_history if "loss" in record])
    assert losses[0] == losses[1]


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="allocator: expected a RankAllocator"):
        AdaLoraCallback("allocator")
    for total_step in ("all", 0, 2.5, True, [20]):
        with pytest.raises(ValueError, match="total_step: expected 'auto', a positive number of steps or None"):
            AdaLoraCallback(total_step=total_step)
    with pytest.raises(ValueError, match="expected one PEFT AdaLoRA model in _Network, found 0"):
        _trainer(_Network(), tmp_path, [AdaLoraCallback()]).train()
    model = patch_model(build("llama"))
    allocator = RankAllocator(_Network(), 6, 2, 2, 5, 1, 0.85, 0.85)
    with pytest.raises(ValueError, match="allocator: expected None"):
        _trainer(model, tmp_path, [AdaLoraCallback(allocator)]).train()
    inference = patch_model(build("llama", inference_mode=True))
    for parameter in inference.parameters():
        parameter.requires_grad_(True)
    with pytest.raises(ValueError, match="found only inference adapters"):
        _trainer(inference, tmp_path, [AdaLoraCallback()]).train()
