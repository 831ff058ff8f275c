"""Data and networks: a residual MLP, the teacher that is one with an increment, and what is to be learned from it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.paper.teacher.protocol import Protocol, Teacher


class ResidualMLP(nn.Module):
    """x ← x + W₂ gelu(W₁ norm(x)), once for each pair of matrices, without biases.

    Args:
        matrices: modules from [M, width] to [M, width], an even number.
    """

    def __init__(self, matrices: Iterable[nn.Module]) -> None:
        super().__init__()
        self.matrices = nn.ModuleList(matrices)

    def forward(self, x: Tensor) -> Tensor:
        """[M, width] for x [M, width]."""
        for first, second in zip(self.matrices[::2], self.matrices[1::2], strict=True):
            x = x + second(F.gelu(first(F.layer_norm(x, x.shape[-1:]))))
        return x


class Frozen(nn.Module):
    """x Wᵀ for a W [N, K] that does not train."""

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, x: Tensor) -> Tensor:
        """[M, N] for x [M, K]."""
        return F.linear(x, self.weight)


class LoRA(Frozen):
    """x (W + c B A)ᵀ with LoRA's initialisation: A as nn.Linear's weight, B = 0 (LoRA, arXiv 2106.09685).

    Args:
        weight: W [N, K].
        rank: R; 0 leaves the frozen matrix.
        factor: c, that is alpha / R.
    """

    def __init__(self, weight: Tensor, rank: int, factor: float = 2.0) -> None:
        super().__init__(weight)
        self.factor = factor
        bound = weight.shape[1] ** -0.5
        self.lora_A = nn.Parameter(weight.new_empty(rank, weight.shape[1]).uniform_(-bound, bound))
        self.lora_B = nn.Parameter(weight.new_zeros(weight.shape[0], rank))

    def increment(self) -> Tensor:
        """c B A, [N, K]."""
        return self.factor * (self.lora_B @ self.lora_A).detach()

    def forward(self, x: Tensor) -> Tensor:
        """[M, N] for x [M, K]."""
        return F.linear(x, torch.addmm(self.weight, self.lora_B, self.lora_A, alpha=self.factor))


@dataclass(frozen=True)
class Problem:
    """Frozen matrices, and the answers of a teacher that has an increment in each.

    Attributes:
        weights: W of each matrix, [width, width].
        ranks: of the teacher's increment in each.
        x, y: inputs and answers to train on, [training, width].
        held_x, held_y: those that losses are of, [held_out, width].
        start: mean squared error of the frozen network on ``x``.
        held_start: the same on ``held_x``.
    """

    weights: Sequence[Tensor]
    ranks: Sequence[int]
    x: Tensor
    y: Tensor
    held_x: Tensor
    held_y: Tensor
    start: float
    held_start: float

    @torch.no_grad()
    def loss(self, student: nn.Module) -> float:
        """Held-out error as a share of the frozen network's."""
        return F.mse_loss(student(self.held_x), self.held_y).item() / self.held_start


def _orthonormal(width: int, rank: int, generator: torch.Generator) -> Tensor:
    """[width, rank]."""
    return torch.linalg.qr(torch.randn(width, width, generator=generator))[0][:, :rank]


@lru_cache(maxsize=1)
@torch.no_grad()
def problem(protocol: Protocol, teacher: Teacher, scale: float, seed: int) -> Problem:
    """W of N(0, 1/width), increments with all singular values ``scale``, inputs of N(0, 1); no noise."""
    generator, width = torch.Generator().manual_seed(seed), protocol.width
    count = len(protocol.true_ranks)
    weights = [torch.randn(width, width, generator=generator) / width**0.5 for _ in range(count)]
    order = torch.randperm(count, generator=generator).tolist()
    even = protocol.uniform_rank(1.0)
    ranks = [protocol.true_ranks[i] if teacher == "varied" else even for i in order]
    factors = [(_orthonormal(width, rank, generator), _orthonormal(width, rank, generator)) for rank in ranks]
    base = ResidualMLP(Frozen(w) for w in weights)
    taught = ResidualMLP(Frozen(w + scale * u @ v.t()) for w, (u, v) in zip(weights, factors, strict=True))
    inputs = torch.randn(protocol.training + protocol.held_out, width, generator=generator)
    x, held_x = inputs.split([protocol.training, protocol.held_out])
    y, held_y = taught(x), taught(held_x)
    start, held_start = F.mse_loss(base(x), y).item(), F.mse_loss(base(held_x), held_y).item()
    return Problem(weights, ranks, x, y, held_x, held_y, start, held_start)


__all__ = ["Frozen", "LoRA", "Problem", "ResidualMLP", "problem"]
