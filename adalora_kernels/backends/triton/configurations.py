"""Which tile each kernel runs with: one table, by device family, loads and rank, and the one chooser that reads it.

What was measured on a device (``measured``) goes before the table, whose choice is calculated. Nothing is tuned at run
time.

Every row compiles without spills, within its families' shared memory and, for 16-bit products, to their own matrix
instructions, at its largest rank: with fp32 adapters, mask and, where no other row is for it, dropout, and with 16-bit
adapters alone. A test holds it to that without a GPU, and likewise what was measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import NamedTuple

from torch import Tensor

from adalora_kernels.backends.triton import measured, tiles
from adalora_kernels.backends.triton.tiles import MAX_RANK, Family, Tile, Width
from adalora_kernels.reference.handover import POSITIONS

MOST = 6  # rows of a kernel on any family, and tiles measured for it on any device
# The second stage of every sum: fp32 shares, whatever the device and the operands; in pieces as importance is summed.
FINISH = Tile(POSITIONS, 0, 0, 4, 2)
# Warps, and the most registers, of the one that updates importance too, by the extent of its tile along the rank. Left
# to itself the assembler spills to have more programs on a multiprocessor.
FINISH_WITH_IMPORTANCE = {16: (4, 96), 32: (4, 128), 64: (8, 128), 128: (8, 184)}

_A, _H, _B = (Family.AMPERE,), (Family.HOPPER,), (Family.BLACKWELL,)
_HB, _ALL = _H + _B, tuple(Family)
_HALF, _MIXED, _SINGLE = Width.HALF, Width.MIXED, Width.SINGLE


class _Row(NamedTuple):
    """Tiles of a kernel by the largest rank that each holds; ``dropout``: for calls that drop elements, alone."""

    kernel: str
    width: Width
    families: tuple[Family, ...]
    tiles: dict[int, Tile]
    dropout: bool = False


# A dimension that a kernel does not block is 0. Of matrices whose rows are no whole 16 bytes the loads are narrow and
# their elements pass through registers: one_pass, gemm, shrink, one_gemm, dx and x take their MIXED tiles for them.
# Products of fp32 run on the FMA units, whose operands lie in registers: the higher the rank, the smaller the tile.
_ROWS = (
    # y and u at once, u made anew by every tile
    _Row("one_pass", _HALF, _A, {64: Tile(128, 128, 32, 8, 3), 128: Tile(64, 128, 32, 8, 3)}),
    _Row(
        "one_pass",
        _HALF,
        _H,
        {32: Tile(128, 256, 64, 8, 3), 64: Tile(128, 128, 64, 8, 3), 128: Tile(128, 64, 64, 8, 3)},
    ),
    _Row("one_pass", _HALF, _B, {64: Tile(128, 256, 64, 8, 3), 128: Tile(128, 128, 64, 8, 3)}),
    _Row("one_pass", _MIXED, _A, {128: Tile(64, 64, 32, 8, 2)}),
    _Row("one_pass", _MIXED, _HB, {128: Tile(128, 64, 32, 8, 3)}),
    _Row("one_pass", _SINGLE, _ALL, {32: Tile(64, 64, 16, 8, 3), 128: Tile(16, 64, 16, 8, 2)}),
    # the persistent product with a low-rank tail; of its tiles the shape decides, too
    _Row("gemm", _HALF, _A, {64: Tile(128, 128, 32, 8, 4), 128: Tile(64, 128, 32, 8, 3)}),
    _Row(
        "gemm",
        _HALF,
        _HB,
        {32: Tile(128, 256, 64, 8, 4), 64: Tile(128, 128, 64, 8, 4), 128: Tile(64, 128, 64, 8, 4)},
    ),
    _Row("gemm", _MIXED, _A, {32: Tile(64, 128, 32, 8, 3), 128: Tile(32, 64, 32, 8, 3)}),
    _Row("gemm", _MIXED, _HB, {32: Tile(64, 128, 32, 8, 3), 128: Tile(64, 64, 32, 8, 2)}),
    _Row("gemm", _SINGLE, _A + _B, {128: Tile(32, 64, 16, 8, 4)}),
    _Row("gemm", _SINGLE, _H, {128: Tile(32, 64, 16, 8, 3)}),
    # u = drop(x) Aᵀ, by row blocks
    _Row("shrink", _HALF, _A, {128: Tile(64, 0, 64, 8, 3)}),
    _Row("shrink", _HALF, _HB, {128: Tile(64, 0, 64, 8, 4)}),
    _Row("shrink", _MIXED, _ALL, {128: Tile(64, 0, 32, 8, 3)}),
    _Row("shrink", _SINGLE, _ALL, {128: Tile(64, 0, 16, 8, 3)}),
    # (u ⊙ λ) Bᵀ + b
    _Row("low_rank", _HALF, _ALL, {128: Tile(64, 128, 0, 8, 1)}),
    _Row("low_rank", _SINGLE, _ALL, {128: Tile(32, 32, 0, 8, 1)}),
    # the low-rank increment of any base's output, in place
    _Row("delta", _HALF, _ALL, {128: Tile(64, 64, 64, 8, 2)}),
    _Row("delta", _MIXED, _ALL, {128: Tile(64, 64, 64, 8, 2)}),
    _Row("delta", _SINGLE, _ALL, {128: Tile(16, 64, 16, 8, 2)}),
    # dx with its low-rank tail, and v, T and dA on its way
    _Row("one_gemm", _HALF, _A, {16: Tile(64, 32, 64, 8, 3), 64: Tile(64, 32, 32, 8, 3)}),
    _Row("one_gemm", _HALF, _H, {16: Tile(128, 64, 256, 8, 3), 64: Tile(128, 64, 128, 8, 3)}),
    _Row(
        "one_gemm",
        _HALF,
        _B,
        {16: Tile(128, 64, 128, 4, 3), 32: Tile(128, 64, 128, 8, 3), 64: Tile(64, 64, 128, 8, 3)},
    ),
    _Row("one_gemm", _HALF, _HB, {64: Tile(128, 64, 64, 8, 3)}, dropout=True),
    _Row("one_gemm", _MIXED, _A, {16: Tile(32, 32, 32, 8, 2), 64: Tile(32, 16, 32, 8, 2)}),
    _Row("one_gemm", _MIXED, _HB, {64: Tile(64, 64, 64, 8, 2)}),
    _Row("one_gemm", _SINGLE, _ALL, {64: Tile(16, 16, 16, 8, 2)}),
    # dx alone, with its low-rank tail
    _Row("dx", _HALF, _A, {64: Tile(128, 32, 64, 8, 2), 128: Tile(64, 64, 64, 8, 2)}),
    _Row("dx", _HALF, _H, {64: Tile(128, 64, 256, 8, 3), 128: Tile(128, 64, 128, 8, 4)}),
    _Row("dx", _HALF, _B, {64: Tile(128, 64, 256, 8, 2), 128: Tile(128, 128, 128, 8, 2)}),
    _Row("dx", _HALF, _HB, {128: Tile(128, 64, 64, 8, 3)}, dropout=True),
    _Row("dx", _MIXED, _A, {64: Tile(64, 32, 64, 8, 2), 128: Tile(64, 32, 32, 8, 2)}),
    _Row("dx", _MIXED, _HB, {128: Tile(64, 64, 64, 8, 2)}),
    _Row("dx", _SINGLE, _ALL, {32: Tile(64, 16, 64, 8, 2), 128: Tile(16, 16, 64, 8, 2)}),
    # the pass over g for v and T at once, and the passes for one of the two
    _Row("g", _HALF, _A, {32: Tile(64, 128, 0, 8, 3)}),
    _Row("g", _HALF, _H, {32: Tile(64, 256, 0, 8, 3)}),
    _Row("g", _HALF, _B, {32: Tile(128, 128, 0, 4, 3)}),
    _Row("g", _MIXED, _A, {32: Tile(64, 64, 0, 8, 2)}),
    _Row("g", _MIXED, _HB, {32: Tile(64, 128, 0, 8, 2)}),
    _Row("g", _SINGLE, _ALL, {32: Tile(32, 32, 0, 8, 2)}),
    _Row("v", _HALF, _A, {128: Tile(64, 64, 0, 8, 3)}),
    _Row("v", _HALF, _HB, {32: Tile(64, 128, 0, 4, 3), 128: Tile(64, 64, 0, 8, 3)}),
    _Row("v", _MIXED, _ALL, {128: Tile(64, 64, 0, 8, 2)}),
    _Row("v", _SINGLE, _A + _H, {128: Tile(32, 32, 0, 8, 2)}),
    _Row("v", _SINGLE, _B, {128: Tile(32, 64, 0, 8, 2)}),
    _Row("t", _HALF, _A, {128: Tile(64, 64, 0, 8, 3)}),
    _Row("t", _HALF, _HB, {32: Tile(64, 128, 0, 4, 3), 128: Tile(64, 64, 0, 8, 3)}),
    _Row("t", _MIXED, _ALL, {128: Tile(64, 64, 0, 8, 2)}),
    _Row("t", _SINGLE, _ALL, {128: Tile(32, 32, 0, 8, 2)}),
    # the pass over x for dA and the low-rank term of dx
    _Row("x", _HALF, _A, {64: Tile(64, 0, 64, 8, 3), 128: Tile(32, 0, 64, 8, 3)}),
    _Row("x", _HALF, _H, {64: Tile(64, 0, 128, 8, 3), 128: Tile(64, 0, 64, 8, 3)}),
    _Row("x", _HALF, _B, {64: Tile(64, 0, 64, 8, 3), 128: Tile(64, 0, 64, 8, 2)}),
    _Row("x", _MIXED, _A, {128: Tile(32, 0, 64, 8, 2)}),
    _Row("x", _MIXED, _H, {128: Tile(64, 0, 64, 8, 2)}),
    _Row("x", _MIXED, _B, {32: Tile(64, 0, 64, 8, 3), 128: Tile(64, 0, 64, 8, 2)}),
    _Row("x", _SINGLE, _ALL, {128: Tile(32, 0, 32, 8, 1)}),
    # the second stage of the sums of dA, dB and dE, and of v
    _Row("finish", _SINGLE, _ALL, {MAX_RANK: FINISH}),
    _Row("sum_v", _HALF, _ALL, {32: FINISH}),
)
# Kernels of a stack take the rows of their single layers' until they are measured; their rank is the stack's.
_STACKED = {"group_shrink": "shrink", "group_x": "x"}


@dataclass(frozen=True)
class Configuration:
    """A kernel with a tile that some call may take.

    Attributes:
        kernel: a name of the table.
        family: whose row it is, or of the device that it was measured on.
        width: of the loads.
        max_rank: the largest rank that it serves.
        tile: what is launched.
        dropout: whether it serves calls that drop elements; None: them as well as others.
        capability, triton: of the device, and the minor version, that it was measured with; None in the table.
    """

    kernel: str
    family: Family
    width: Width
    max_rank: int
    tile: Tile
    dropout: bool | None = None
    capability: tuple[int, int] | None = None
    triton: str | None = None


@cache
def largest_rank(kernel: str) -> int:
    """The rank up to which a kernel has tiles, whatever the family and width."""
    return min(max(row.tiles) for row in _ROWS if row.kernel == _STACKED.get(kernel, kernel))


def lookup(
    kernel: str,
    family: Family,
    width: Width,
    r: int,
    dropout: bool = False,
    m: int = 0,
    n: int = 0,
    programs: int = 1,
) -> Tile:
    """The table's tile for a kernel: the first that holds the rank, or the fastest for an [m, n] product.

    Its time is calculated, for m rounded up to a power of two, so that a choice serves a range of m.

    Raises:
        ValueError: the rank exceeds that of every row.
    """
    candidates = _candidates(kernel, family, width, r, dropout)
    if n == 0 or len(candidates) == 1:
        return candidates[0]
    return _fastest(candidates, 1 << (m - 1).bit_length() if m else 0, n, programs)


@cache
def _candidates(kernel: str, family: Family, width: Width, r: int, dropout: bool) -> tuple[Tile, ...]:
    rows = [row for row in _ROWS if (row.kernel, row.width) == (_STACKED.get(kernel, kernel), width)]
    rows = [row for row in rows if family in row.families]
    own = [row for row in rows if row.dropout is dropout] or rows
    found = tuple(tile for row in own for max_rank, tile in row.tiles.items() if r <= max_rank)
    if not found:
        raise ValueError(f"lora_A: expected a rank of at most {max(max(row.tiles) for row in own)}, got {r}")
    return found


@lru_cache(1024)
def _fastest(candidates: tuple[Tile, ...], m: int, n: int, programs: int) -> Tile:
    return min(candidates, key=lambda tile: _clocks(tile, m, n, programs))


def _clocks(tile: Tile, m: int, n: int, programs: int) -> int:
    """Time of an [m, n] product in units of its inner dimension, by whole waves of tiles.

    For each k a multiprocessor multiplies block_m · block_n pairs at 4096 a clock and loads block_m + block_n elements
    at 32 a clock (16 bits wide, on Hopper), of which the pipeline is taken to hide half.
    """
    waves = -(-(-(-m // tile.block_m) * -(-n // tile.block_n)) // programs)
    return waves * (tile.block_m * tile.block_n + 64 * (tile.block_m + tile.block_n))


def tile_of(
    kernel: str,
    family: Family,
    capability: tuple[int, int] | None,
    width: Width,
    r: int,
    dropout: bool = False,
    wide: bool = False,
    m: int = 0,
    n: int = 0,
    programs: int = 1,
) -> Tile:
    """The tile of a kernel on such a device: measured, else as in ``lookup``; ``wide``: for elements of over 4 bytes.

    What is measured was timed without dropout, and serves only calls without; and on products with tiles for every
    multiprocessor, and serves none with fewer.

    Raises:
        ValueError: the rank exceeds that of every row.
    """
    fields = measured.tile(kernel, capability, width.value, r, dropout)
    if fields and n and -(-m // fields[0]) * -(-n // fields[1]) < programs and not measured.on_trial():
        fields = None
    tile = Tile(*fields) if fields else lookup(kernel, family, width, r, dropout, m, n, programs)
    return replace(tile, num_stages=1) if wide else tile  # the pipelines hold elements of up to 32 bits


def choose(kernel: str, width: Width, r: int, *operands: Tensor, dropout: bool = False, m: int = 0, n: int = 0) -> Tile:
    """The tile for one launch.

    Args:
        kernel: a name of the table, or of a stack's kernel.
        width: of what its main loop loads.
        r: the rank.
        operands: what it loads, the factors too, on the device in question.
        dropout: whether elements of x may be dropped, where the kernel has to do with them.
        m, n: of the product, where its shape decides between tiles.

    Raises:
        ValueError: the rank exceeds that of every row.
    """
    device = operands[0].device
    wide = any(operand.itemsize > 4 for operand in operands)
    family, programs = tiles.device_family(device), tiles.multiprocessors(device)
    return tile_of(kernel, family, tiles.capability_of(device), width, r, dropout, wide, m, n, programs)


def configurations() -> Iterator[Configuration]:
    """Every tile that a call may take: the table's, those of stacks too, then all that were measured."""
    split = {(row.kernel, row.width, family) for row in _ROWS if row.dropout for family in row.families}
    stacked = (row._replace(kernel=name) for name, kernel in _STACKED.items() for row in _ROWS if row.kernel == kernel)
    for row in (*_ROWS, *stacked):
        for family in row.families:
            dropout = row.dropout if (row.kernel, row.width, family) in split else None
            for max_rank, tile in row.tiles.items():
                yield Configuration(row.kernel, family, row.width, max_rank, tile, dropout)
    for (capability, triton), table in measured.tables().items():
        major, minor = map(int, capability.split("."))
        family = tiles.family_of((major, minor))
        for (kernel, width), by_rank in table.tiles.items():
            for max_rank, fields in by_rank.items():
                about = (False, (major, minor), triton)
                yield Configuration(kernel, family, Width(width), max_rank, Tile(*fields), *about)


__all__ = [
    "FINISH",
    "FINISH_WITH_IMPORTANCE",
    "MOST",
    "Configuration",
    "choose",
    "configurations",
    "largest_rank",
    "lookup",
    "tile_of",
]
