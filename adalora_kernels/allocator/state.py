"""What an allocator remembers from step to step, and its exact copy for a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

from adalora_kernels.allocator.compact import Rows
from adalora_kernels.allocator.saved import check_saved_state
from adalora_kernels.allocator.triplets import Triplet, layout_of, places_of
from adalora_kernels.backends.select import Backend
from adalora_kernels.ops.allocation import mask_to_budget, zero_pruned
from adalora_kernels.ops.checks import floating_state_dtype
from adalora_kernels.ops.importance import importance_update, triplet_scores
from adalora_kernels.reference.importance import magnitude_scores

Item = TypeVar("Item")


class ImportanceState:
    """Averages, scores and pattern of all triplets, flat, on the parameters' device.

    Args:
        triplets: the layers, all on one device.
        dtype: of averages and scores; None for that of the parameters.

    Attributes:
        layout: where each layer's parameters and triplets lie.
        places: of the layers, as ``triplets.places_of`` has them.
        averages: [2, 2, elements], the ping-pong halves of Ī and Ū, in fp32 (fp64 for fp64 parameters).
        half: int32 [1], which half is current.
        scores: [total rank], S of each triplet at the last update.
        live: bool [total rank], the current pattern.
        updates: how many steps the averages were offered since they last started at 0.
        settled: whether the pattern is final: triplets were ranked at or after T - t_f.
        threshold: of the last ranking, 0-d; None before it.
    """

    def __init__(self, triplets: Sequence[Triplet], dtype: torch.dtype | None = None) -> None:
        params = [p for t in triplets for p in t.parameters]
        device, dtype = params[0].device, dtype or floating_state_dtype(list(params))
        self.layout = layout_of(triplets)
        self.places = places_of(t.lora_E for t in triplets)
        self.averages = torch.zeros(2, 2, self.layout.total_elements, dtype=dtype, device=device)
        self.half = torch.zeros(1, dtype=torch.int32, device=device)
        self.scores = self.averages.new_zeros(self.layout.total_rank)
        self.live = torch.ones(self.layout.total_rank, dtype=torch.bool, device=device)
        self.updates = 0
        self.settled = False
        self.threshold: Tensor | None = None

    def per_device(self) -> Sequence[ImportanceState]:
        """The states of each device's layers: this one alone, where all lie on one device.

        Who updates them by another way than ``update`` calls this before, and ``agree`` after it.
        """
        return (self,)

    def split(self, items: Sequence[Item]) -> list[Sequence[Item]]:
        """What belongs to A₀, E₀, B₀, A₁, …, as what belongs to those of each of ``per_device()``."""
        return [items]

    def agree(self, taken: Sequence[Tensor]) -> Tensor:
        """Whether all of ``per_device()`` have taken their gradients, bool [1]. Where not, none of them counts."""
        return taken[0]

    def lies_beside(self, lora_E: Sequence[Tensor]) -> bool:
        """Whether the layers with these E, whose state this is, have stayed where they were."""
        return self.places == places_of(lora_E)

    def update(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        beta1: float,
        beta2: float,
        backend: Backend | None,
    ) -> Tensor:
        """Take gradients in; see ``ops.importance_update``."""
        return importance_update(
            self.layout, params, grads, self.averages, self.half, self.scores, beta1, beta2, backend=backend
        )

    def other_scores(self, metric: str, reduction: str, params: Sequence[Tensor]) -> Tensor:
        """S of each triplet by another metric or reduction than that of ``scores``."""
        if metric == "mag":
            return magnitude_scores(self.layout, params, reduction)
        return triplet_scores(self.layout, *self.current(), reduction)

    def mask(
        self,
        scores: Tensor,
        lora_E: Sequence[Tensor],
        budget: int | Tensor,
        enabled: Tensor | None,
        backend: Backend | None,
    ) -> Tensor:
        """Mask to the budget and note the pattern; see ``ops.mask_to_budget``."""
        return mask_to_budget(scores, lora_E, budget, self.live, enabled, backend=backend)

    def zero_pruned(self, lora_E: Sequence[Tensor], backend: Backend | None) -> None:
        """Mask by the pattern; see ``ops.zero_pruned``."""
        zero_pruned(self.live, lora_E, backend=backend)

    def current(self) -> tuple[Tensor, Tensor]:
        """Ī and Ū, flat [elements]: copies, taken without a host sync."""
        average, uncertainty = self.averages.index_select(0, self.half.to(torch.int64))[0]
        return average, uncertainty

    def pattern(self) -> list[list[bool]]:
        """Which triplets of each layer live. Waits for the device."""
        flat = self.live.tolist()
        return [flat[a:b] for a, b in pairwise(self.layout.rank_offsets)]

    def set_current(self, average: Tensor, uncertainty: Tensor) -> None:
        """Put Ī and Ū, flat [elements], and score the triplets by them."""
        self.half.zero_()
        self.averages[0, 0].copy_(average)
        self.averages[0, 1].copy_(uncertainty)
        self.scores.copy_(triplet_scores(self.layout, self.averages[0, 0], self.averages[0, 1]))

    def reset(self) -> None:
        """Start Ī and Ū at 0 again; the pattern stays."""
        self.averages.zero_()
        self.scores.zero_()
        self.updates = 0

    def shrunk(self, new: ImportanceState, rows: Rows) -> ImportanceState:
        """``new``, a state of the same layers after ``compact.shrink(..., rows)``, with what this one has of them."""
        masks = []
        for (_, k, n), row in zip(self.layout.shapes, rows, strict=True):
            row_mask = torch.tensor(row, dtype=torch.bool, device=self.live.device)
            masks += [row_mask.repeat_interleave(k), row_mask, row_mask.repeat(n)]
        elements = torch.cat(masks)
        average, uncertainty = self.current()
        new.set_current(average[elements], uncertainty[elements])
        kept = torch.tensor([keep for row in rows for keep in row], dtype=torch.bool, device=self.live.device)
        new.scores.copy_(self.scores[kept])
        new.live.copy_(self.live[kept])
        new.updates, new.settled, new.threshold = self.updates, self.settled, self.threshold
        return new

    def state_dict(self) -> dict[str, Any]:
        """Copies of all of it."""
        average, uncertainty = self.current()
        return {
            "shapes": [list(shape) for shape in self.layout.shapes],
            "average": average,
            "uncertainty": uncertainty,
            "scores": self.scores.clone(),
            "live": self.live.clone(),
            "updates": self.updates,
            "settled": self.settled,
            "threshold": None if self.threshold is None else self.threshold.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict()``.

        Raises:
            ValueError: the state is incomplete or corrupt, or of layers with other shapes; nothing changes.
        """
        check_saved_state(state)
        if state["shapes"] != [list(shape) for shape in self.layout.shapes]:
            raise ValueError("state: expected the layers that this allocator was made for, got other shapes")
        threshold = state.get("threshold")
        self.set_current(state["average"], state["uncertainty"])
        self.scores.copy_(state["scores"])
        self.live.copy_(state["live"])
        self.updates = state["updates"]
        self.settled = state["settled"]
        self.threshold = None if threshold is None else threshold.to(self.scores).reshape(())


