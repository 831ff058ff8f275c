"""The tiles of the backward's kernels that aren't in ``tiles``: a static table, as there.

* ``one_gemm``, ``dx``: the product of ``gemm``, with and without producers. Dropout takes more registers: its entry,
  where it has one, is under the name with ``_slim``.
* ``g``: the pass over g for v and T at once.

Every entry compiles without spills, within its family's shared memory and, for 16-bit products, to that family's own
matrix instructions at its largest rank; a test holds it to that without a GPU. The choice is calculated, not measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

from torch import Tensor

from adalora_kernels.backends.triton import tiles
from adalora_kernels.backends.triton.tiles import Configuration, Family, Tile, Width
from adalora_kernels.reference.svd_linear import Adapter

# kernel, width -> largest rank -> tile. A dimension that the kernel does not block is 0.
_Table = dict[tuple[str, Width], dict[int, Tile]]

_SINGLE: _Table = {
    ("one_gemm", Width.SINGLE): {64: Tile(16, 16, 16, 8, 2)},
    ("dx", Width.SINGLE): {32: Tile(64, 16, 64, 8, 2), 128: Tile(16, 16, 64, 8, 2)},
    ("g", Width.SINGLE): {32: Tile(32, 32, 0, 8, 2)},
}
_TABLES: dict[Family, _Table] = {
    Family.AMPERE: _SINGLE
    | {
        ("one_gemm", Width.HALF): {16: Tile(64, 32, 64, 8, 3), 64: Tile(64, 32, 32, 8, 3)},
        ("one_gemm", Width.MIXED): {16: Tile(32, 32, 32, 8, 2), 64: Tile(32, 16, 32, 8, 2)},
        ("dx", Width.HALF): {64: Tile(128, 32, 64, 8, 2), 128: Tile(64, 32, 64, 8, 3)},
        ("dx", Width.MIXED): {64: Tile(64, 32, 64, 8, 2), 128: Tile(64, 32, 32, 8, 2)},
        ("g", Width.HALF): {32: Tile(64, 128, 0, 8, 3)},
        ("g", Width.MIXED): {32: Tile(64, 64, 0, 8, 2)},
    },
    Family.HOPPER: _SINGLE
    | {
        ("one_gemm", Width.HALF): {16: Tile(128, 64, 256, 8, 3), 64: Tile(128, 64, 128, 8, 3)},
        ("one_gemm_slim", Width.HALF): {64: Tile(128, 64, 64, 8, 3)},
        ("one_gemm", Width.MIXED): {64: Tile(64, 64, 64, 8, 2)},
        ("dx", Width.HALF): {64: Tile(128, 64, 256, 8, 3), 128: Tile(128, 64, 128, 8, 4)},
        ("dx_slim", Width.HALF): {128: Tile(128, 64, 64, 8, 3)},
        ("dx", Width.MIXED): {128: Tile(64, 64, 64, 8, 2)},
        ("g", Width.HALF): {32: Tile(64, 256, 0, 8, 3)},
        ("g", Width.MIXED): {32: Tile(64, 128, 0, 8, 2)},
    },
    Family.BLACKWELL: _SINGLE
    | {
        ("one_gemm", Width.HALF): {
            16: Tile(128, 64, 128, 4, 3),
            32: Tile(128, 64, 128, 8, 3),
            64: Tile(64, 64, 128, 8, 3),
        },
        ("one_gemm_slim", Width.HALF): {64: Tile(128, 64, 64, 8, 3)},
        ("one_gemm", Width.MIXED): {64: Tile(64, 64, 64, 8, 2)},
        ("dx", Width.HALF): {64: Tile(128, 64, 256, 8, 2), 128: Tile(128, 128, 128, 8, 2)},
        ("dx_slim", Width.HALF): {128: Tile(128, 64, 64, 8, 3)},
        ("dx", Width.MIXED): {128: Tile(64, 64, 64, 8, 2)},
        ("g", Width.HALF): {32: Tile(64, 256, 0, 8, 3)},
        ("g", Width.MIXED): {32: Tile(64, 128, 0, 8, 2)},
    },
}


@cache
def largest_rank(kernel: str) -> int:
    """The rank up to which a kernel has tiles, whatever the family and width."""
    return min(max(by_rank) for table in _TABLES.values() for (name, _), by_rank in table.items() if name == kernel)


@cache
def lookup(kernel: str, family: Family, width: Width, r: int, slim: bool = False) -> Tile:
    """The table's tile for a kernel; ``slim``: with dropout.

    Raises:
        ValueError: the rank is above ``largest_rank(kernel)``.
    """
    table = _TABLES[family]
    by_rank = table[kernel, width]
    if slim:
        by_rank = table.get((f"{kernel}_slim", width), by_rank)
    for max_rank, tile in by_rank.items():
        if r <= max_rank:
            return tile
    raise ValueError(f"lora_A: expected a rank of at most {largest_rank(kernel)} for {kernel}, got {r}")


def choose(kernel: str, adapter: Adapter, *operands: Tensor, slim: bool = False, wide_loads: bool = True) -> Tile:
    """The tile for one launch of "one_gemm", "dx" or "g" on these operands: measured, or else the table's.

    Without ``wide_loads`` (of 16 bytes) elements pass through registers, as those that are rounded on the way in do.

    Raises:
        TypeError: the products are neither fp32, fp16 nor bf16.
        ValueError: the rank is above ``largest_rank(kernel)``.
    """
    device, rank = operands[0].device, adapter.lora_A.shape[0]
    width = tiles.operand_width(adapter.compute_dtype, *operands)
    if width is Width.HALF and not wide_loads:
        width = Width.MIXED
    tile = tiles.measured_tile(kernel, tiles.capability_of(device), width, rank)
    tile = tile or lookup(kernel, tiles.device_family(device), width, rank, slim)
    # The table's pipelines hold elements of up to 32 bits.
    wide = any(t.itemsize > 4 for t in (*operands, adapter.lora_A, adapter.lora_B))
    return replace(tile, num_stages=1) if wide else tile


def configurations() -> Iterator[Configuration]:
    """Every entry of the table."""
    for family, table in _TABLES.items():
        for (kernel, width), by_rank in table.items():
            for max_rank, tile in by_rank.items():
                yield Configuration(kernel, family, width, max_rank, tile)


__all__ = ["choose", "configurations", "largest_rank", "lookup"]
