"""All ranks hold the same masks, or somebody hears of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from adalora_kernels.allocator.compact import data_parallel_wrapper
from adalora_kernels.allocator.distributed import ShardedState

if TYPE_CHECKING:
    from adalora_kernels.allocator.engine import BudgetEngine


class Agreement:
    """Compares the patterns of the ranks that train one model: under DistributedDataParallel, FSDP2 or ZeRO.

    It takes one all-reduce of 2 bytes per triplet. On a GPU the answer is fetched without waiting for it, and looked
    at when the next pattern is compared.
    """

    def __init__(self) -> None:
        self._groups: tuple[dist.ProcessGroup, ...] | None = None
        self._open: tuple[Tensor, torch.cuda.Event, int] | None = None

    def __reduce__(self) -> tuple[type[Agreement], tuple[()]]:
        """A copy of the allocator finds its own ranks."""
        return Agreement, ()

    def check(self, engine: BudgetEngine, step: int) -> None:
        """Hold the pattern that ``step`` left to that of the other ranks, which must call this too.

        Raises:
            RuntimeError: they differ.
        """
        live = engine.importance.live
        if not dist.is_available() or not dist.is_initialized():
            return
        if live.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return
        self._answer(engine)
        # A triplet is in dispute where it lives on one rank and is dead on another.
        votes = torch.stack([live, ~live]).to(torch.uint8)
        for group in self._groups_of(engine):
            dist.all_reduce(votes, dist.ReduceOp.MAX, group)
        disputed = votes.sum(0) == 2
        if live.device.type == "cuda":
            disputed = disputed.to("cpu", non_blocking=True)
            fetched = torch.cuda.Event()
            fetched.record()
            self._open = disputed, fetched, step
        else:
            _raise_for(engine, disputed, step)

    def _answer(self, engine: BudgetEngine) -> None:
        if self._open is not None:
            (disputed, fetched, step), self._open = self._open, None
            fetched.synchronize()
            _raise_for(engine, disputed, step)

    def _groups_of(self, engine: BudgetEngine) -> tuple[dist.ProcessGroup, ...]:
        if isinstance(engine.importance, ShardedState):
            return engine.importance.shards.groups
        if self._groups is None:
            wrapper = data_parallel_wrapper(p for t in engine.triplets for p in t.parameters)
            self._groups = () if wrapper is None else (wrapper.process_group,)
        return self._groups


def _raise_for(engine: BudgetEngine, disputed: Tensor, step: int) -> None:
    if not bool(disputed.any()):
        return
    offsets = engine.importance.layout.rank_offsets
    counts = {t.name: int(disputed[offsets[i] : offsets[i + 1]].sum()) for i, t in enumerate(engine.triplets)}
    name = next(name for name, count in counts.items() if count)
    raise RuntimeError(
        f"masks: expected the same on every rank, but after step {step} ranks disagree about {sum(counts.values())} "
        f"triplets, first about {counts[name]} of {name}. Parameters, gradients or the allocator's settings differ: "
        "check that gradients are reduced before the optimizer's step, and that ranks started from the same weights, "
        "with the same state. allocator.check_ranks = False turns this check off"
    )


__all__ = ["Agreement"]