class ScatteredState(ImportanceState):
    """State of layers whose E lies elsewhere than the pattern: on several devices, or in shards.

    Attributes:
        whole_E: [total rank, 1], where the scores are; ranking masks it in place of the layers' own.
    """

    whole_E: Tensor

    def mask(
        self,
        scores: Tensor,
        lora_E: Sequence[Tensor],
        budget: int | Tensor,
        enabled: Tensor | None,
        backend: Backend | None,
    ) -> Tensor:
        """As ``ImportanceState.mask``; the threshold is found among all scores, and E is masked where it lies."""
        threshold = mask_to_budget(scores, [self.whole_E], budget, self.live, enabled, backend=backend)
        self.zero_where_it_lies(self.live if enabled is None else self.live | ~enabled, lora_E, backend)
        return threshold

    def zero_pruned(self, lora_E: Sequence[Tensor], backend: Backend | None) -> None:
        """As ``ImportanceState.zero_pruned``."""
        self.zero_where_it_lies(self.live, lora_E, backend)

    def zero_where_it_lies(self, live: Tensor, lora_E: Sequence[Tensor], backend: Backend | None) -> None:
        """Zero E wherever ``live``, bool [total rank], is False."""
        raise NotImplementedError


__all__ = ["ImportanceState", "ScatteredState"]
