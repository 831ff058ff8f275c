"""Importance of parameters that are sharded over ranks (FSDP2, ZeRO): each keeps Ī and Ū of its own elements alone.

A triplet's score is a sum over elements, S_i = s(E_i) + Σ_k s(A_ik)/K + Σ_j s(B_ji)/N. Every rank adds up what it
holds, and one all-reduce of total rank + 1 numbers for the whole model, the last of which says whether all gradients
were finite, makes the scores. Threshold and pattern follow alike on every rank, and each masks its own part of E.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from adalora_kernels.allocator.state import ScatteredState
from adalora_kernels.backends.select import Backend
from adalora_kernels.ops.allocation import zero_pruned
from adalora_kernels.ops.checks import floating_state_dtype
from adalora_kernels.ops.importance import importance_update, triplet_scores
from adalora_kernels.ops.shards import Rectangle, Shards, local_part
from adalora_kernels.reference.importance import TripletLayout, magnitude_scores

_A, _E, _B = range(3)
_OWN_TENSORS = ("_partial", "_zeros", "whole_E", "_places", "_places_E")


class _Block(NamedTuple):
    """One rectangle that lies on this rank.

    Attributes:
        matrix: its number among A₀, E₀, B₀, A₁, …
        rectangle: where it lies in that.
        start: where it lies in this rank's part of that, flat.
        order: which of that part's rectangles it is.
    """

    matrix: int
    rectangle: Rectangle
    start: int
    order: int

    @property
    def kind(self) -> int:
        """Of which kind the matrix is: A, E or B."""
        return self.matrix % 3

    @property
    def triplets(self) -> tuple[int, int]:
        """The first of the layer's triplets that it has elements of, and their number."""
        row, column, rows, columns = self.rectangle
        return (column, columns) if self.kind == _B else (row, rows)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(R, K, N) of the layer that it makes, with other matrices of 1 element per triplet."""
        _, _, rows, columns = self.rectangle
        return {_A: (rows, columns, 1), _E: (rows, 1, 1), _B: (columns, 1, rows)}[self.kind]

    def of(self, part: Tensor) -> Tensor:
        """Its view of this rank's part of the matrix, [rows, columns]."""
        _, _, rows, columns = self.rectangle
        return part.view(-1)[self.start : self.start + rows * columns].view(rows, columns)


