"""Calls of the layer that are replayed: from the arguments' layout straight to the launches.

Which kernels a launcher launches, with which tiles, grids and numbers, and what memory it takes for that, follows from
the layout of its tensors (dtype, shape, strides, alignment) and from its other arguments. To find it out costs more
host time than the launches themselves. So the first call with a layout is watched: its launches are noted, and each
pointer among their arguments as a place in a tensor that was given or made. A later call with that layout makes its
results, one buffer for everything else, and launches.

Only what consists of launches, allocations and views can be replayed. A launcher that does more, such as a product of
the BLAS, is made anew each time.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import driver

from adalora_kernels.backends import launcher as extension
from adalora_kernels.backends.triton import launch, measured, tickets
from adalora_kernels.backends.triton.places import Places, UnknownOriginError, holds
from adalora_kernels.backends.triton.relaunch import Known, Relaunch, relauncher

_MOST = 4096  # layouts that are known at a time
_aten = torch.ops.aten
_ALLOCATIONS = {
    _aten.empty.memory_format,
    _aten.new_empty.default,
    _aten.empty_like.default,
    _aten.empty_strided.default,
}
_VIEWS = {
    *(_aten.t.default, _aten.transpose.int, _aten.view.default, _aten.detach.default, _aten.alias.default),
    *(_aten.slice.Tensor, _aten.split_with_sizes.default, _aten._unsafe_view.default),
}

Result = tuple[Tensor | None, ...]


class _Watch(TorchDispatchMode):
    """What a call does: the tensors that it makes, its launches, and whatever else it asks of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Tensor] = []
        self.others: list[Any] = []
        self.workspaces: list[tuple[Tensor, int]] = []
        self.launches: list[launch.Launched] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS:
            self.made.append(result)
        elif func not in _VIEWS:
            self.others.append(result)
        return result

    @property
    def replayable(self) -> bool:
        """Whether there is nothing in it but launches, allocations and views."""
        zeroed = {buffer.data_ptr() for buffer, _ in self.workspaces}
        unknown = [o for o in self.others if not (isinstance(o, Tensor) and o.data_ptr() in zeroed)]
        return not unknown and all(launched.kept is not None for launched in self.launches)


class _Replay(NamedTuple):
    """A call whose launches are known.

    Attributes:
        made: the likes of each tensor that results lie in, without its memory, and of the buffer for everything else
            that is made, where there is something.
        workspace: ``row_blocks`` of the largest, which all launches share, one after the other; None without.
        launch: with the stream, what is given, what is made and the workspace.
        results: from what is made and what is given.
    """

    made: tuple[Tensor, ...]
    workspace: int | None
    launch: Relaunch
    results: Callable[[Sequence[Tensor], Sequence[Tensor | None]], Result]


_known: dict[Hashable, _Replay | None] = {}


def replayed(
    make: Callable[..., Any], tensors: tuple[Tensor | None, ...], others: tuple[Hashable, ...], *args: Any
) -> Any:
    """``make(*args)``, or the same launches by a shorter way.

    Args:
        make: launches on the device of the first tensor, and does so by the layout of ``tensors`` and ``others`` alone.
        tensors: all that are among ``args``, the first of them not None.
        others: everything else in ``args``.
        args: of ``make``.

    Raises:
        TypeError: a tensor has no memory of its own: it wraps others, or stands for another.
    """
    first = tensors[0]
    assert first is not None
    layout = _reader(len(tensors))(*tensors)
    key = (make, others, layout)
    replay = _known.get(key)
    if replay is None:
        if layout is not None and key in _known:
            return make(*args)
        _check_memory(tensors)
        return make(*args) if layout is None else _watched(key, make, tensors, args)
    device, active = first.get_device(), driver.active
    if measured.on_trial() or device != active.get_current_device() or launch.hooked():
        return make(*args)
    made = [_new(like) for like in replay.made]
    held = made if replay.workspace is None else [*made, tickets.workspace(first.device, replay.workspace)]
    replay.launch(active.get_current_stream(device), *tensors, *held)
    return replay.results(made, tensors)


@cache
def _reader(count: int) -> Callable[..., Hashable]:
    """A function of so many tensors: all of their layout that a launch may depend on; None where it can't be told.

    In Python it is written out as source, since it runs at every call.
    """
    found = extension.launcher()
    if not isinstance(found, str):
        return found.layout
    names = [f"t{i}" for i in range(count)]
    parts = "{0}.get_device(), {0}.dtype, {0}.shape, {0}.stride(), ({0}.data_ptr() or 15) & 15"
    layout = f"({parts}) if {{0}} is not None else None"
    layouts = ", ".join(map(layout.format, names))
    read: Callable[..., Hashable] = eval(f"lambda {', '.join(names)}: ({layouts},)")
    return read


