"""What steps are measured on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.step.models import Batch, Model, described

BATCHES, TOLERANCE = 4, 1e-4
TARGET_SHARE = 2


@dataclass(frozen=True)
class Case:
    """One model and how it is trained.

    Attributes:
        model: of ``models``.
        rank: AdaLoRA's initial one.
        dtype: of the base; adapters are fp32, as PEFT's are.
        device: where.
        threads: of the CPU.
        target: AdaLoRA's mean rank at the end; None for half of the initial one.
        lora: LoRA's rank; None for AdaLoRA's initial one.
    """

    model: Model
    rank: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    threads: int = 1
    target: int | None = None
    lora: int | None = None

    @property
    def target_rank(self) -> int:
        """AdaLoRA's at the end."""
        return self.target or self.rank // TARGET_SHARE

    @property
    def lora_rank(self) -> int:
        """LoRA's."""
        return self.lora or self.rank

    @property
    def tolerance(self) -> float:
        """How far losses of equal steps may be apart, relative."""
        return 1e-2 if self.dtype.itemsize == 2 else TOLERANCE

    def batches(self) -> list[Batch]:
        """Those that steps take in turn."""
        return [self.model.batch(self.device, seed) for seed in range(BATCHES)]

    def record(self, mode: str = "") -> dict[str, Any]:
        """As it is written down; ``mode`` is a benchmark other than the eager one."""
        about = {"threads": self.threads, "device": self.device, "lora": self.lora_rank}
        named = {"mode": mode.rpartition(", ")[2]} if mode else {}
        return described(self.model, self.rank, self.dtype) | about | named


__all__ = ["Case"]
