"""Random layers with values of the size that training meets."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RANKS = (0, 1, 8, 12, 16, 33, 64)


@dataclass
class LayerInputs:
    """The tensors of one layer call; ``grad_y`` is the gradient that arrives at its output."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor
    lora_E: Tensor
    lora_B: Tensor
    grad_y: Tensor

    def to(self, dtype: torch.dtype) -> LayerInputs:
        """All tensors in ``dtype``."""
        return LayerInputs(*(None if t is None else t.to(dtype) for t in vars(self).values()))  # type: ignore[arg-type]


def layer_inputs(
    m: int,
    k: int,
    n: int,
    r: int,
    dtype: torch.dtype = torch.float32,
    adapter_dtype: torch.dtype | None = None,
    bias: bool = True,
    device: str = "cpu",
    seed: int = 0,
) -> LayerInputs:
    """A layer with M = m tokens, K = k, N = n and rank r; x, W, b, g in ``dtype``, the adapter in ``adapter_dtype``."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype, std: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * std).to(device=device, dtype=dtype)

    adapter = adapter_dtype or dtype
    return LayerInputs(
        x=normal(m, k, dtype=dtype),
        weight=normal(n, k, dtype=dtype, std=k**-0.5),
        bias=normal(n, dtype=dtype) if bias else None,
        lora_A=normal(r, k, dtype=adapter, std=k**-0.5),
        lora_E=normal(r, 1, dtype=adapter),
        lora_B=normal(n, r, dtype=adapter, std=0.2),
        grad_y=normal(m, n, dtype=dtype),
    )


__all__ = ["RANKS", "LayerInputs", "layer_inputs"]
