"""What a recorded step reads and writes in place: the batch that it trains on, and the state before it was tried."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from adalora_kernels.allocator.allocator import RankAllocator


class StaticBatch:
    """A batch whose tensors stay where they are.

    Args:
        sample: tensors and constants in mappings, lists and tuples. Mappings become dicts.
        device: where the tensors are to lie.
    """

    def __init__(self, sample: Any, device: torch.device) -> None:
        self.value = _placed(sample, device)
        self._leaves = dict(_leaves(self.value))

    @torch.no_grad()
    def copy_(self, batch: Any) -> None:
        """Put another batch in its place.

        Raises:
            ValueError: its structure, a shape, a dtype or a constant is another. Nothing changes.
        """
        leaves = dict(_leaves(batch))
        if leaves.keys() != self._leaves.keys():
            one = min(leaves.keys() ^ self._leaves.keys())
            raise ValueError(
                f"batch: expected the sample's structure, {'with' if one in self._leaves else 'without'} {one}"
            )
        for name, ours in self._leaves.items():
            given = leaves[name]
            if isinstance(ours, Tensor) and isinstance(given, Tensor):
                if given.shape != ours.shape or given.dtype != ours.dtype:
                    raise ValueError(
                        f"{name}: expected {ours.dtype} {list(ours.shape)}, as in the sample, got {given.dtype} "
                        f"{list(given.shape)}; pad it, or make a graphed_step for these shapes"
                    )
            elif isinstance(ours, Tensor) or isinstance(given, Tensor) or given != ours:
                raise ValueError(f"{name}: expected {ours!r:.60}, as in the sample, got {given!r:.60}")
        for name, ours in self._leaves.items():
            if isinstance(ours, Tensor):
                ours.copy_(leaves[name], non_blocking=True)


def _placed(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to(device, copy=True, memory_format=torch.contiguous_format)
    if isinstance(value, Mapping):
        return {key: _placed(entry, device) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        entries = [_placed(entry, device) for entry in value]
        return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)
    return value


def _leaves(value: Any, path: str = "batch") -> Iterator[tuple[str, Any]]:
    """Tensors and constants by their place."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _leaves(entry, f"{path}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for i, entry in enumerate(value):
            yield from _leaves(entry, f"{path}[{i}]")
    else:
        yield path, value


class Snapshot:
    """Parameters, buffers, optimizer and allocator as they are now, to be put back in place.

    Args:
        model: its parameters that train, and its buffers.
        optimizer: its parameters and state. State that it makes later on is taken to begin at 0, as Adam's does.
        allocator: what its steps change.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, optimizer: Optimizer, allocator: RankAllocator) -> None:
        trained = [p for p in model.parameters() if p.requires_grad]
        held = [p for group in optimizer.param_groups for p in group["params"]]
        self._params = list(dict.fromkeys([*trained, *held]))
        self._optimizer = optimizer
        self._grads = [p.grad for p in self._params]
        self._stepped = {p for p in optimizer.state if optimizer.state[p]}
        state = [t for p in self._stepped for t in _tensors(optimizer.state[p])]
        everything = chain(self._params, model.buffers(), state, _state_of(allocator))
        self._tensors = [(t, t.detach().clone()) for t in everything]

    @torch.no_grad()
    def restore(self) -> None:
        """All values as they were; the optimizer's new state at 0."""
        for tensor, value in self._tensors:
            tensor.copy_(value)
        for p, state in self._optimizer.state.items():
            if p not in self._stepped:
                for tensor in _tensors(state):
                    tensor.zero_()

    def undo(self) -> None:
        """As ``restore``, with the gradients, and without the optimizer's new state."""
        self.restore()
        for p in [p for p in self._optimizer.state if p not in self._stepped]:
            del self._optimizer.state[p]
        for p, grad in zip(self._params, self._grads, strict=True):
            p.grad = grad


def _state_of(allocator: RankAllocator) -> list[Tensor]:
    state, clock = allocator.importance, allocator.clock
    return [state.averages, state.half, state.scores, state.live, *([] if clock is None else clock.tensors())]


def _tensors(state: Mapping[str, Any]) -> list[Tensor]:
    return [value for value in state.values() if isinstance(value, Tensor)]


__all__ = ["Snapshot", "StaticBatch"]
