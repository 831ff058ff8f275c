"""A Trainer run that was stopped and resumed is the run that never stopped, step by step and bit by bit."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from adalora_kernels import AdaLoraAdamW, AdaLoraCallback
from adalora_kernels.integrations.peft import patch_model
from tests.integrations.small_models import VOCABULARY, adapter_parameters, build

STEPS, END = 14, 10  # T and T - t_f
STOPS = (5, END, END + 1, END + 3)  # before T - t_f, at it, after it


class Sentences(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = torch.randint(1, VOCABULARY, (5,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens}


class Recorder(TrainerCallback):
    """Saves at some steps, notes what each step leaves, and may kill the process after one."""

    def __init__(self, saves: tuple[int, ...] = (), kill_at: int | None = None) -> None:
        self.saves, self.kill_at = saves, kill_at
        self.after: dict[int, list[Tensor]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        control.should_save = state.global_step in self.saves
        held = [p.detach().clone() for p in adapter_parameters(model).values()]
        importance = model.base_model.rank_allocator().importance
        self.after[state.global_step] = [*held, *importance.current(), importance.scores, importance.live.clone()]
        if state.global_step == self.kill_at:
            signal.raise_signal(signal.SIGKILL)


class Run(NamedTuple):
    model: nn.Module
    after: dict[int, list[Tensor]]
    log: dict[int, dict[str, float]]


def run(
    folder: Path, optimizer: str = "torch", resume: Path | None = None, seed: int = 0, layers: int = 1, **recorder: Any
) -> Run:
    """Train; accumulation, dropout, a schedule of the learning rate and clipping are there to be got wrong."""
    model = patch_model(
        build(
            "llama", seed=seed, layers=layers, total_step=STEPS, tfinal=STEPS - END, lora_dropout=0.1,
            target_modules=["q_proj", "v_proj", "down_proj"],
        )
    )  # fmt: skip
    if seed:  # another model but for the base, which is pretrained
        base = build("llama", layers=layers, target_modules=["q_proj", "v_proj", "down_proj"]).state_dict()
        model.load_state_dict({name: value for name, value in base.items() if "lora_" not in name}, strict=False)
    settings = TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        logging_steps=1, learning_rate=1e-2, lr_scheduler_type="linear", report_to=[], use_cpu=True, seed=3,
        save_strategy="no", disable_tqdm=True, max_grad_norm=0.5,
    )  # fmt: skip
    optimizers: tuple[Any, Any] = (None, None)
    if optimizer == "ours":
        ours = AdaLoraAdamW(
            adapter_parameters(model).values(), lr=1e-2, weight_decay=0.0, allocator=model.base_model.rank_allocator()
        )
        optimizers = (ours, None)
    notes = Recorder(**recorder)
    trainer = Trainer(
        model, settings, train_dataset=Sentences(), callbacks=[AdaLoraCallback(), notes], optimizers=optimizers
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    log = {record["step"]: record for record in trainer.state.log_history if "loss" in record}
    return Run(model, notes.after, log)


def assert_equal(resumed: Run, whole: Run, stop: int) -> None:
    assert list(resumed.after) == list(range(stop + 1, STEPS + 1))
    for step, tensors in resumed.after.items():
        for i, (mine, theirs) in enumerate(zip(tensors, whole.after[step], strict=True)):
            assert torch.equal(mine, theirs), f"step {step}: tensor {i}"
        assert resumed.log[step] == whole.log[step], f"step {step}"
    assert all("adalora/threshold" in resumed.log[step] for step in resumed.after)
    # Saving drops the adapter's name from the keys.
    left, right = (
        {name.removesuffix(".default"): row for name, row in r.model.peft_config["default"].rank_pattern.items()}
        for r in (resumed, whole)
    )
    assert left == right and sum(map(sum, left.values())) == 3 * len(left)
    allocators = [r.model.base_model.rank_allocator() for r in (resumed, whole)]
    assert allocators[0].next_step == allocators[1].next_step == STEPS


@pytest.mark.parametrize("optimizer", ["torch", "ours"])
def test_resumed_equals_never_stopped(optimizer: str, tmp_path: Path) -> None:
    whole = run(tmp_path, optimizer, saves=STOPS)
    for stop in STOPS:
        resumed = run(tmp_path / "again", optimizer, tmp_path / f"checkpoint-{stop}", seed=7)
        assert_equal(resumed, whole, stop)


def test_killed_in_a_process_of_its_own(tmp_path: Path) -> None:
    script = (
        "import sys, pathlib; from tests.integrations.test_resume import run; "
        "run(pathlib.Path(sys.argv[1]), saves=(6,), kill_at=8)"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    assert subprocess.run(command, check=False, capture_output=True).returncode == -signal.SIGKILL
    assert sorted(path.name for path in (tmp_path / "checkpoint-6").glob("adalora*")) == ["adalora_state.safetensors"]
    whole = run(tmp_path / "whole")
    assert_equal(run(tmp_path, resume=tmp_path / "checkpoint-6", seed=7), whole, 6)
