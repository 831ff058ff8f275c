"""Held-out pair accuracy: is this the right summary for this signature?

A pair is accepted where the cosine of its two embeddings is above a threshold. Every signature is asked about its own
summary and about all the others; the two kinds of question weigh the same, so that always answering the majority is
right in half of the cases.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adalora_kernels.cli.demo.model import EncodedPairs

MAJORITY = 0.5
_CHUNK = 256


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error, both as fractions."""

    mean: float
    standard_error: float

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f} ± {100 * self.standard_error:.1f} %"


@torch.no_grad()
def pair_scores(model: nn.Module, pairs: EncodedPairs) -> Tensor:
    """Cosine of each signature (row) with each summary (column), [n, n]; the diagonal holds the right ones."""
    training = model.training
    model.eval()
    signatures, summaries = (_embed(model, ids, mask) for ids, mask in zip(pairs.ids, pairs.mask, strict=True))
    model.train(training)
    return signatures @ summaries.t()


def _embed(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    lengths = mask.sum(1)
    # Texts of like length together, so that little of the work is padding.
    order = lengths.argsort(stable=True)
    parts = []
    for index in order.split(_CHUNK):
        longest = int(lengths[index].max())
        parts.append(model(input_ids=ids[index, :longest], attention_mask=mask[index, :longest]).embeddings)
    return torch.cat(parts)[order.argsort()]


def correctness(scores: Tensor, threshold: float) -> Tensor:
    """For each signature the share of right answers, [n] in fp64: half for its own summary, half for all the others."""
    n = len(scores)
    rejected = (scores <= threshold).double()
    others = (rejected.sum(1) - rejected.diagonal()) / (n - 1)
    return (1 - rejected.diagonal() + others) / 2


def best_threshold(scores: Tensor) -> float:
    """The threshold of the best accuracy on these pairs, on a grid of 1/200."""
    grid = torch.linspace(-1, 1, 401).tolist()
    return max(grid, key=lambda threshold: correctness(scores, threshold).mean().item())


def estimate(values: Tensor) -> Estimate:
    """Mean of [n] values, with the standard error over signatures."""
    return Estimate(values.mean().item(), values.std().item() / math.sqrt(len(values)))


def judge(model: nn.Module, calibration: EncodedPairs, held_out: EncodedPairs) -> Tensor:
    """Share of right answers of each held-out signature, [n], at the calibration pairs' best threshold."""
    return correctness(pair_scores(model, held_out), best_threshold(pair_scores(model, calibration)))


__all__ = ["MAJORITY", "Estimate", "best_threshold", "correctness", "estimate", "judge", "pair_scores"]
