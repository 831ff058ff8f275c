"""A short run of transformers' Trainer on a small language model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from tests.integrations.small_models import VOCABULARY


class _Sentences(torch.utils.data.Dataset):
    def __init__(self) -> None:
        self.tokens = torch.randint(1, VOCABULARY, (64, 6), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def make_trainer(model: nn.Module, folder: Path, *callbacks: Any, **options: Any) -> Trainer:
    """A Trainer of 20 optimizer steps, each of one micro-batch, that saves nothing."""
    settings = {
        "output_dir": str(folder), "max_steps": 20, "per_device_train_batch_size": 2, "learning_rate": 5e-3,
        "report_to": [], "use_cpu": True, "save_strategy": "no", "logging_steps": 5, "seed": 0, "disable_tqdm": True,
        "lr_scheduler_type": "constant", **options,
    }  # fmt: skip
    return Trainer(model, TrainingArguments(**settings), train_dataset=_Sentences(), callbacks=list(callbacks))
