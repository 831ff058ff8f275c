"""A known call's launches with other tensors: all by one call of the extension, or one by one through their launchers.

The extension makes them in a tenth of the host time. Where it is not built, or a launch is of a form that
``parameters`` doesn't know, they are made in Python; which and why is logged once, at level INFO.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

from torch import Tensor

from adalora_kernels.backends import launcher as extension
from adalora_kernels.backends.select import logger
from adalora_kernels.backends.triton import parameters
from adalora_kernels.backends.triton.launch import Kept
from adalora_kernels.backends.triton.places import Described, Descriptor, Pointer

Relaunch = Callable[..., None]  # (stream, *tensors)


class Known(NamedTuple):
    """A launch; ``terms`` are all arguments as ``Places.term`` gives them, constexprs among them."""

    kept: Kept
    grid: tuple[int, int, int]
    terms: tuple[Any, ...]


class InPython:
    """The launches by the compiled kernels' own launchers."""

    def __init__(self, launches: Sequence[Known]) -> None:
        self.launches = tuple((kept, grid) for kept, grid, _ in launches)
        self._arguments = _arguments([terms for _, _, terms in launches])

    def __call__(self, stream: int, *tensors: Tensor | None) -> None:
        addresses = [0 if t is None else t.data_ptr() for t in tensors]
        for (kept, (x, y, z)), own in zip(self.launches, self._arguments(addresses), strict=True):
            kept.run(x, y, z, stream, kept.function, kept.metadata, None, None, None, *own)


def relauncher(device: int, launches: Sequence[Known], tensors: Sequence[Tensor | None]) -> Relaunch:
    """What makes these launches on ``device``, the current one, with as many tensors as these, which are one call's."""
    found = extension.launcher()
    if isinstance(found, str):
        _log_once(found)
        return InPython(launches)
    addresses = [0 if t is None else t.data_ptr() for t in tensors]
    try:
        described = tuple(
            parameters.launch_of(kept, grid, terms, addresses, found)
            for kept, grid, terms in launches
            if 0 not in grid  # of these nothing is launched
        )
        made = found.make_replay(device, len(addresses), described, tuple(kept.kernel for kept, _, _ in launches))
    except (parameters.UnknownFormError, ValueError) as reason:
        _log_once(str(reason))
        return InPython(launches)
    return partial(found.replay, made)


@cache
def _log_once(reason: str) -> None:
    logger.info("calls are replayed in Python: %s", reason)


def _arguments(rows: Sequence[Sequence[Any]]) -> Callable[[Sequence[int]], tuple[tuple[Any, ...], ...]]:
    """From addresses to the arguments of each launch.

    Written out as source, since it runs at every call.
    """
    constants: dict[str, Any] = {"Descriptor": Descriptor}

    def source(term: Any) -> str:
        if isinstance(term, Pointer):
            return f"a[{term.number}] + {term.beyond}" if term.beyond else f"a[{term.number}]"
        name = f"c{len(constants)}"
        constants[name] = term.descriptor if isinstance(term, Described) else term
        return f"Descriptor({name}, {source(term.pointer)})" if isinstance(term, Described) else name

    written = "".join(f"({''.join(f'{source(term)}, ' for term in row)}), " for row in rows)
    arguments: Callable[[Sequence[int]], tuple[tuple[Any, ...], ...]] = eval(f"lambda a: ({written})", constants)
    return arguments


__all__ = ["InPython", "Known", "Relaunch", "relauncher"]
