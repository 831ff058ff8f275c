"""Sensitivity × uncertainty of every element, and the score of every singular triplet (AdaLoRA, equations 8–10 and 11).

For an element θ with gradient g: I = |θ g|, Ī ← β₁ Ī + (1-β₁) I, Ū ← β₂ Ū + (1-β₂) |I - Ī| with the new Ī, s = Ī Ū.
For a triplet i: S_i = s(E_i) + mean_k s(A_ik) + mean_j s(B_ji). The original code has options: sums for the means, and
|θ| for s(θ).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class TripletLayout:
    """Where the parameters of n layers lie in the flat averages, and their triplets in the score vector.

    Parameters are ordered A₀, E₀, B₀, A₁, E₁, B₁, …; each is stored row-major.

    Attributes:
        shapes: (R, K, N) of each layer.
    """

    shapes: tuple[tuple[int, int, int], ...]

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of elements of each of the 3n parameters."""
        return tuple(size for r, k, n in self.shapes for size in (r * k, r, n * r))

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Offset of each of the 3n parameters in the flat averages, then the total."""
        return (0, *accumulate(self.sizes))

    @cached_property
    def rank_offsets(self) -> tuple[int, ...]:
        """Offset of each layer's triplets in the score vector, then the total rank."""
        return (0, *accumulate(r for r, _, _ in self.shapes))

    @property
    def total_elements(self) -> int:
        """Number of elements of all parameters."""
        return self.offsets[-1]

    @property
    def total_rank(self) -> int:
        """Number of triplets of the whole model."""
        return self.rank_offsets[-1]


REDUCTIONS = ("mean", "sum")


def triplet_scores(layout: TripletLayout, average: Tensor, uncertainty: Tensor, reduction: str = "mean") -> Tensor:
    """S of every triplet, [total_rank], from the flat averages Ī and Ū, both [total_elements].

    ``reduction`` says what becomes of the scores of A's rows and B's columns: "mean", or "sum".
    """
    return _combine(layout, average * uncertainty, reduction)


def magnitude_scores(layout: TripletLayout, params: Sequence[Tensor], reduction: str = "mean") -> Tensor:
    """S of every triplet with |θ| in place of s(θ), [total_rank] (the original code's metric ``mag``)."""
    dtype = torch.float64 if any(p.dtype == torch.float64 for p in params) else torch.float32
    return _combine(layout, torch.cat([p.detach().reshape(-1).abs().to(dtype) for p in params]), reduction)


def _combine(layout: TripletLayout, elements: Tensor, reduction: str) -> Tensor:
    reduce = {"mean": torch.mean, "sum": torch.sum}[reduction]
    scores = elements.new_empty(layout.total_rank)
    for i, (r, k, n) in enumerate(layout.shapes):
        if r == 0:
            continue
        a, e, b = (elements[layout.offsets[j] : layout.offsets[j + 1]] for j in range(3 * i, 3 * i + 3))
        total = e + (reduce(a.view(r, k), 1) + reduce(b.view(n, r), 0))
        scores[layout.rank_offsets[i] : layout.rank_offsets[i + 1]] = total
    return scores


def importance_update(
    layout: TripletLayout,
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    state: Tensor,
    half: Tensor,
    scores: Tensor,
    beta1: float,
    beta2: float,
) -> Tensor:
    """One step of the averages of all layers, without a host sync.

    The averages live in a ping-pong pair: the update reads ``state[half]`` and writes ``state[1 - half]``; only if
    every new s = Ī Ū is finite are ``half`` flipped and ``scores`` replaced. A step with a gradient that is not finite,
    or so large that its importance overflows, therefore leaves no trace.

    Args:
        layout: where everything lies.
        params: the 3n parameters in the layout's order, any floating dtype.
        grads: their gradients; None leaves that parameter's averages as they are.
        state: [2, 2, total_elements] (half; Ī or Ū; element) in fp32, or fp64 for fp64 parameters. Updated in place.
        half: int32 [1], which half is current. Updated in place.
        scores: [total_rank] in the dtype of ``state``. Updated in place.
        beta1, beta2: the two smoothing factors, in (0, 1).

    Returns:
        bool [1]: whether everything was finite, that is, whether the update was taken.

    Raises:
        ValueError: a parameter, gradient, or the state does not fit the layout. Nothing changes.
    """
    _check_arguments(layout, params, grads, state, half, scores)
    current = half.to(torch.int64)
    old = state.index_select(0, current)[0]
    new = old.clone()
    finite = torch.ones(1, dtype=torch.bool, device=state.device)
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        if grad is None or param.numel() == 0:
            continue
        average, uncertainty = new[:, layout.offsets[i] : layout.offsets[i + 1]]
        g = grad.detach().reshape(-1).to(state.dtype)
        sensitivity = (param.detach().reshape(-1).to(state.dtype) * g).abs()
        average.mul_(beta1).add_(sensitivity, alpha=1 - beta1)
        uncertainty.mul_(beta2).add_((sensitivity - average).abs(), alpha=1 - beta2)
        finite &= torch.isfinite(average * uncertainty).all()
    state.index_copy_(0, 1 - current, new.unsqueeze(0))
    scores.copy_(torch.where(finite, triplet_scores(layout, new[0], new[1]), scores))
    half.copy_(torch.where(finite, 1 - half, half))
    return finite


