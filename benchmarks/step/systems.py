"""The contestants of a whole step, each as its phases: forward, backward, optimizer, and AdaLoRA's own work."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from adalora_kernels import AdaLoraAdamW, RankAllocator, patch_model
from benchmarks.step.case import Case
from benchmarks.step.models import Batch
from benchmarks.step.names import FROZEN, FULL, LORA, OURS, OURS_AGAIN, OURS_SWEPT, PEFT, PHASES

ALPHA = 16
LEARNING_RATE = 1e-3
TOTAL_STEPS = 10_000  # every timed step lies where importance is updated and triplets are ranked
FIRST_STEP = 5_000
ORTHOGONALITY = 0.1
CONTESTANTS = (PEFT, OURS, OURS_SWEPT, OURS_AGAIN, LORA, FULL)


@dataclass
class System:
    """A model under training.

    Attributes:
        model: as it is called.
        optimizer: of what trains; None where nothing does.
        allocate: AdaLoRA's work after the optimizer's step; None where there is none, or the optimizer does it.
        expect: tells the optimizer the number of the step that it is to make; None where it needs none.
        allocator: the one that a CUDA graph can hold; None where there is none.
        step: the number of the next one.
    """

    model: Any
    optimizer: torch.optim.Optimizer | None
    allocate: Callable[[int], object] | None = None
    expect: Callable[[int], object] | None = None
    allocator: RankAllocator | None = None
    step: int = FIRST_STEP
    loss: Tensor | None = field(default=None, repr=False)

    def phases(self, batch: Batch) -> list[tuple[str, Callable[[], object]]]:
        """One step in its parts, to be run in this order."""

        def forward() -> None:
            self.loss = self.model(**batch).loss

        def backward() -> None:
            assert self.loss is not None
            self.loss.backward()

        def optimize() -> None:
            if self.expect is not None:
                self.expect(self.step)
            if self.optimizer is not None:
                self.optimizer.step()

        def engine() -> None:
            if self.allocate is not None:
                self.allocate(self.step)
            if self.optimizer is not None:
                self.optimizer.zero_grad()
            self.step += 1

        return list(zip(PHASES, (forward, backward, optimize, engine), strict=True))

    def run(self, batch: Batch) -> Tensor:
        """One whole step.

        Returns:
            The loss before the update, 0-d.
        """
        for _, part in self.phases(batch):
            part()
        assert self.loss is not None
        loss, self.loss = self.loss.detach(), None  # the graph goes with it, before another stream makes the next
        return loss


def trained(model: nn.Module) -> list[nn.Parameter]:
    """What requires gradients."""
    return [p for p in model.parameters() if p.requires_grad]


def systems(case: Case, names: Sequence[str] = CONTESTANTS, capturable: bool = False) -> dict[str, System]:
    """Contestants on equal weights.

    Args:
        case: the model, and how it is trained.
        names: of the contestants.
        capturable: whether a CUDA graph is to hold the steps of optimizer and allocator.
    """
    from peft import AdaLoraConfig, LoraConfig, get_peft_model

    targets = case.model.targets
    torch.manual_seed(0)
    with torch.device(case.device):  # where a large model is made in a moment
        base = case.model.build().to(case.dtype)
    lora_config = LoraConfig(r=case.lora_rank, lora_alpha=ALPHA, target_modules=targets)
    config = AdaLoraConfig(
        # Any task type that adds nothing to the model: without one PEFT leaves its orthogonality term out.
        task_type="FEATURE_EXTRACTION", init_r=case.rank, target_r=case.target_rank, tinit=10, tfinal=10,
        deltaT=1, total_step=TOTAL_STEPS, lora_alpha=ALPHA, orth_reg_weight=ORTHOGONALITY, target_modules=targets,
    )  # fmt: skip
    sources = {}
    if LORA in names:
        torch.manual_seed(1)
        sources[LORA] = get_peft_model(copy.deepcopy(base), lora_config)
    if {PEFT, OURS, OURS_SWEPT, OURS_AGAIN} & set(names):
        torch.manual_seed(2)
        sources[PEFT] = get_peft_model(copy.deepcopy(base), config)
        for name, parameter in sources[PEFT].named_parameters():
            if ".lora_E." in name:
                nn.init.normal_(parameter)
    found = {}
    for name in names:
        contestant = copy.deepcopy(sources.get(PEFT if name.startswith(OURS) else name, base))
        prepared = _PREPARED.get(name, patch_model)(contestant)
        found[name] = _system(name, prepared.to(case.device).train(), capturable)
    return found


def _as_it_is(model: nn.Module) -> nn.Module:
    return model


def _only_passed_through(model: nn.Module) -> nn.Module:
    """Nothing trains, and gradients go down to the embeddings, as they do for adapters in the first layer."""
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.register_forward_hook(lambda module, args, output: output.requires_grad_())
    return model


_PREPARED: dict[str, Callable[[nn.Module], nn.Module]] = {
    PEFT: _as_it_is, LORA: _as_it_is, FULL: lambda base: base.requires_grad_(True), FROZEN: _only_passed_through
}  # fmt: skip


def _system(name: str, model: Any, capturable: bool) -> System:
    if name == FROZEN:
        return System(model, None)
    params = trained(model)
    options: dict[str, Any] = {"lr": LEARNING_RATE}
    if capturable:
        options = {"lr": torch.tensor(LEARNING_RATE, device=params[0].device), "capturable": True}
    allocator = None
    if capturable and name.startswith(OURS):
        allocator = _capturable_allocator(model)
    if name == OURS_SWEPT:
        swept = allocator or model.base_model.rank_allocator()
        optimizer = AdaLoraAdamW(params, allocator=swept, **options)
        return System(model, optimizer, expect=None if capturable else swept.expect, allocator=allocator)
    allocates = name not in (LORA, FULL) and allocator is None
    allocate = model.base_model.update_and_allocate if allocates else None
    return System(model, torch.optim.AdamW(params, fused=True, **options), allocate, allocator=allocator)


def _capturable_allocator(model: Any) -> RankAllocator:
    """As that of the patched model, on the schedule of its config."""
    (config,) = model.peft_config.values()
    allocator = RankAllocator(
        model, config.init_r, config.target_r, config.tinit, config.tfinal, config.deltaT, config.beta1, config.beta2,
        config.total_step, variant="peft", capturable=True,
    )  # fmt: skip
    allocator.expect(FIRST_STEP)
    return allocator


__all__ = ["CONTESTANTS", "System", "systems", "trained"]
