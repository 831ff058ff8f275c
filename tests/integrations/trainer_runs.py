"""Runs of the real Trainer that are stopped, resumed and compared step by step."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from adalora_kernels import AdaLoraAdamW, AdaLoraCallback, RankAllocator
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
        # ZeRO-3 leaves parameters empty beside this rank's share of them.
        held = [getattr(p, "ds_tensor", p).detach().clone() for p in adapter_parameters(model).values()]
        importance = model.base_model.rank_allocator().importance
        self.after[state.global_step] = [*held, *importance.current(), importance.scores, importance.live.clone()]
        if state.global_step == self.kill_at:
            signal.raise_signal(signal.SIGKILL)


class Run(NamedTuple):
    """One run.

    Attributes:
        allocator: as it ended.
        pattern: as PEFT's config ended.
        after: parameters, averages, scores and pattern after each step.
        log: the Trainer's record of each step.
    """

    allocator: RankAllocator
    pattern: dict[str, list[bool]]
    after: dict[int, list[Tensor]]
    log: dict[int, dict[str, float]]


def run(
    folder: Path, optimizer: str = "torch", resume: Path | None = None, seed: int = 0,
    saves: tuple[int, ...] = (), kill_at: int | None = None, **options: Any,
) -> Run:  # fmt: skip
    """Train; accumulation, dropout, a schedule of the learning rate and clipping are there to be got wrong.

    Args:
        folder: for checkpoints.
        optimizer: "torch" or "ours".
        resume: the checkpoint to continue from.
        seed: another one makes another adapter over the same base.
        saves: after which steps to save.
        kill_at: after which step to kill the process.
        options: of ``TrainingArguments``.
    """
    settings = {"layers": 1, "total_step": STEPS, "tfinal": STEPS - END, "lora_dropout": 0.1,
                "target_modules": ["q_proj", "v_proj", "down_proj"]}  # fmt: skip
    model = patch_model(build("llama", seed=seed, **settings))
    if seed:
        base = build("llama", **settings).state_dict()
        model.load_state_dict({name: value for name, value in base.items() if "lora_" not in name}, strict=False)
    defaults = {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2, "logging_steps": 1, "learning_rate": 1e-2, "lr_scheduler_type": "linear",
        "report_to": [], "use_cpu": True, "seed": 3, "save_strategy": "no", "disable_tqdm": True, "max_grad_norm": 0.5,
    }  # fmt: skip
    ours = None
    if optimizer == "ours":
        allocator = model.base_model.rank_allocator()
        ours = AdaLoraAdamW(adapter_parameters(model).values(), lr=1e-2, weight_decay=0.0, allocator=allocator)
    recorder = Recorder(saves, kill_at)
    trainer = Trainer(
        model, TrainingArguments(**defaults | options), train_dataset=Sentences(),
        callbacks=[AdaLoraCallback(), recorder], optimizers=(ours, None),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    log = {record["step"]: record for record in trainer.state.log_history if "loss" in record}
    pattern = model.peft_config["default"].rank_pattern
    # Saving drops the adapter's name from the keys.
    pattern = {name.removesuffix(".default"): row for name, row in pattern.items()}
    return Run(model.base_model.rank_allocator(), pattern, recorder.after, log)


def assert_equal(resumed: Run, whole: Run, stop: int) -> None:
    """From ``stop`` on, and bit for bit."""
    assert list(resumed.after) == list(range(stop + 1, STEPS + 1))
    for step, tensors in resumed.after.items():
        for i, (mine, theirs) in enumerate(zip(tensors, whole.after[step], strict=True)):
            assert torch.equal(mine, theirs), f"step {step}: tensor {i}"
        assert resumed.log[step] == whole.log[step], f"step {step}"
    assert all("adalora/threshold" in resumed.log[step] for step in resumed.after)
    assert resumed.pattern == whole.pattern and sum(map(sum, whole.pattern.values())) == 3 * len(whole.pattern)
    assert resumed.allocator.next_step == whole.allocator.next_step == STEPS
