"""How the sweep over all adapters of a model is cut into items, by the shapes alone.

An item is some triplets of one of a layer's three parameters, and a range of their positions: columns of A, rows of B.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from adalora_kernels.backends.triton.engine.tables import bits_of
from adalora_kernels.reference.handover import sum_offsets
from adalora_kernels.reference.importance import TripletLayout

LAYER_ROW = 10  # R, K, N, first element, first triplet, first sum, items, bits of 1/K and 1/N, first sum handed over
ITEM_ROW = 4  # layer, part (0 is A, 1 is E, 2 is B), first triplet, first position
A_ROWS = 4  # triplets that an item of A takes
_ELEMENTS = 8192  # that an item has at most
_MAX_BLOCK_R = 128


class Items(NamedTuple):
    """The sweep of a layout, cut into items.

    Attributes:
        layers, items: int64 tables on the device.
        item_count, sum_count: how many items, and how many sums they leave.
        block_r: how many triplets an item of E or B takes.
        fours: whether rows and parameters begin at multiples of 4 elements.
    """

    layers: Tensor
    items: Tensor
    item_count: int
    sum_count: int
    block_r: int
    fours: bool

    @property
    def piece(self) -> int:
        """Positions that an item of A takes."""
        return _ELEMENTS // A_ROWS

    @property
    def slab(self) -> int:
        """Positions that an item of B takes."""
        return _ELEMENTS // self.block_r


@lru_cache(maxsize=16)
def items_of(layout: TripletLayout, device: torch.device) -> Items:
    """Cut the sweep by the shapes alone. A layer without rank has one item too, so that every layer finishes."""
    shapes = layout.shapes
    block_r = min(triton.next_power_of_2(max((r for r, _, _ in shapes), default=1) or 1), _MAX_BLOCK_R)
    cut = Items(torch.empty(0), torch.empty(0), 0, 0, block_r, False)
    layers: list[int] = []
    items: list[int] = []
    sums = 0
    handed_over = sum_offsets(layout)
    for layer, (r, k, n) in enumerate(shapes):
        begin = len(items)
        for part, length, rows, step in ((0, k, A_ROWS, cut.piece), (1, 1, block_r, 1), (2, n, block_r, cut.slab)):
            for triplet in range(0, r, rows):
                for position in range(0, length, step):
                    items += (layer, part, triplet, position)
        if r == 0:
            items += (layer, 1, 0, 0)
        count = (len(items) - begin) // ITEM_ROW
        layers += (
            r,
            k,
            n,
            layout.offsets[3 * layer],
            layout.rank_offsets[layer],
            sums,
            count,
            bits_of(1 / k),
            bits_of(1 / n),
            handed_over[layer],
        )
        sums += r * (-(-k // cut.piece) + 1 + -(-n // cut.slab))
    table = torch.tensor(layers + items, dtype=torch.int64).to(device)
    fours = layout.total_elements % 4 == 0 and all(r % 4 == 0 and k % 4 == 0 for r, k, _ in shapes)
    return Items(table[: len(layers)], table[len(layers) :], len(items) // ITEM_ROW, sums, block_r, fours)


__all__ = ["A_ROWS", "ITEM_ROW", "LAYER_ROW", "Items", "items_of"]
