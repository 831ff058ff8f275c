"""The original package's budget algorithm, parameter by parameter in eager PyTorch: an oracle for ours.

Written from the description of QingruZhang/AdaLoRA's RankAllocator in the published code's behaviour: importance after
the optimizer's step, budget as in ``adalora_kernels.allocator.schedule``, ties at the threshold all zeroed. The paper's
variant is the same with importance before the optimizer's step.
"""

from __future__ import annotations

import torch
from torch import Tensor


class OriginalAllocator:
    """One step at a time over explicit copies of parameters and gradients.

    Args:
        names: layer names; every dictionary below is keyed by (layer, "A" | "E" | "B").
        init_warmup, final_warmup, mask_interval, total_step: t_i, t_f, ΔT, T.
        target_total_rank: b^T.
        beta: β₁ = β₂.
        metric: "ipt", or "mag" for |θ|.
        reduction: "mean" or "sum" over a row of A and a column of B.
    """

    def __init__(
        self,
        names: list[str],
        init_warmup: int,
        final_warmup: int,
        mask_interval: int,
        total_step: int,
        target_total_rank: int,
        beta: float = 0.85,
        metric: str = "ipt",
        reduction: str = "mean",
    ) -> None:
        self.names = names
        self.init_warmup, self.final_warmup, self.mask_interval = init_warmup, final_warmup, mask_interval
        self.total_step, self.target, self.beta = total_step, target_total_rank, beta
        self.metric, self.reduction = metric, reduction
        self.average: dict[tuple[str, str], Tensor] = {}
        self.uncertainty: dict[tuple[str, str], Tensor] = {}

    def update(self, params: dict[tuple[str, str], Tensor], grads: dict[tuple[str, str], Tensor]) -> None:
        """Ī and Ū of every parameter."""
        for key, param in params.items():
            sensitivity = (param * grads[key]).abs()
            average = self.average.get(key, torch.zeros_like(param))
            uncertainty = self.uncertainty.get(key, torch.zeros_like(param))
            average = self.beta * average + (1 - self.beta) * sensitivity
            self.uncertainty[key] = self.beta * uncertainty + (1 - self.beta) * (sensitivity - average).abs()
            self.average[key] = average

    def scores(self, params: dict[tuple[str, str], Tensor]) -> dict[str, Tensor]:
        """S of each layer's triplets, [R]."""
        if self.metric == "mag":
            s = {key: param.abs() for key, param in params.items()}
        else:
            s = {key: self.average[key] * self.uncertainty[key] for key in self.average}
        reduce = torch.mean if self.reduction == "mean" else torch.sum
        return {n: s[n, "E"].view(-1) + (reduce(s[n, "A"], 1) + reduce(s[n, "B"], 0)) for n in self.names}

    def schedule(self, step: int, total_rank: int) -> tuple[int, bool]:
        """Budget, and whether to mask."""
        if step <= self.init_warmup:
            return total_rank, False
        if step > self.total_step - self.final_warmup:
            return self.target, True
        left = 1 - (step - self.init_warmup) / (self.total_step - self.final_warmup - self.init_warmup)
        return int(self.target + (total_rank - self.target) * left**3), step % self.mask_interval == 0

    def step(
        self,
        step: int,
        params: dict[tuple[str, str], Tensor],
        grads: dict[tuple[str, str], Tensor],
        scored: dict[tuple[str, str], Tensor] | None = None,
    ) -> tuple[int, float | None, dict[str, Tensor]]:
        """Budget, threshold (None where nothing was ranked), and each layer's live pattern as bool [R] after it.

        ``params`` are changed: E is zeroed where its triplet is pruned. ``scored`` are the parameters whose importance
        is taken where these are others: the paper's are those from before the optimizer's step.
        """
        if step < self.total_step - self.final_warmup:
            self.update(params if scored is None else scored, grads)
        total_rank = sum(params[n, "A"].shape[0] for n in self.names)
        budget, mask = self.schedule(step, total_rank)
        live = {n: torch.ones(params[n, "A"].shape[0], dtype=torch.bool) for n in self.names}
        if not mask or total_rank <= budget:
            return budget, None, live
        scores = self.scores(params)
        threshold = torch.kthvalue(torch.cat([scores[n] for n in self.names]), total_rank - budget).values
        for n in self.names:
            live[n] = scores[n] > threshold
            params[n, "E"].masked_fill_(~live[n].view(-1, 1), 0.0)
        return budget, threshold.item(), live


__all__ = ["OriginalAllocator"]
