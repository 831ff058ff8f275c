"""The contestants of a whole step, each as its phases: forward, backward, optimizer, and AdaLoRA's own work."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from adalora_kernels import AdaLoraAdamW, patch_model
from benchmarks.step.models import Model

ALPHA = 16
LEARNING_RATE = 1e-3
TOTAL_STEPS = 10_000  # every timed step lies where importance is updated and triplets are ranked
FIRST_STEP, TARGET_SHARE = 5_000, 2
ORTHOGONALITY = 0.1
PEFT, OURS, OURS_SWEPT, OURS_AGAIN = "PEFT AdaLoRA", "ours", "ours, AdaLoraAdamW", "ours, once more"
LORA, FULL = "PEFT LoRA", "full fine-tuning"
PHASES = ("forward", "backward", "optimizer", "budget engine")


@dataclass
class System:
    """A model under training.

    Attributes:
        model: as it is called.
        optimizer: of what trains.
        allocate: AdaLoRA's work after the optimizer's step; None where there is none, or the optimizer does it.
        step: the number of the next one.
    """

    model: Any
    optimizer: torch.optim.Optimizer
    allocate: Callable[[int], object] | None = None
    expect: Callable[[int], object] | None = None
    step: int = FIRST_STEP
    loss: Tensor | None = field(default=None, repr=False)

    def phases(self, batch: dict[str, Tensor]) -> list[tuple[str, Callable[[], object]]]:
        """One step in its parts, to be run in this order."""

        def forward() -> None:
            self.loss = self.model(**batch).loss

        def backward() -> None:
            assert self.loss is not None
            self.loss.backward()

        def optimize() -> None:
            if self.expect is not None:
                self.expect(self.step)
            self.optimizer.step()

        def engine() -> None:
            if self.allocate is not None:
                self.allocate(self.step)
            self.optimizer.zero_grad()
            self.step += 1

        return list(zip(PHASES, (forward, backward, optimize, engine), strict=True))


def trained(model: nn.Module) -> list[nn.Parameter]:
    """What requires gradients."""
    return [p for p in model.parameters() if p.requires_grad]


def systems(
    model: Model, rank: int, dtype: torch.dtype, device: str, target: int | None = None, lora: int | None = None
) -> dict[str, System]:
    """Every contestant on equal weights.

    Args:
        model: of ``models``.
        rank: AdaLoRA's initial one.
        dtype: of the base; adapters are fp32, as PEFT's are.
        device: where.
        target: AdaLoRA's mean rank at the end; None for half of the initial one.
        lora: LoRA's rank; None for AdaLoRA's initial one.
    """
    from peft import AdaLoraConfig, LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = model.build().to(dtype)
    torch.manual_seed(1)
    lora_config = LoraConfig(r=lora or rank, lora_alpha=ALPHA, target_modules=model.targets)
    lora_model = get_peft_model(copy.deepcopy(base), lora_config)
    config = AdaLoraConfig(
        # Any task type that adds nothing to the model: without one PEFT leaves its orthogonality term out.
        task_type="FEATURE_EXTRACTION", init_r=rank, target_r=target or rank // TARGET_SHARE, tinit=10, tfinal=10,
        deltaT=1, total_step=TOTAL_STEPS, lora_alpha=ALPHA, orth_reg_weight=ORTHOGONALITY, target_modules=model.targets,
    )  # fmt: skip
    adalora = get_peft_model(copy.deepcopy(base), config)
    for name, parameter in adalora.named_parameters():
        if ".lora_E." in name:
            nn.init.normal_(parameter)
    full = base.requires_grad_(True)
    found = {
        PEFT: adalora,
        OURS: patch_model(copy.deepcopy(adalora)),
        OURS_SWEPT: patch_model(copy.deepcopy(adalora)),
        OURS_AGAIN: patch_model(copy.deepcopy(adalora)),
        LORA: lora_model,
        FULL: full,
    }
    return {name: _system(name, contestant.to(device).train()) for name, contestant in found.items()}


def _system(name: str, model: Any) -> System:
    if name == OURS_SWEPT:
        allocator = model.base_model.rank_allocator()
        return System(
            model, AdaLoraAdamW(trained(model), lr=LEARNING_RATE, allocator=allocator), expect=allocator.expect
        )
    optimizer = torch.optim.AdamW(trained(model), lr=LEARNING_RATE, fused=True)
    return System(model, optimizer, None if name in (LORA, FULL) else model.base_model.update_and_allocate)


__all__ = ["FULL", "LORA", "OURS", "OURS_AGAIN", "OURS_SWEPT", "PEFT", "PHASES", "System", "systems", "trained"]