class ShardedState(ScatteredState):
    """``ImportanceState`` of the elements that lie on this rank; scores and pattern are the whole model's.

    To the kernels each rectangle that lies here is a layer of its own, whose other two matrices are zeros that have no
    gradient. What ``current``, ``set_current``, ``state_dict`` and ``load_state_dict`` give and take is the whole
    model's, so that a checkpoint fits any number of ranks. All ranks must call these methods together, but for
    ``set_current`` and ``load_state_dict``.

    Args:
        layout: of the whole model.
        shards: of A, E, B of each layer in turn.
        parts: what lies here of each of them.
    """

    def __init__(self, layout: TripletLayout, shards: Shards, parts: Sequence[Tensor]) -> None:
        device, dtype = parts[0].device, floating_state_dtype(list(parts))
        self.layout, self.shards = layout, shards
        self._blocks = list(_blocks(shards))
        self._local = TripletLayout(tuple(b.shape for b in self._blocks))
        self.averages = torch.zeros(2, 2, self._local.total_elements, dtype=dtype, device=device)
        self.half = torch.zeros(1, dtype=torch.int32, device=device)
        self.scores = self.averages.new_zeros(layout.total_rank)
        self.live = torch.ones(layout.total_rank, dtype=torch.bool, device=device)
        self.updates = 0
        self.settled = False
        self.threshold = None
        self._partial = self.averages.new_zeros(self._local.total_rank)
        self._zeros = self.averages.new_zeros(max((r for r, _, _ in self._local.shapes), default=0))
        self.whole_E = self.averages.new_zeros(layout.total_rank, 1)
        # No two of a rank's numbers go to one place: a triplet gets one from each kind and rectangle.
        orders = 1 + max((b.order for b in self._blocks), default=0)
        self._terms = 3 * orders
        terms = [(b.kind * orders + b.order) * layout.total_rank for b in self._blocks]
        triplets = [self._triplets(b) for b in self._blocks]
        self._places = _joined([t + at for t, at in zip(triplets, terms, strict=True)], device)
        self._places_E = _joined([t for t, b in zip(triplets, self._blocks, strict=True) if b.kind == _E], device)
        self._shares = {
            reduction: _joined(
                [torch.full((b.triplets[1],), self._share(b, reduction), dtype=dtype) for b in self._blocks], device
            )
            for reduction in ("mean", "sum")
        }

    def _triplets(self, block: _Block) -> Tensor:
        first, count = block.triplets
        return torch.arange(first, first + count) + self.layout.rank_offsets[block.matrix // 3]

    def _share(self, block: _Block, reduction: str) -> float:
        """What a block's own mean, or sum, is multiplied by."""
        if not self.shards.owned[block.matrix]:
            return 0.0
        if reduction == "sum":
            return 1.0
        rows, columns = self.shards.shapes[block.matrix]
        return block.rectangle.rows / rows if block.kind == _B else block.rectangle.columns / columns

    @torch.no_grad()
    def update(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        beta1: float,
        beta2: float,
        backend: Backend | None,
    ) -> Tensor:
        """As ``ImportanceState.update``, of DTensors or of what this rank holds; with one all-reduce."""
        before = self.half.clone()
        taken = torch.ones(1, dtype=torch.bool, device=before.device)
        if self._blocks:
            layers = self._as_layers(params, grads)
            taken = importance_update(
                self._local, *layers, self.averages, self.half, self._partial, beta1, beta2, backend=backend
            )
        sums = self._summed(self._partial, "mean", (~taken).to(self.scores.dtype))
        finite = sums[-1:] == 0
        # A rank without an overflow of its own has gone to the other half; going back undoes it.
        self.half.copy_(torch.where(finite, self.half, before))
        self.scores.copy_(torch.where(finite, sums[:-1], self.scores))
        return finite

    def _as_layers(
        self, params: Sequence[Tensor], grads: Sequence[Tensor | None]
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """A, E, B of each block as the layer that it is to the kernels, and their gradients."""
        parts, grad_parts = map(local_part, params), (None if g is None else local_part(g) for g in grads)
        held = list(zip(parts, grad_parts, strict=True))
        layers: list[Tensor] = []
        layer_grads: list[Tensor | None] = []
        for block in self._blocks:
            column = self._zeros[: block.triplets[1]].view(-1, 1)
            layer: list[Tensor] = [column, column, column.t()]
            layer_grad: list[Tensor | None] = [None, None, None]
            part, grad_part = held[block.matrix]
            layer[block.kind] = block.of(part)
            layer_grad[block.kind] = None if grad_part is None else block.of(grad_part)
            layers += layer
            layer_grads += layer_grad
        return layers, layer_grads

    def _summed(self, scores: Tensor, reduction: str, *flags: Tensor) -> Tensor:
        """S of the whole model's triplets from those of the blocks, then the flags, summed over the ranks."""
        terms = self.scores.new_zeros(self._terms * self.layout.total_rank)
        terms[self._places] = scores * self._shares[reduction]
        return self.shards.total(torch.cat([terms.view(self._terms, -1).sum(0), *flags]))

    @torch.no_grad()
    def other_scores(self, metric: str, reduction: str, params: Sequence[Tensor]) -> Tensor:
        """As ``ImportanceState.other_scores``; an all-reduce."""
        if not self._blocks:
            scores = self._partial
        elif metric == "mag":
            scores = magnitude_scores(self._local, self._as_layers(params, [None] * len(params))[0], reduction)
        else:
            scores = triplet_scores(self._local, *super().current(), reduction)
        return self._summed(scores, reduction)

    @torch.no_grad()
    def zero_where_it_lies(self, live: Tensor, lora_E: Sequence[Tensor], backend: Backend | None) -> None:
        """As ``ScatteredState.zero_where_it_lies``."""
        parts = [local_part(E) for E in lora_E]
        held = [b.of(parts[b.matrix // 3]) for b in self._blocks if b.kind == _E]
        zero_pruned(live[self._places_E], held, backend=backend)

    def current(self) -> tuple[Tensor, Tensor]:
        """Ī and Ū of the whole model, flat [elements]; two all-reduces."""
        average, uncertainty = (
            torch.cat([m.reshape(-1) for m in self.shards.whole(self._held(flat))]) for flat in super().current()
        )
        return average, uncertainty

    def _held(self, flat: Tensor) -> list[Tensor]:
        """This rank's part of each matrix, out of flat averages."""
        parts: list[list[Tensor]] = [[] for _ in self.shards.shapes]
        for at, block in zip(self._offsets(), self._blocks, strict=True):
            parts[block.matrix].append(flat[at : at + block.rectangle.size])
        return [torch.cat(pieces) if pieces else flat[:0] for pieces in parts]

    def _offsets(self) -> list[int]:
        """Where each block's own matrix lies in the averages."""
        return [self._local.offsets[3 * i + b.kind] for i, b in enumerate(self._blocks)]

    @torch.no_grad()
    def set_current(self, average: Tensor, uncertainty: Tensor) -> None:
        """Put Ī and Ū of the whole model, flat [elements], and score the triplets by them."""
        self.half.zero_()
        for target, source in ((self.averages[0, 0], average), (self.averages[0, 1], uncertainty)):
            for at, block in zip(self._offsets(), self._blocks, strict=True):
                offset, shape = self.layout.offsets[block.matrix], self.shards.shapes[block.matrix]
                whole = source[offset : offset + shape[0] * shape[1]].view(shape)
                target[at : at + block.rectangle.size] = block.rectangle.of(whole).reshape(-1).to(target)
        self._partial.copy_(triplet_scores(self._local, self.averages[0, 0], self.averages[0, 1]))
        self.scores.copy_(triplet_scores(self.layout, average, uncertainty))

    def lies_beside(self, lora_E: Sequence[Tensor]) -> bool:
        """As ``ImportanceState.lies_beside``."""
        return self.live.device == lora_E[0].device

    def move_to(self, device: torch.device) -> None:
        """Follow the parameters to another device."""
        for name in ("averages", "half", "scores", "live", *_OWN_TENSORS):
            setattr(self, name, getattr(self, name).to(device))
        self.threshold = None if self.threshold is None else self.threshold.to(device)
        self._shares = {reduction: shares.to(device) for reduction, shares in self._shares.items()}


def _blocks(shards: Shards) -> Iterator[_Block]:
    for matrix, rectangles in enumerate(shards.rectangles):
        start = 0
        for order, rectangle in enumerate(rectangles):
            if rectangle.size:
                yield _Block(matrix, rectangle, start, order)
            start += rectangle.size


def _joined(tensors: list[Tensor], device: torch.device) -> Tensor:
    return torch.cat(tensors).to(device) if tensors else torch.zeros(0, dtype=torch.int64, device=device)


__all__ = ["ShardedState"]
