"""Which state a model needs: of parameters on one device, on several, or in shards; and how it follows them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from adalora_kernels.allocator.devices import SpreadState
from adalora_kernels.allocator.distributed import ShardedState
from adalora_kernels.allocator.state import ImportanceState
from adalora_kernels.allocator.triplets import Triplet, layout_of, places_of, refuse_several_devices
from adalora_kernels.ops.shards import are_sharded, local_part, shards_of


def state_of(triplets: Sequence[Triplet]) -> ImportanceState:
    """A new state of these layers, spread or sharded as their parameters are.

    Raises:
        ValueError: shards on several devices of one rank.
    """
    params: list[Tensor] = [p for t in triplets for p in t.parameters]
    if are_sharded(params):
        refuse_several_devices("shards of this rank", triplets)
        return ShardedState(layout_of(triplets), shards_of(params), [local_part(p) for p in params])
    return SpreadState(triplets) if len(set(places_of(t.lora_E for t in triplets))) > 1 else ImportanceState(triplets)


def follow_shards(state: ImportanceState, triplets: Sequence[Triplet], params: Sequence[Tensor]) -> ImportanceState:
    """The state, or its parts for this rank where the parameters were sharded since it was made.

    Raises:
        ValueError: the state is of shards, and the parameters are whole.
    """
    if are_sharded(params) == isinstance(state, ShardedState):
        return state
    if isinstance(state, ShardedState):
        raise ValueError(
            "model: expected its sharded parameters, found gathered ones; where set_reshard_after_backward(False) was "
            "called, call reshard() before optimizer.step()"
        )
    return _continued(state, triplets)


def follow_devices(state: ImportanceState, triplets: Sequence[Triplet]) -> ImportanceState:
    """The state, or the same beside the parameters where these were moved since it was made."""
    if state.lies_beside([t.lora_E for t in triplets]):
        return state
    if isinstance(state, ShardedState):
        state.move_to(triplets[0].lora_E.device)
        return state
    return _continued(state, triplets)


def _continued(state: ImportanceState, triplets: Sequence[Triplet]) -> ImportanceState:
    new = state_of(triplets)
    new.load_state_dict(state.state_dict())
    return new


__all__ = ["follow_devices", "follow_shards", "state_of"]