def _check_memory(tensors: tuple[Tensor | None, ...]) -> None:
    """A kernel would read address 0. Of a layout that is known no tensor does: ``_reader`` tells these apart.

    Those on the meta device may pass: nothing launches there.
    """
    for t in tensors:
        if t is not None and t.numel() > 0 and t.data_ptr() == 0 and not t.is_meta:
            got = f"{type(t).__name__} of {list(t.shape)} on {t.device}"
            raise TypeError(f"backend triton: expected tensors with memory of their own, got a {got}")


def _watched(key: Hashable, make: Callable[..., Result], tensors: tuple[Tensor | None, ...], args: Any) -> Result:
    """Make the call, and know it from then on."""
    given = [address for t in tensors if t is not None and (address := t.data_ptr())]
    if measured.on_trial() or len(set(given)) < len(given):  # two of one address can't be told apart
        return make(*args)
    with _Watch() as watch, launch.noted(watch.launches), tickets.noted(watch.workspaces):
        results = make(*args)
    if len(_known) >= _MOST:
        _known.clear()
    _known[key] = _replay_of(watch, tensors, results) if watch.replayable else None
    return results


def _replay_of(watch: _Watch, tensors: tuple[Tensor | None, ...], results: Result) -> _Replay | None:
    """What a watched call comes to; None where an argument of a launch, or a result, is of unknown origin."""
    homes: list[Tensor] = []  # of results
    try:
        written = "".join(f"{_source(result, tensors, homes, watch.made)}, " for result in results)
        others = [t for t in watch.made if all(t.data_ptr() != home.data_ptr() for home in homes)]
        places = Places(tensors, homes, others, [buffer for buffer, _ in watch.workspaces])
        launches = []
        for kept, grid, args in watch.launches:
            assert kept is not None  # or it wouldn't be replayable
            x, y, z = (*grid, 1, 1)[:3]
            launches.append(Known(kept, (x, y, z), tuple(map(places.term, (*args, *kept.constants)))))
    except UnknownOriginError:
        return None
    given = next(t for t in tensors if t is not None)
    made = [_like(t.shape, t) for t in homes]
    if places.scratch:
        made.append(_like([places.scratch], given, torch.uint8))
    # What the scratch will hold lies apart now: whose address stands for it is of no account.
    now = [*tensors, *homes, *(others[:1] if places.scratch else ()), *(buffer for buffer, _ in watch.workspaces[:1])]
    return _Replay(
        tuple(made),
        max((row_blocks for _, row_blocks in watch.workspaces), default=None),
        relauncher(given.get_device(), launches, now),
        eval(f"lambda made, given: ({written})", {"added_to": _added_to}),
    )


def _source(result: Tensor | None, given: Sequence[Tensor | None], homes: list[Tensor], made: Sequence[Tensor]) -> str:
    """The source of a result, of what is made or given; what it lies in is put to ``homes``."""
    if result is None:
        return "None"
    address = result.data_ptr()
    home = next((t for t in made if holds(t, address)), None)
    if home is None:
        number = next((i for i, t in enumerate(given) if t is not None and t.data_ptr() == address), None)
        if number is None:
            raise UnknownOriginError
        return f"added_to(given[{number}])"
    place = next((i for i, t in enumerate(homes) if t.data_ptr() == home.data_ptr()), len(homes))
    if place == len(homes):  # in the result's own shape, where it is all that lies there
        fills = result.is_contiguous() and (result.numel(), result.dtype) == (home.numel(), home.dtype)
        homes.append(result if fills else home)
    home = homes[place]
    if result.is_contiguous() and (result.shape, result.dtype) == (home.shape, home.dtype):
        return f"made[{place}]"
    if result.dtype != home.dtype:
        raise UnknownOriginError
    offset = (address - home.data_ptr()) // home.itemsize
    return f"made[{place}].as_strided({tuple(result.shape)}, {result.stride()}, {offset})"


def _added_to(tensor: Tensor) -> Tensor:
    torch.autograd.graph.increment_version(tensor)
    return tensor


def _like(shape: Sequence[int], tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """What stands for a contiguous tensor of this shape: one element, in all places."""
    return _bytes(tensor.device).view(dtype or tensor.dtype)[:1].expand(shape)


@cache
def _bytes(device: torch.device) -> Tensor:
    """Room for one element of any dtype, kept for good.

    Allocated by a thread of its own: the caller's may be allocating into the pool of a graph in the making, where the
    warm-up of torch.compile's "reduce-overhead" fails over what is left behind.
    """
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(lambda: torch.empty(16, dtype=torch.uint8, device=device)).result()


def _new(like: Tensor) -> Tensor:
    """Contiguous; by a third of the host time that ``torch.empty`` takes with shape, dtype and device."""
    return torch.empty_like(like, memory_format=torch.contiguous_format)


__all__ = ["replayed"]
