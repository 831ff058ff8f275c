"""The rank budget: keep the highest-scoring triplets of the whole model, zero the rest (AdaLoRA, equation 6)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def mask_to_budget(
    scores: Tensor, lora_E: Sequence[Tensor], budget: int, live: Tensor, enabled: Tensor | None = None
) -> Tensor:
    """Zero E wherever its triplet's score is at or below the (total - budget)-th smallest score of the model.

    Ties at the threshold all die, so at most ``budget`` triplets stay, exactly ``budget`` where scores are distinct. A
    budget of at least the total rank is nothing to prune. No host sync.

    Args:
        scores: [total_rank], finite.
        lora_E: the [R, 1] singular values of each layer, in the order of the scores. Updated in place.
        budget: number of triplets that may stay, ≥ 0.
        live: bool [total_rank], set to the pattern that results. Updated in place.
        enabled: bool [1] or None; where False, neither E nor ``live`` changes (an overflow step).

    Returns:
        The threshold, 0-d, -inf where there is nothing to prune.
    """
    prune = scores.numel() - budget
    if prune <= 0:
        threshold = scores.new_full((), -torch.inf)
    else:
        threshold = torch.kthvalue(scores, prune).values
    alive = scores > threshold
    live.copy_(alive if enabled is None else torch.where(enabled, alive, live))
    zero_pruned(live if enabled is None else live | ~enabled, lora_E)
    return threshold


def zero_pruned(live: Tensor, lora_E: Sequence[Tensor]) -> None:
    """Zero E wherever ``live`` (bool [total_rank]) is False, in place."""
    offset = 0
    for e in lora_E:
        e.masked_fill_(~live[offset : offset + e.numel()].view(e.shape), 0.0)
        offset += e.numel()


__all__ = ["mask_to_budget", "zero_pruned"]
