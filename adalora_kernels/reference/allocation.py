"""The rank budget: keep the highest-scoring triplets of the whole model, zero the rest (AdaLoRA, equation 6)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def mask_to_budget(
    scores: Tensor, lora_E: Sequence[Tensor], budget: int | Tensor, live: Tensor, enabled: Tensor | None = None
) -> Tensor:
    """Zero E wherever its triplet's score is at or below the (total - budget)-th smallest score of the model.

    Ties at the threshold all die, so at most ``budget`` triplets stay, exactly ``budget`` where scores are distinct. A
    budget of at least the total rank is nothing to prune. No host sync.

    Args:
        scores: [total_rank], finite.
        lora_E: the [R, 1] singular values of each layer, in the order of the scores. Updated in place.
        budget: number of triplets that may stay, ≥ 0: a number, or one integer on the scores' device.
        live: bool [total_rank], set to the pattern that results. Updated in place.
        enabled: bool [1] or None; where False, neither E nor ``live`` changes (an overflow step).

    Returns:
        The threshold, 0-d, -inf where there is nothing to prune.
    """
    threshold = _threshold(scores, budget)
    alive = scores > threshold
    live.copy_(alive if enabled is None else torch.where(enabled, alive, live))
    zero_pruned(live if enabled is None else live | ~enabled, lora_E)
    return threshold


def _threshold(scores: Tensor, budget: int | Tensor) -> Tensor:
    """The (total - budget)-th smallest score, or -inf."""
    none = scores.new_full((), -torch.inf)
    prune = scores.numel() - budget
    if isinstance(prune, Tensor):
        if not scores.numel():
            return none
        prune = prune.reshape(1)
        at = (prune - 1).clamp(0, scores.numel() - 1)
        threshold = scores.sort().values.index_select(0, at)
        return torch.where(prune > 0, threshold, none).view(())
    return torch.kthvalue(scores, prune).values if prune > 0 else none


def zero_pruned(live: Tensor, lora_E: Sequence[Tensor]) -> None:
    """Zero E wherever ``live`` (bool [total_rank]) is False, in place."""
    offset = 0
    for e in lora_E:
        e.masked_fill_(~live[offset : offset + e.numel()].view(e.shape), 0.0)
        offset += e.numel()


__all__ = ["mask_to_budget", "zero_pruned"]
