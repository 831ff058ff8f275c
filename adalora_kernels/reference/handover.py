"""Importance on the way out of a backward: what the stage that finishes a layer's gradients gets, does and leaves.

Having summed a tile of dA, dE or dB, and rounded it to the parameter's dtype, that stage

1. adds the layer's share of the orthogonality term where there is one, rounds again, and stores the gradient: what
   autograd gets;
2. adds that to the gradient which was there before, as autograd will, and rounds;
3. updates Ī and Ū with it (``reference.importance``): reads the current half, writes the other one;
4. leaves Σ s = Σ Ī Ū of each triplet over every ``POSITIONS`` columns of A or rows of B, and of E's element: NaN where
   some s is not finite;
5. leaves ``PROBES`` elements of each gradient, as it now is, in fp32.

Nothing is flipped, and nothing is counted: the stage may run again with other gradients (the next micro-batch), or for
nothing. One launch before the optimizer's step takes of each parameter either what is left here or, where the gradient
is no longer the one that was seen (the host knows of a write, or a probe differs), its gradient, from the half that was
current all the time. Then it scores, and flips if all was finite.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from adalora_kernels.reference.importance import OrthogonalityShare, TripletLayout
from adalora_kernels.reference.svd_linear import Adapter

POSITIONS = 8  # columns of A or rows of B to a sum; of one sector, 32 bytes, in fp32
PROBES = 64


class Handover(NamedTuple):
    """What the backwards of a model leave for the launch before the optimizer's step.

    Attributes:
        sums: fp32, of each layer [slots of A + 1 + slots of B, R], a slot for ``POSITIONS`` positions, E between them.
        probes: fp32 [3n, PROBES], as ``probes_of``.
        redone: int32 [3n]; written by the launch: whether a parameter's probes differed.
    """

    sums: Tensor
    probes: Tensor
    redone: Tensor


class Finisher(Protocol):
    """Another backend's stage."""

    def __call__(
        self, t: Tensor, da_shares: Tensor, adapter: Adapter, importance: LayerImportance, ticket: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dA, dE and dB, contiguous.

        Args:
            t: contiguous fp32 [slabs, N, at least R], each slab's share of T = gᵀ u.
            da_shares: likewise [slabs, K, at least R] of dAᵀ.
            adapter: of the layer.
            importance: to be updated.
            ticket: int32, 0 in its first element, and again once the stage has run.
        """


@dataclass
class LayerImportance:
    """What the stage that finishes one layer's gradients needs besides these.

    Attributes:
        state, half: of all layers, as in ``importance_update``. ``state[1 - half]`` is written in this layer's range.
        first: where this layer's A begins in the flat averages; E and B follow.
        before: the gradients of A, E and B that were there before, contiguous and in their parameters' dtypes, or None.
        term: what the orthogonality term adds to the new gradients.
        sums, probes: this layer's of ``Handover``: [slots, R] and [3, PROBES].
        beta1, beta2: the smoothing factors.
        finisher: who finishes the gradients in the place of the layer's own backend, if not that itself.
        done: set by the launcher of the stage; a backward without low-rank sums never comes to it.

    The parameters are contiguous and of 16 or 32 bits, and all three gradients are asked for.
    """

    state: Tensor
    half: Tensor
    first: int
    before: Sequence[Tensor | None]
    term: OrthogonalityShare | None
    sums: Tensor
    probes: Tensor
    beta1: float
    beta2: float
    finisher: Finisher | None = None
    done: bool = False

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All that the stage reads and writes of it."""
        slopes, scale = (None, None) if self.term is None else (self.term.slopes, self.term.scale)
        return (*self.before, slopes, scale, self.state, self.half, self.sums, self.probes)

    @property
    def numbers(self) -> tuple[int, int, int, float, float]:
        """Where this layer's slopes of A and B and its averages begin, and the smoothing factors."""
        offsets = (0, 0) if self.term is None else (self.term.offset_A, self.term.offset_B)
        return (*offsets, self.first, float(self.beta1), float(self.beta2))


def slots_of(layout: TripletLayout) -> list[int]:
    """How many sums of each triplet every layer has."""
    return [-(-k // POSITIONS) + 1 + -(-n // POSITIONS) for _, k, n in layout.shapes]


def sum_offsets(layout: TripletLayout) -> list[int]:
    """Where each layer's sums begin, then their number."""
    return [0, *accumulate(r * slots for (r, _, _), slots in zip(layout.shapes, slots_of(layout), strict=True))]


def new_handover(layout: TripletLayout, device: torch.device) -> Handover:
    """Room for what the backwards of these layers leave."""
    return Handover(
        torch.zeros(sum_offsets(layout)[-1], dtype=torch.float32, device=device),
        torch.zeros(3 * len(layout.shapes), PROBES, dtype=torch.float32, device=device),
        torch.zeros(3 * len(layout.shapes), dtype=torch.int32, device=device),
    )


def probes_of(grads: Sequence[Tensor]) -> Tensor:
    """The elements of dA [R, K], dE [R, 1] and dB [N, R] that tell whether they were written to, fp32 [3, PROBES].

    Probe i lies at position i · max(length // PROBES, 1), if there is one (else it is NaN), and at triplet i mod R:
    spread over the positions, and of all triplets, since a pruned one's elements of dA and dB are 0, which no loss
    scale changes.
    """
    dA, dE, dB = grads
    found = torch.full((3, PROBES), torch.nan, dtype=torch.float32, device=dA.device)
    for part, (matrix, length) in enumerate(((dA, dA.shape[1]), (dE.view(1, -1), dE.numel()), (dB.t(), dB.shape[0]))):
        i = torch.arange(min(PROBES, length), device=dA.device)
        if matrix.numel():
            found[part, : len(i)] = matrix[i % matrix.shape[0], i * max(length // PROBES, 1)].float()
    return found


__all__ = [
    "POSITIONS",
    "PROBES",
    "Finisher",
    "Handover",
    "LayerImportance",
    "new_handover",
    "probes_of",
    "slots_of",
    "sum_offsets",
]
