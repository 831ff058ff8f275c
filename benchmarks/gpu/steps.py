"""Whole training steps on the device: the real models with random weights, AdaLoRA beside PEFT's, LoRA and full."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from benchmarks.gpu.machine import Machine
from benchmarks.gpu.rows import Row
from benchmarks.step.measure import measure
from benchmarks.step.models import REAL, SMALL, Model
from benchmarks.step.systems import OURS, OURS_SWEPT

RANK, TARGET = 12, 8  # the paper's
PEFT_MUST, LORA_MUST = 3.0, 1.0  # kernels.md, row 6: DeBERTa-v3-base, 32×128


def steps(machine: Machine, deadline: float) -> Iterator[dict[str, Any]]:
    """Every model in bf16 (in a dry run a short one in fp32), beside LoRA at the initial and at the final rank."""
    dtype = torch.float32 if machine.dry else torch.bfloat16
    for model in _models(machine):
        for lora in (RANK, TARGET):
            if time.monotonic() < deadline:
                yield measure(model, RANK, dtype, machine.device, 1, machine.rounds, target=TARGET, lora=lora)
                machine.forget()


def _models(machine: Machine) -> tuple[Model, ...]:
    return (replace(SMALL[0], rows=2, columns=8),) if machine.dry else REAL


def rows(records: list[dict[str, Any]]) -> Iterator[Row]:
    """What must be reached on DeBERTa-v3-base, 32×128."""
    for record in records:
        case = record["case"]
        if case["model"] != REAL[0].name:
            continue
        for name in (OURS, OURS_SWEPT):
            about = f"{case['model']}, {name}"
            if case["lora"] == RANK:
                yield Row(f"{about} / PEFT AdaLoRA, step", 1 / record["peft_over_ours"][name], 1 / PEFT_MUST)
            yield Row(f"{about} / PEFT LoRA r={case['lora']}, step", record["ours_over_lora"][name], LORA_MUST)


__all__ = ["rows", "steps"]
