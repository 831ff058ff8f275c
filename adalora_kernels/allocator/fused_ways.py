"""Where a backward updates importance: after it has made a layer's gradients, or in the stage that finishes them.

On the CPU a layer's gradients are read once more, while they are in the cache. On a GPU they are taken in registers,
and the host never looks at a value: where a gradient may have been written to behind its back, the launch before the
optimizer's step finds out (``reference.handover``).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from adalora_kernels.backends.select import Backend, select
from adalora_kernels.ops.importance import (
    LayerImportance,
    OrthogonalityShare,
    finisher_of,
    hands_over,
    importance_handed_over,
    importance_layer,
)
from adalora_kernels.reference.handover import new_handover, slots_of, sum_offsets

if TYPE_CHECKING:
    from adalora_kernels.allocator.engine import BudgetEngine


class Planned(NamedTuple):
    """What a layer's backward is to be taken with.

    Attributes:
        before: the gradients of A, E, B that are there already.
        term: the layer's share of the orthogonality term.
    """

    before: Sequence[Tensor | None]
    term: OrthogonalityShare | None


class Way(Protocol):
    """How one allocator's layers are taken.

    Attributes:
        piecewise: whether the launch before the step can do some parameters over, and leave the others.
    """

    piecewise: bool

    def begin(self, layer: int, planned: Planned) -> LayerImportance | None:
        """What the stage that finishes the layer's gradients is to update, if it is that."""

    def take(
        self, layer: int, params: Sequence[Tensor], grads: Sequence[Tensor], planned: Planned
    ) -> Sequence[Tensor | None]:
        """The gradients are there; returns the values by which each is known again, None where the device does."""

    def commit(self, params: Sequence[Tensor], known: list[bool]) -> Tensor:
        """Take over what is left of the ``known`` gradients; bool [1], whether all was finite."""

    def redone(self) -> list[int]:
        """Layers of which the last ``commit`` found other gradients than the host knew of. Waits for the device."""


class AfterTheGradients:
    """Reads a layer's gradients once more."""

    piecewise = False

    def __init__(self, engine: BudgetEngine) -> None:
        self._engine = engine
        scores = engine.importance.scores
        self._scores = torch.zeros_like(scores)
        self._finite = torch.zeros(len(engine.triplets), dtype=torch.bool, device=scores.device)

    def begin(self, layer: int, planned: Planned) -> LayerImportance | None:
        """As ``Way``."""
        return None

    def take(
        self, layer: int, params: Sequence[Tensor], grads: Sequence[Tensor], planned: Planned
    ) -> Sequence[Tensor | None]:
        """As ``Way``; the values are those of the first rows."""
        totals = [g if b is None else b + g for g, b in zip(grads, planned.before, strict=True)]
        engine, state = self._engine, self._engine.importance
        importance_layer(
            state.layout,
            layer,
            params,
            totals,
            planned.term,
            state.averages,
            state.half,
            self._scores,
            self._finite,
            engine.beta1,
            engine.beta2,
            backend=engine.backend,
        )
        return [total[:1].clone() for total in totals]

    def commit(self, params: Sequence[Tensor], known: list[bool]) -> Tensor:
        """As ``Way``; all are known."""
        state = self._engine.importance
        finite = self._finite.all().reshape(1)
        state.half.copy_(torch.where(finite, 1 - state.half, state.half))
        state.scores.copy_(torch.where(finite, self._scores, state.scores))
        return finite

    def redone(self) -> list[int]:
        """As ``Way``."""
        return []


class InTheLastStage:
    """Asks the stage that finishes a layer's gradients."""

    piecewise = True

    def __init__(self, engine: BudgetEngine, backend: Backend) -> None:
        self._engine = engine
        self._finisher = finisher_of(backend)
        layout = engine.importance.layout
        self._handover = new_handover(layout, engine.importance.scores.device)
        pieces = zip(pairwise(sum_offsets(layout)), slots_of(layout), strict=True)
        self._sums = [self._handover.sums[a:b].view(slots, -1) for (a, b), slots in pieces]
        self._probes = self._handover.probes.view(len(self._sums), 3, -1).unbind(0)

    def begin(self, layer: int, planned: Planned) -> LayerImportance | None:
        """As ``Way``."""
        engine, state = self._engine, self._engine.importance
        return LayerImportance(
            state.averages,
            state.half,
            state.layout.offsets[3 * layer],
            planned.before,
            planned.term,
            self._sums[layer],
            self._probes[layer],
            engine.beta1,
            engine.beta2,
            self._finisher,
        )

    def take(
        self, layer: int, params: Sequence[Tensor], grads: Sequence[Tensor], planned: Planned
    ) -> Sequence[Tensor | None]:
        """As ``Way``."""
        return (None, None, None)

    def commit(self, params: Sequence[Tensor], known: list[bool]) -> Tensor:
        """As ``Way``."""
        engine, state = self._engine, self._engine.importance
        return importance_handed_over(
            state.layout,
            params,
            [p.grad for p in params],
            self._handover,
            known,
            state.averages,
            state.half,
            state.scores,
            engine.beta1,
            engine.beta2,
            backend=engine.backend,
        )

    def redone(self) -> list[int]:
        """As ``Way``."""
        return self._handover.redone.view(-1, 3).any(1).nonzero().flatten().tolist()


def way_of(engine: BudgetEngine) -> Way:
    """The way of the backend that updates this engine's importance."""
    scores = engine.importance.scores
    chosen = select("importance", scores.device.type, scores.dtype, 0, engine.backend).backend
    in_the_last_stage = hands_over(chosen, scores.device.type)
    return InTheLastStage(engine, chosen) if in_the_last_stage else AfterTheGradients(engine)


__all__ = ["AfterTheGradients", "InTheLastStage", "Planned", "Way", "way_of"]
