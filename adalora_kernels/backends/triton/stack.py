"""A stack: the adapters of layers that read the same x side by side, so that one product serves all their ranks.

Member i owns the columns first_i to first_i + rank_padding(R_i) of the stack. Its parameters stay where they are: a
kernel selects, column by column, whose they are. What a stack makes lies member after member, each contiguous, as the
single layers' kernels take it. Starts are multiples of 16, which the kernels' loads rely on to be wide.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from adalora_kernels.backends.triton.tiles import MAX_RANK, rank_padding
from adalora_kernels.reference.svd_linear import Adapter

_MOST = 4  # members, as the kernels' arguments have it


@triton.jit
def of_member(column, first1, first2, first3, value0, value1, value2, value3):
    """Of four members' values that of the member which owns a column of the stack."""
    value = tl.where(column < first3, value2, value3)
    value = tl.where(column < first2, value1, value)
    return tl.where(column < first1, value0, value)


class Stack(NamedTuple):
    """Where the members of a stack lie; a kernel takes four, those that aren't there without a column.

    Attributes:
        members: their positions in the group, at most four.
        firsts: the first column of each.
        widths: its columns, that is rank_padding(R).
        ranks: R of each.
    """

    members: tuple[int, ...]
    firsts: tuple[int, ...]
    widths: tuple[int, ...]
    ranks: tuple[int, ...]

    @property
    def total(self) -> int:
        """All columns."""
        return sum(self.widths)

    @property
    def places(self) -> tuple[int, ...]:
        """What a kernel takes: the first columns of members 1 to 3, all columns, and four ranks."""
        missing = _MOST - len(self.members)
        return (*self.firsts[1:], *(self.total,) * (missing + 1), *self.ranks, *(0,) * missing)

    def pointers(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What a kernel takes as the members' four tensors."""
        return (*tensors, *(tensors[0],) * (_MOST - len(tensors)))

    def pieces(self, buffer: Tensor, *shape: int) -> list[Tensor]:
        """Each member's part [*shape, its width] of a flat buffer."""
        parts = buffer.split([width * (buffer.numel() // self.total) for width in self.widths])
        return [part.view(*shape, width) for part, width in zip(parts, self.widths, strict=True)]


def stackable(adapters: Sequence[Adapter]) -> bool:
    """Whether kernels can read these as a stack: factors A of one dtype and one layout, and nothing dropped from x."""
    a = adapters[0].lora_A
    return all(b.seed is None and b.lora_A.dtype == a.dtype and b.lora_A.stride() == a.stride() for b in adapters)


def stacks(adapters: dict[int, Adapter]) -> list[Stack]:
    """The members, by position, of stacks in order: as few as hold the ranks, at most ``MAX_RANK`` columns in each."""
    return _stacks(tuple((i, adapter.lora_A.shape[0]) for i, adapter in adapters.items()))


@cache
def _stacks(ranks: tuple[tuple[int, int], ...]) -> list[Stack]:
    found: list[list[tuple[int, int]]] = []
    columns = 0
    for member, rank in ranks:
        width = rank_padding(rank)
        if not found or len(found[-1]) == _MOST or columns + width > MAX_RANK:
            found.append([])
            columns = 0
        found[-1].append((member, rank))
        columns += width
    return [_stack([i for i, _ in members], [rank for _, rank in members]) for members in found]


def _stack(members: Sequence[int], ranks: Sequence[int]) -> Stack:
    widths = tuple(rank_padding(rank) for rank in ranks)
    return Stack(tuple(members), tuple(sum(widths[:i]) for i in range(len(widths))), widths, tuple(ranks))


__all__ = ["Stack", "of_member", "stackable", "stacks"]
