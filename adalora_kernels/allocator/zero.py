"""DeepSpeed ZeRO: the allocator inside the engine's step, on what each rank holds of the fp32 master weights.

ZeRO flattens the trainable parameters and gives each rank an interval of that. The gradients that count (reduced,
unscaled, clipped) exist only while its own optimizer steps on such an interval, one after the other, and are gone when
the engine's step returns, or accelerate's ``backward``, which makes that step. So the optimizer inside is listened to,
and the allocator's step is made when ZeRO's is done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from adalora_kernels.allocator.attach import Attachment
from adalora_kernels.allocator.distributed import ShardedState
from adalora_kernels.allocator.engine import Turn
from adalora_kernels.ops.shards import Shards, rectangles_of

if TYPE_CHECKING:
    from adalora_kernels.allocator.allocator import RankAllocator


class _Fragment(NamedTuple):
    """What this rank holds of a parameter: ``size`` elements from ``start`` on, at ``offset`` of its flat group."""

    group: int
    offset: int
    start: int
    size: int


def zero_optimizer(target: Any) -> Any:
    """The ZeRO optimizer in an engine, an optimizer of accelerate's, or itself; None where there is none."""
    while target is not None and not (_is_stage_3(target) or hasattr(target, "single_partition_of_fp32_groups")):
        target = getattr(target, "optimizer", None)
    return target


def _is_stage_3(zero: Any) -> bool:
    return hasattr(zero, "fp32_partitioned_groups_flat")


class ZeroAttachment(Attachment):
    """``Attachment`` to ZeRO-1, 2 or 3, which take gradients away before ``step`` returns.

    A step that ZeRO skips for an overflow is none of the allocator's.

    Args:
        allocator: gets averages of what this rank holds.
        zero: the ZeRO optimizer.
        step: as for ``RankAllocator.attach``.

    Raises:
        ValueError: it doesn't train every adapter.
    """

    def __init__(self, allocator: RankAllocator, zero: Any, step: Callable[[], int] | None) -> None:
        self.zero, self.optimizer = zero, zero.optimizer
        self._allocator, self._step = allocator, step
        self._params: list[Any] = [p for t in allocator.triplets for p in t.parameters]
        self._shapes = [shape for r, k, n in allocator.importance.layout.shapes for shape in ((r, k), (r, 1), (n, r))]
        self._fragments = [self._fragment(p) for p in self._params]
        self._grads: dict[int, Tensor] = {}
        self._earlier: dict[int, Tensor] = {}
        self._keep_before = False
        rectangles = [
            () if f is None else rectangles_of(f.start, f.size, columns)
            for f, (_, columns) in zip(self._fragments, self._shapes, strict=True)
        ]
        shards = Shards(tuple(self._shapes), tuple(rectangles), (True,) * len(self._params), (_process_group(zero),))
        state = ShardedState(allocator.importance.layout, shards, self._parts(self._flat()))
        state.load_state_dict(allocator.importance.state_dict())
        allocator.importance = state
        self._E = Shards(shards.shapes[1::3], shards.rectangles[1::3], shards.owned[1::3], shards.groups)
        self._handles = [self.optimizer.register_step_pre_hook(self._before_group)]
        self._zero_step = zero.step
        zero.step = self._whole_step

    def is_to(self, optimizer: Any) -> bool:
        """Whether it is attached to this engine or optimizer."""
        return self.active and zero_optimizer(optimizer) is self.zero

    def detach(self) -> None:
        """ZeRO's steps are its own again. The averages stay this rank's."""
        if self.active:
            self.zero.step = self._zero_step
        super().detach()

    def _flat(self) -> Sequence[Tensor]:
        """This rank's interval of each group, fp32."""
        zero = self.zero
        flat: Sequence[Tensor] = (
            zero.fp32_partitioned_groups_flat if _is_stage_3(zero) else zero.single_partition_of_fp32_groups
        )
        return flat

    def _fragment(self, param: Any) -> _Fragment | None:
        zero = self.zero
        if _is_stage_3(zero):
            if not hasattr(param, "ds_id") or zero.get_param_id(param) not in zero.grad_position:
                raise self._not_held()
            group, offset, size = zero.grad_position[zero.get_param_id(param)]
            start = size * torch.distributed.get_rank(_process_group(zero))
            count = max(0, min(size, param.ds_numel - start))
            return _Fragment(group, offset, start, count) if count else None
        if not hasattr(param, "_hp_mapping"):
            raise self._not_held()
        if (mapping := param._hp_mapping) is None:
            return None
        here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
        return _Fragment(mapping.param_group_index, here.start, there.start, here.numel)

    def _not_held(self) -> ValueError:
        return ValueError(
            f"engine: expected one that trains all adapters, but {type(self.zero).__name__} doesn't hold all of "
            f"{self._allocator.triplets[0].name}'s and the others'"
        )

    def _parts(self, flat: Sequence[Tensor]) -> list[Tensor]:
        """This rank's part of each matrix, as views of ``flat``."""
        none = flat[0].detach()[:0]
        return [none if f is None else flat[f.group].detach()[f.offset : f.offset + f.size] for f in self._fragments]

    def _before_group(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The optimizer inside is about to step on some groups, whose final gradients exist now."""
        for flat in (p for group in optimizer.param_groups for p in group["params"]):
            if flat.grad is not None:
                self._grads[id(flat)] = flat.grad
                if self._keep_before:
                    self._earlier[id(flat)] = flat.detach().clone()

    def _whole_step(self, *args: Any, **kwargs: Any) -> Any:
        """ZeRO's step, then the allocator's."""
        allocator = self._allocator
        turn = allocator.begin(allocator.next_step if self._step is None else self._step(), self._parts(self._flat()))
        self._keep_before = allocator.pre_step and turn.plan.update
        self._grads, self._earlier = {}, {}
        result = self._zero_step(*args, **kwargs)
        if self._grads:
            self._make(turn)
        self._grads, self._earlier = {}, {}
        return result

    @torch.no_grad()
    def _make(self, turn: Turn) -> None:
        allocator, flat = self._allocator, self._flat()
        params = self._parts(flat)
        scored = self._parts([self._earlier.get(id(f), f) for f in flat])
        for p, grad in zip(scored, self._parts([self._grads[id(f)] for f in flat]), strict=True):
            p.grad = grad
        finite = allocator.update(turn._replace(params=scored))
        turn = turn._replace(params=params, lora_E=params[1::3])
        allocator.note(turn.step, (turn.plan.budget, allocator.finish(turn, finite)))
        if turn.plan.rank or turn.plan.reapply:
            self._publish(turn.lora_E)

    def _publish(self, lora_E: Sequence[Tensor]) -> None:
        """Bring the masked master weights to the parameters that the model runs on."""
        fragments = self._fragments[1::3]
        for p, E, held, fragment in zip(self._params[1::3], self._E.whole(lora_E), lora_E, fragments, strict=True):
            if p.numel() == E.numel():  # not so where stage 3 has partitioned it
                p.data.copy_(E)
            if _is_stage_3(self.zero) and fragment is not None:
                p.ds_tensor.data[: fragment.size].copy_(held)


def _process_group(zero: Any) -> torch.distributed.ProcessGroup:
    group: torch.distributed.ProcessGroup = zero.dp_process_group
    return group


__all__ = ["ZeroAttachment", "zero_optimizer"]
