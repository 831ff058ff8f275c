"""The methods: each trains a student on a teacher's answers and says what loss and which ranks are left."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F

from adalora_kernels import AdaLoraAdamW, RankAllocator, SVDLinear, compute_orth_regu
from benchmarks.paper.teacher.networks import Frozen, LoRA, Problem, ResidualMLP, problem
from benchmarks.paper.teacher.protocol import Protocol, Run, Setting, proportional


@dataclass(frozen=True)
class Outcome:
    """What a student is after training.

    Attributes:
        student: the network.
        ranks: of the increment of each matrix.
        measured: what else was recorded.
    """

    student: nn.Module
    ranks: Sequence[int]
    measured: dict[str, float]


def execute(protocol: Protocol, run: Run) -> dict[str, Any]:
    """Make one run.

    Returns:
        loss: held-out error as a share of the frozen network's, None where training diverged; start: that network's,
        mean squared; ranks (none where it diverged) and true_ranks, of each matrix; correlation: Spearman's, of the
        two, None where one is constant; seconds; and for AdaLoRA gamma, the number that was used, and
        regularizer_to_loss, the norm of the orthogonality term's gradient over all A and B as a share of the loss's,
        at step t_i.

    Raises:
        RuntimeError: the student has more rank than the budget allows.
    """
    begun = time.perf_counter()
    setting = run.setting
    told = problem(protocol, setting.teacher, setting.scale, run.seed)
    total = protocol.total_rank(run.budget)
    if setting.method == "adalora":
        outcome = _adalora(protocol, told, run, total)
    elif setting.method == "lora-truncated":
        outcome = _truncated(told, _full_increments(protocol, setting, run.rate, run.seed), total)
    else:
        even = [1] * len(told.ranks)
        ranks = proportional(told.ranks if setting.method == "lora-true" else even, total)
        outcome = Outcome(_lora(protocol, told, ranks, run.rate, run.seed), ranks, {})
    loss, ranks = told.loss(outcome.student), list(outcome.ranks)
    if not math.isfinite(loss):
        ranks = []
    elif sum(ranks) > total:
        raise RuntimeError(f"{run}: expected a total rank of at most {total}, got {sum(ranks)}")
    return {
        "loss": loss if ranks else None,
        "start": told.held_start,
        "ranks": ranks,
        "true_ranks": list(told.ranks),
        "correlation": _correlation(ranks, told.ranks),
        **{name: value if math.isfinite(value) else None for name, value in outcome.measured.items()},
        "seconds": round(time.perf_counter() - begun, 2),
    }


def _correlation(ranks: Sequence[int], true_ranks: Sequence[int]) -> float | None:
    if len(set(ranks)) < 2 or len(set(true_ranks)) < 2:
        return None
    return float(spearmanr(ranks, true_ranks).statistic)


def _batches(protocol: Protocol, seed: int) -> Tensor:
    """Indices [steps, batch], the same for every method."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(protocol.training, (protocol.steps, protocol.batch), generator=generator)


def _decay(optimizer: torch.optim.Optimizer, rate: float, step: int, steps: int) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * (1 - step / steps)


def _lora(protocol: Protocol, told: Problem, ranks: Sequence[int], rate: float, seed: int) -> ResidualMLP:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = ResidualMLP(LoRA(w, rank) if rank else Frozen(w) for w, rank in zip(told.weights, ranks, strict=True))
    optimizer = torch.optim.AdamW(student.parameters(), lr=rate, weight_decay=0.0)
    for step, chosen in enumerate(_batches(protocol, seed)):
        _decay(optimizer, rate, step, protocol.steps)
        optimizer.zero_grad()
        F.mse_loss(student(told.x[chosen]), told.y[chosen]).backward()
        optimizer.step()
    return student


@lru_cache(maxsize=1)  # the budgets of a seed follow on one another, and differ only in the cut
def _full_increments(protocol: Protocol, setting: Setting, rate: float, seed: int) -> list[Tensor]:
    told = problem(protocol, setting.teacher, setting.scale, seed)
    student = _lora(protocol, told, [protocol.initial_rank] * len(told.ranks), rate, seed)
    return [layer.increment() for layer in student.matrices]  # type: ignore[operator]


def _truncated(told: Problem, increments: Sequence[Tensor], total: int) -> Outcome:
    """The ``total`` largest singular values of all increments together stay."""
    if not all(increment.isfinite().all() for increment in increments):
        return Outcome(ResidualMLP(Frozen(w * torch.nan) for w in told.weights), [0] * len(told.weights), {})
    parts = [torch.linalg.svd(increment) for increment in increments]
    order = torch.cat([values for _, values, _ in parts]).argsort(descending=True)
    kept = torch.zeros_like(order, dtype=torch.bool)
    kept[order[:total]] = True
    ranks = kept.view(len(parts), -1).sum(1).tolist()
    cut = [u[:, :r] * s[:r] @ v[:r] for (u, s, v), r in zip(parts, ranks, strict=True)]
    return Outcome(ResidualMLP(Frozen(w + d) for w, d in zip(told.weights, cut, strict=True)), ranks, {})


def _adalora(protocol: Protocol, told: Problem, run: Run, total: int) -> Outcome:
    """The initial rank everywhere until t_i, and ``total`` triplets from T - t_f on."""
    settings, steps = run.setting.adalora, protocol.steps
    if settings is None:
        raise ValueError("adalora: expected settings for method 'adalora', got None")
    gamma = settings.gamma * (told.start if settings.of_loss else 1.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        layers = [_svd_linear(w, protocol.initial_rank, settings.alpha) for w in told.weights]
    student = ResidualMLP(layers)
    first, last = round(settings.init_warmup * steps), round(settings.final_warmup * steps)
    allocator = RankAllocator(
        student, protocol.initial_rank, protocol.uniform_rank(run.budget), first, last, settings.mask_interval,
        beta1=0.85, beta2=0.85, total_step=steps, target_total_rank=total,
    )  # fmt: skip
    adapters = [p for p in student.parameters() if p.requires_grad]
    optimizer = AdaLoraAdamW(adapters, lr=run.rate, weight_decay=0.0, allocator=allocator)
    measured = {"gamma": gamma}
    for step, chosen in enumerate(_batches(protocol, run.seed)):
        _decay(optimizer, run.rate, step, steps)
        optimizer.zero_grad()
        loss = F.mse_loss(student(told.x[chosen]), told.y[chosen])
        if step == first:
            measured["regularizer_to_loss"] = _share(student, loss, gamma)
        (loss + compute_orth_regu(student, gamma) if gamma else loss).backward()
        optimizer.step()
    return Outcome(student, [int(layer.lora_E.count_nonzero()) for layer in layers], measured)


def _svd_linear(weight: Tensor, rank: int, alpha: float) -> SVDLinear:
    layer = SVDLinear(weight.shape[1], weight.shape[0], r=rank, lora_alpha=alpha, bias=False, merge_weights=False)
    layer.weight.data = weight
    return layer


def _share(student: nn.Module, loss: Tensor, gamma: float) -> float:
    """Norm of the orthogonality term's gradient over all A and B as a share of the loss's."""
    factors = [p for name, p in student.named_parameters() if name.endswith(("lora_A", "lora_B"))]
    if not gamma:
        return 0.0
    pulls = torch.autograd.grad(compute_orth_regu(student, gamma), factors)
    wanted = torch.autograd.grad(loss, factors, retain_graph=True)
    return float(torch.cat([g.flatten() for g in pulls]).norm() / torch.cat([g.flatten() for g in wanted]).norm())


__all__ = ["Outcome", "execute"]
