"""The tiles of the kernels that ``published``, ``shrink_tail`` and ``blas`` are made of: a static table.

* ``gemm``: the persistent product. HALF holds for 16-bit operands with rows at multiples of 16 bytes, which descriptors
  and wide loads can move; operands without take the tiles of MIXED.
* ``shrink``: u = drop(x) Aᵀ, by row blocks.
* ``low_rank``: (u ⊙ λ) Bᵀ + b.

Every entry compiles without spills, within its family's shared memory and, for 16-bit products, to that family's own
matrix instructions at its largest rank; a test holds it to that without a GPU. The choice is calculated, not measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache, lru_cache

from torch import Tensor

from adalora_kernels.backends.triton import tiles
from adalora_kernels.backends.triton.tiles import MAX_RANK, Configuration, Family, Tile, Width

# kernel, width -> largest rank -> tile. A dimension that the kernel does not block is 0.
_Table = dict[tuple[str, Width], dict[int, Tile]]

_EVERYWHERE: _Table = {
    ("shrink", Width.MIXED): {128: Tile(64, 0, 32, 8, 3)},
    ("shrink", Width.SINGLE): {128: Tile(64, 0, 32, 8, 3)},
    ("low_rank", Width.HALF): {128: Tile(64, 128, 0, 8, 1)},
    ("low_rank", Width.SINGLE): {128: Tile(32, 32, 0, 8, 1)},
}
_WITH_DESCRIPTORS: _Table = _EVERYWHERE | {
    ("gemm", Width.HALF): {32: Tile(128, 256, 64, 8, 4), 64: Tile(128, 128, 64, 8, 4), 128: Tile(64, 128, 64, 8, 4)},
    ("gemm", Width.MIXED): {32: Tile(64, 128, 32, 8, 3), 128: Tile(64, 64, 32, 8, 2)},
    ("shrink", Width.HALF): {128: Tile(64, 0, 64, 8, 4)},
}
_TABLES: dict[Family, _Table] = {
    Family.AMPERE: _EVERYWHERE
    | {
        ("gemm", Width.HALF): {64: Tile(128, 128, 32, 8, 4), 128: Tile(64, 128, 32, 8, 3)},
        ("gemm", Width.MIXED): {32: Tile(64, 128, 32, 8, 3), 128: Tile(32, 64, 32, 8, 3)},
        ("gemm", Width.SINGLE): {128: Tile(32, 64, 16, 8, 4)},
        ("shrink", Width.HALF): {128: Tile(64, 0, 64, 8, 3)},
    },
    Family.HOPPER: _WITH_DESCRIPTORS | {("gemm", Width.SINGLE): {128: Tile(32, 64, 16, 8, 3)}},
    Family.BLACKWELL: _WITH_DESCRIPTORS | {("gemm", Width.SINGLE): {128: Tile(32, 64, 16, 8, 4)}},
}


def choose(kernel: str, width: Width, r: int, *operands: Tensor, m: int = 0, n: int = 0, programs: int = 1) -> Tile:
    """The tile for one launch: as measured on such a device, else as in ``lookup``.

    Args:
        kernel: "gemm", "shrink" or "low_rank".
        width: of what its main loop loads.
        r: the rank.
        operands: what it loads, on the device in question.
        m, n, programs: as in ``lookup``.

    Raises:
        ValueError: the rank exceeds ``MAX_RANK``.
    """
    device = operands[0].device
    tile = tiles.measured_tile(kernel, tiles.capability_of(device), width, r)
    tile = tile or lookup(kernel, tiles.device_family(device), width, r, m, n, programs)
    # The table's pipelines hold elements of up to 32 bits.
    return replace(tile, num_stages=1) if any(operand.itemsize > 4 for operand in operands) else tile


def lookup(kernel: str, family: Family, width: Width, r: int, m: int = 0, n: int = 0, programs: int = 1) -> Tile:
    """The table's tile for a kernel: of those that hold the rank, the one that covers [m, n] in the shortest time.

    The time is calculated, for m rounded up to a power of two, so that a choice serves a range of m.

    Raises:
        ValueError: the rank exceeds ``MAX_RANK``.
    """
    return _fastest(_candidates(kernel, family, width, r), 1 << (m - 1).bit_length() if m else 0, n, programs)


@cache
def _candidates(kernel: str, family: Family, width: Width, r: int) -> tuple[Tile, ...]:
    found = tuple(tile for max_rank, tile in _TABLES[family][kernel, width].items() if r <= max_rank)
    if not found:
        raise ValueError(f"lora_A: expected a rank of at most {MAX_RANK}, got {r}")
    return found


@lru_cache(1024)
def _fastest(candidates: tuple[Tile, ...], m: int, n: int, programs: int) -> Tile:
    return min(candidates, key=lambda tile: _clocks(tile, m, n, programs)) if len(candidates) > 1 else candidates[0]


def _clocks(tile: Tile, m: int, n: int, programs: int) -> int:
    """Time of an [m, n] product in units of its inner dimension, by whole waves of tiles.

    For each k a multiprocessor multiplies block_m · block_n pairs at 4096 a clock and loads block_m + block_n elements
    at 32 a clock (16 bits wide, on Hopper), of which the pipeline is taken to hide half.
    """
    waves = -(-(-(-m // tile.block_m) * -(-n // tile.block_n)) // programs)
    return waves * (tile.block_m * tile.block_n + 64 * (tile.block_m + tile.block_n))


def configurations() -> Iterator[Configuration]:
    """Every entry of the table."""
    for family, table in _TABLES.items():
        for (kernel, width), by_rank in table.items():
            for max_rank, tile in by_rank.items():
                yield Configuration(kernel, family, width, max_rank, tile)


__all__ = ["choose", "configurations", "lookup"]