class OrthogonalityShare(NamedTuple):
    """What the orthogonality term adds to the gradients of one layer; see ``reference.orthogonality``.

    Attributes:
        slopes: of all matrices.
        offset_A, offset_B: where this layer's A and B begin in them.
        scale: the gradient of the term's value, one element.
    """

    slopes: Tensor
    offset_A: int
    offset_B: int
    scale: Tensor


def importance_layer(
    layout: TripletLayout,
    layer: int,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    term: OrthogonalityShare | None,
    state: Tensor,
    half: Tensor,
    scores: Tensor,
    finite: Tensor,
    beta1: float,
    beta2: float,
) -> None:
    """One layer's share of ``importance_update``, for its backward. Nothing is flipped.

    When all layers have had theirs, the caller flips ``half`` if ``finite`` holds everywhere, and takes ``scores``.

    Args:
        layout, state, half, beta1, beta2: as in ``importance_update``; ``state[1 - half]`` is written in this layer's
            range.
        layer: its number in the layout.
        params, grads: A, E, B of the layer and their gradients, contiguous. The gradients of A and B are updated in
            place where there is a ``term``.
        term: what the orthogonality term adds to them first.
        scores: [total_rank]; this layer's are written where all is finite.
        finite: bool [layers]; this layer's is written.
    """
    if term is not None:
        slopes, offset_A, offset_B, scale = term
        for matrix, grad, offset, is_A in (
            (params[0], grads[0], offset_A, True),
            (params[2], grads[2], offset_B, False),
        ):
            rows = (matrix if is_A else matrix.t()).detach().to(slopes.dtype)
            slope = slopes[offset : offset + rows.shape[0] ** 2].view(rows.shape[0], rows.shape[0])
            share = (scale.to(slopes.dtype) * slope) @ rows
            grad.copy_(grad.to(slopes.dtype) + (share if is_A else share.t()))
    (r, k, n), first = layout.shapes[layer], layout.offsets[3 * layer]
    own, size = TripletLayout(((r, k, n),)), r * (k + 1 + n)
    pair = state[:, :, first : first + size].clone()
    own_half, own_scores = half.clone(), scores.new_empty(r)
    taken = importance_update(own, params, grads, pair, own_half, own_scores, beta1, beta2)
    other = 1 - half.to(torch.int64)
    state[:, :, first : first + size].index_copy_(0, other, pair.index_select(0, other))
    begin = layout.rank_offsets[layer]
    scores[begin : begin + r] = torch.where(taken, own_scores, scores[begin : begin + r])
    finite[layer : layer + 1] = taken


def _check_arguments(
    layout: TripletLayout,
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    state: Tensor,
    half: Tensor,
    scores: Tensor,
) -> None:
    if len(params) != len(layout.sizes) or len(grads) != len(params):
        raise ValueError(f"params, grads: expected {len(layout.sizes)} each, got {len(params)} and {len(grads)}")
    if state.shape != (2, 2, layout.total_elements):
        raise ValueError(f"state: expected [2, 2, {layout.total_elements}], got {list(state.shape)}")
    if scores.shape != (layout.total_rank,) or half.shape != (1,):
        raise ValueError(
            f"scores, half: expected [{layout.total_rank}] and [1], got {list(scores.shape)} and {list(half.shape)}"
        )
    for i, (param, grad, size) in enumerate(zip(params, grads, layout.sizes, strict=True)):
        if param.numel() != size or param.device != state.device:
            raise ValueError(
                f"params[{i}]: expected {size} elements on {state.device}, got {list(param.shape)} on {param.device}"
            )
        if grad is not None and (grad.shape != param.shape or grad.device != state.device):
            raise ValueError(
                f"grads[{i}]: expected {list(param.shape)} on {state.device}, got {list(grad.shape)} on {grad.device}"
            )


__all__ = [
    "REDUCTIONS",
    "OrthogonalityShare",
    "TripletLayout",
    "importance_layer",
    "importance_update",
    "magnitude_scores",
    "triplet_scores",
]
