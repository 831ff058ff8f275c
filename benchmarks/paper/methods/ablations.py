"""The paper's ablations of AdaLoRA's importance score: other scores in the same allocator, from plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from adalora_kernels.allocator import Turn
from adalora_kernels.integrations.adalora_model import FusedAdaLoraModel
from adalora_kernels.integrations.tuner_allocator import TunerAllocator


class SingularValueAllocator(TunerAllocator):
    """S_i = |Λ_i|."""

    def _scores(self, turn: Turn, finite: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return torch.cat([E.detach().flatten().abs().float() for E in turn.lora_E]), finite


class SensitivityAllocator(TunerAllocator):
    """S_i of I = |θ g| alone (the paper's equation 8): this step's, neither smoothed nor times its uncertainty."""

    def _scores(self, turn: Turn, finite: Tensor | None) -> tuple[Tensor, Tensor | None]:
        sensitivity = [
            torch.zeros_like(p) if p.grad is None else (p.detach() * p.grad).abs().float() for p in turn.params
        ]
        rows = zip(sensitivity[::3], sensitivity[1::3], sensitivity[2::3], strict=True)
        return torch.cat([a.mean(1) + e.flatten() + b.mean(0) for a, e, b in rows]), finite


def use(allocator: type[TunerAllocator], tuner: FusedAdaLoraModel) -> None:
    """Let ``allocator`` rank the triplets of a patched PEFT model that has not been trained yet."""
    name, config = tuner.trained_adapter() or ("", None)
    if config is None:
        raise ValueError("tuner: expected a trainable AdaLoRA adapter, found none")
    tuner.fused_state.allocator = allocator(tuner, name, config)
    tuner.fused_state.bound = True


__all__ = ["SensitivityAllocator", "SingularValueAllocator", "use"]
