"""Tables of views: what the extension's ops read about many tensors, their addresses above all.

The extension reads them off the tensors itself (``csrc/python/read.h``), at a tenth of what a list of tensors costs the
dispatcher. A table is good for as long as its tensors are held and not moved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum
from functools import cache
from importlib import import_module

import torch
from torch import Tensor

_WORDS = 5  # of a view: address, dtype, rows, columns, stride
_Read = Callable[[Sequence[Tensor | None], Tensor, Tensor, int], int]


class Layout(IntEnum):
    """What tensors are to be. Contiguous ones of any shape are read as one row."""

    CONTIGUOUS_ROWS = 0
    CONTIGUOUS_MATRICES = 1
    CONTIGUOUS = 2


@cache
def _reader() -> _Read:
    read: _Read = import_module("adalora_kernels._C").read
    return read


def views_of(
    name: str, tensors: Sequence[Tensor | None], place: Tensor, layout: Layout = Layout.CONTIGUOUS_MATRICES
) -> Tensor:
    """The table of tensors on the device of ``place``, int64 [n, 5] on the CPU; None has a row too.

    Args:
        name: of the argument, for the error.
        tensors: of fp32, fp64, bf16 or fp16.
        place: a tensor.
        layout: theirs.

    Raises:
        RuntimeError: one of them is none of that.
    """
    table = torch.empty(len(tensors), _WORDS, dtype=torch.int64)
    unread = _reader()(tensors, place, table, layout)
    if unread >= 0:
        raise RuntimeError(f"{name}[{unread}]: expected floating-point numbers on {place.device}, {layout.name}")
    return table


def views_or_copies(
    name: str, tensors: Sequence[Tensor | None], place: Tensor, layout: Layout = Layout.CONTIGUOUS_MATRICES
) -> tuple[Tensor, Sequence[Tensor | None]]:
    """As ``views_of``, with copies of tensors that aren't contiguous; and the tensors to be held."""
    try:
        return views_of(name, tensors, place, layout), tensors
    except RuntimeError:
        held = [None if t is None else t.detach().contiguous() for t in tensors]
        return views_of(name, held, place, layout), held


__all__ = ["Layout", "views_of", "views_or_copies"]
