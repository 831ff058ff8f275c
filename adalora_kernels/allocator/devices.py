"""Importance of layers that lie on several devices (``device_map="auto"``, a pipeline by hand): a bucket for each.

A bucket is the ``ImportanceState`` of one device's layers: its averages lie beside the parameters, and one launch there
updates them. What is the whole model's (scores, pattern, threshold, and which half of the averages is current) lies on
the first layer's device. In each step the scores come there, and the half goes out, the pattern too where triplets are
masked. Between GPUs the streams order these copies: the host waits for none of them.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from adalora_kernels.allocator.state import ImportanceState, Item, ScatteredState
from adalora_kernels.allocator.triplets import Triplet, layout_of, places_of
from adalora_kernels.backends.select import Backend
from adalora_kernels.ops.allocation import zero_pruned
from adalora_kernels.ops.checks import floating_state_dtype
from adalora_kernels.reference.importance import TripletLayout


class SpreadState(ScatteredState):
    """``ImportanceState`` of layers in several places. It has no ``averages``: those of ``per_device()`` have them.

    What ``current``, ``set_current``, ``state_dict`` and ``load_state_dict`` give and take is the whole model's, so
    that a checkpoint fits any placement.

    Args:
        triplets: the layers.
    """

    def __init__(self, triplets: Sequence[Triplet]) -> None:
        params: list[Tensor] = [p for t in triplets for p in t.parameters]
        device, dtype = params[0].device, floating_state_dtype(params)
        self.layout, self.places = layout_of(triplets), places_of(t.lora_E for t in triplets)
        members: dict[Hashable, list[int]] = {}
        for layer, place in enumerate(self.places):
            members.setdefault(place, []).append(layer)
        self._members = list(members.values())
        self._buckets = [ImportanceState([triplets[i] for i in layers], dtype) for layers in self._members]
        self.half = torch.zeros(1, dtype=torch.int32, device=device)
        self.scores = torch.zeros(self.layout.total_rank, dtype=dtype, device=device)
        self.live = torch.ones(self.layout.total_rank, dtype=torch.bool, device=device)
        self.updates = 0
        self.settled = False
        self.threshold = None
        self.whole_E = self.scores.new_zeros(self.layout.total_rank, 1)
        # The model's triplets in the order of the buckets, and back.
        rows = torch.arange(self.layout.total_rank).split([r for r, _, _ in self.layout.shapes])
        outward = torch.cat([rows[i] for layers in self._members for i in layers])
        self._outward, self._homeward = outward.to(device), outward.argsort().to(device)

    def per_device(self) -> Sequence[ImportanceState]:
        """As ``ImportanceState.per_device``."""
        for bucket in self._buckets:
            bucket.half.copy_(self.half)
        return self._buckets

    def split(self, items: Sequence[Item]) -> list[Sequence[Item]]:
        """As ``ImportanceState.split``."""
        return [[item for i in layers for item in items[3 * i : 3 * i + 3]] for layers in self._members]

    def agree(self, taken: Sequence[Tensor]) -> Tensor:
        """As ``ImportanceState.agree``. A bucket that went to its other half alone comes back with the next step."""
        finite = torch.cat([flag.to(self.half.device) for flag in taken]).all().reshape(1)
        self.half.copy_(torch.where(finite, 1 - self.half, self.half))
        self.scores.copy_(torch.where(finite, self._home([b.scores for b in self._buckets]), self.scores))
        return finite

    def _home(self, of_buckets: Sequence[Tensor]) -> Tensor:
        """Numbers of each bucket's triplets, as those of the model's."""
        return torch.cat([some.to(self.live.device) for some in of_buckets]).index_select(0, self._homeward)

    def update(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        beta1: float,
        beta2: float,
        backend: Backend | None,
    ) -> Tensor:
        """As ``ImportanceState.update``, in one launch per device."""
        held = zip(self.per_device(), self.split(params), self.split(grads), strict=True)
        return self.agree([bucket.update(some, theirs, beta1, beta2, backend) for bucket, some, theirs in held])

    def other_scores(self, metric: str, reduction: str, params: Sequence[Tensor]) -> Tensor:
        """As ``ImportanceState.other_scores``."""
        held = zip(self.per_device(), self.split(params), strict=True)
        return self._home([bucket.other_scores(metric, reduction, some) for bucket, some in held])

    def zero_where_it_lies(self, live: Tensor, lora_E: Sequence[Tensor], backend: Backend | None) -> None:
        """As ``ScatteredState.zero_where_it_lies``."""
        patterns = live.index_select(0, self._outward).split([b.layout.total_rank for b in self._buckets])
        for bucket, layers, pattern in zip(self._buckets, self._members, patterns, strict=True):
            zero_pruned(pattern.to(bucket.live.device), [lora_E[i] for i in layers], backend=backend)

    def current(self) -> tuple[Tensor, Tensor]:
        """As ``ImportanceState.current``, of the whole model, on the first layer's device."""
        pieces: dict[int, Tensor] = {}
        for bucket, layers in zip(self.per_device(), self._members, strict=True):
            both = torch.stack(bucket.current()).to(self.live.device)
            pieces.update(zip(layers, both.split(_layer_sizes(bucket.layout), 1), strict=True))
        average, uncertainty = torch.cat([pieces[i] for i in range(len(pieces))], 1)
        return average, uncertainty

    def set_current(self, average: Tensor, uncertainty: Tensor) -> None:
        """As ``ImportanceState.set_current``, of the whole model."""
        self.half.zero_()
        pieces = [flat.split(_layer_sizes(self.layout)) for flat in (average, uncertainty)]
        for bucket, layers in zip(self._buckets, self._members, strict=True):
            bucket.set_current(*(torch.cat([flat[i] for i in layers]) for flat in pieces))
        self.scores.copy_(self._home([b.scores for b in self._buckets]))

    def reset(self) -> None:
        """As ``ImportanceState.reset``."""
        for bucket in self._buckets:
            bucket.reset()
        self.scores.zero_()
        self.updates = 0


def _layer_sizes(layout: TripletLayout) -> list[int]:
    """Number of elements of each layer."""
    return [r * (k + 1 + n) for r, k, n in layout.shapes]


__all__ = ["SpreadState"]
