"""Tables of views: what the extension's ops read about many tensors, their addresses above all.

The extension reads them off the tensors itself (``csrc/python/read.h``), at a tenth of what a list of tensors costs the
dispatcher. A table is good for as long as its tensors are held and not moved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

_WORDS = 5  # of a view: address, dtype, rows, columns, stride


class Layout(IntEnum):
    """What tensors are to be. Contiguous ones of any shape are read as one row."""

    CONTIGUOUS_ROWS = 0
    CONTIGUOUS_MATRICES = 1
    CONTIGUOUS = 2


@cache
def _extension() -> Any:
    return import_module("adalora_kernels._C")


@cache
def _words() -> Callable[[Sequence[Tensor | None], Tensor, bytes | None], tuple[list[int], bytes] | int] | None:
    try:
        return _extension().words
    except ImportError:
        return None


def words_of(tensors: Sequence[Tensor | None], place: Tensor, sizes: bytes | None) -> tuple[list[int], bytes] | None:
    """Contiguous matrices on the device of ``place`` as numbers, and their sizes; see ``csrc/python/read.h``.

    Returns:
        None where one is none of that or has other ``sizes``, and without the extension.
    """
    words = _words()
    if words is None:
        return None
    try:
        found = words(tensors, place, sizes)
    except RuntimeError:  # torch's, of a tensor that lies nowhere
        return None
    return None if isinstance(found, int) else found


def views_of(
    name: str, tensors: Sequence[Tensor | None], place: Tensor | None, layout: Layout = Layout.CONTIGUOUS_MATRICES
) -> Tensor:
    """The table of tensors on one device, int64 [n, 5] on the CPU; None has a row too.

    Args:
        name: of the argument, for the error.
        tensors: of fp32, fp64, bf16 or fp16.
        place: a tensor on their device; None for the CPU.
        layout: theirs.

    Raises:
        RuntimeError: one of them is none of that.
    """
    table = torch.empty(len(tensors), _WORDS, dtype=torch.int64, device="cpu")  # whatever the default device
    place = table if place is None else place
    unread: int = _extension().read(tensors, place, table, layout)
    if unread >= 0:
        bad: Any = tensors[unread]
        got = f"{type(bad).__name__} of {bad.dtype} {list(bad.shape)} on {bad.device}"
        raise RuntimeError(
            f"{name}[{unread}]: expected floating-point numbers in memory of their own on {place.device}, "
            f"{layout.name}, got {got}"
        )
    return table


def views_or_copies(
    name: str, tensors: Sequence[Tensor | None], place: Tensor | None, layout: Layout = Layout.CONTIGUOUS_MATRICES
) -> tuple[Tensor, Sequence[Tensor | None]]:
    """As ``views_of``, with copies of tensors that aren't contiguous; and the tensors to be held."""
    try:
        return views_of(name, tensors, place, layout), tensors
    except RuntimeError:
        held = [None if t is None else t.detach().contiguous() for t in tensors]
        return views_of(name, held, place, layout), held


__all__ = ["Layout", "views_of", "views_or_copies", "words_of"]
