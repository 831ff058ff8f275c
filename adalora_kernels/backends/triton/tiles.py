"""Which tile each kernel runs with: a static table by device family, operand width and rank; no tuning at run time.

What was measured on a device (``measured``) goes before the table, whose entries are calculated.

Every entry compiles without spills, within its family's shared memory and, for 16-bit products, to that family's own
matrix instructions at its largest rank, with fp32 adapters, mask and dropout; a test holds it to that without a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from functools import cache

import torch
from torch import Tensor

from adalora_kernels.backends.select import MAX_TRITON_RANK
from adalora_kernels.backends.triton import measured

MAX_RANK = MAX_TRITON_RANK
GROUP_M = 8  # row blocks that are in flight together


class Family(str, Enum):
    """Devices that share a table. Any without a table of its own takes Ampere's, which fits 99 KiB of shared memory."""

    AMPERE = "ampere"
    HOPPER = "hopper"
    BLACKWELL = "blackwell"


class Width(str, Enum):
    """What the main loop loads and multiplies."""

    HALF = "half"  # 16-bit products of 16-bit operands
    MIXED = "mixed"  # 16-bit products of wider operands, rounded on the way in (autocast)
    SINGLE = "single"  # fp32 products


@dataclass(frozen=True)
class Tile:
    """One way to launch a kernel: its blocks of tokens, out-features and in-features, its warps and pipeline depth."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    def __str__(self) -> str:
        blocks = "×".join(str(size) for size in (self.block_m, self.block_n, self.block_k) if size)
        return f"{blocks}, {self.num_warps} warps, {self.num_stages} stages"

    @property
    def options(self) -> dict[str, int | bool]:
        """The launch options. Fusing multiply and add is asked for by name: its default differs between versions."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


@dataclass(frozen=True)
class Configuration:
    """An entry of the table: ``kernel`` launched with ``tile`` for ranks up to ``max_rank``."""

    kernel: str
    family: Family
    width: Width
    max_rank: int
    tile: Tile


# kernel, width -> largest rank -> tile. A dimension that the kernel does not block is 0.
_Table = dict[tuple[str, Width], dict[int, Tile]]

_COMMON: _Table = {
    # Products of fp32 run on the FMA units, whose operands lie in registers: the higher the rank, the smaller the tile.
    ("one_pass", Width.SINGLE): {32: Tile(64, 64, 16, 8, 3), 64: Tile(32, 64, 16, 8, 3), 128: Tile(16, 64, 16, 8, 2)},
    ("delta", Width.SINGLE): {128: Tile(16, 64, 32, 8, 2)},
    ("delta", Width.HALF): {128: Tile(64, 64, 64, 8, 2)},
    ("delta", Width.MIXED): {128: Tile(64, 64, 64, 8, 2)},
    ("v", Width.SINGLE): {128: Tile(32, 32, 0, 8, 2)},
    ("t", Width.SINGLE): {128: Tile(32, 32, 0, 8, 2)},
    ("x", Width.SINGLE): {128: Tile(32, 0, 32, 8, 1)},
}
_TABLES: dict[Family, _Table] = {
    Family.AMPERE: _COMMON
    | {
        ("one_pass", Width.HALF): {64: Tile(128, 128, 32, 8, 3), 128: Tile(64, 128, 32, 8, 3)},
        ("one_pass", Width.MIXED): {128: Tile(64, 64, 32, 8, 2)},
        ("v", Width.HALF): {128: Tile(64, 64, 0, 8, 3)},
        ("v", Width.MIXED): {128: Tile(64, 64, 0, 8, 2)},
        ("t", Width.HALF): {128: Tile(64, 64, 0, 8, 3)},
        ("t", Width.MIXED): {128: Tile(64, 64, 0, 8, 2)},
        ("x", Width.HALF): {64: Tile(64, 0, 64, 8, 3), 128: Tile(32, 0, 64, 8, 3)},
        ("x", Width.MIXED): {128: Tile(32, 0, 64, 8, 2)},
    },
    Family.HOPPER: _COMMON
    | {
        ("one_pass", Width.HALF): {
            32: Tile(128, 256, 64, 8, 3),
            64: Tile(128, 128, 64, 8, 3),
            128: Tile(128, 64, 64, 8, 3),
        },
        ("one_pass", Width.MIXED): {128: Tile(128, 64, 32, 8, 3)},
        ("v", Width.HALF): {32: Tile(64, 128, 0, 4, 3), 128: Tile(64, 64, 0, 8, 3)},
        ("v", Width.MIXED): {128: Tile(64, 64, 0, 8, 2)},
        ("t", Width.HALF): {32: Tile(64, 128, 0, 4, 3), 128: Tile(64, 64, 0, 8, 3)},
        ("t", Width.MIXED): {128: Tile(64, 64, 0, 8, 2)},
        ("x", Width.HALF): {64: Tile(64, 0, 128, 8, 3), 128: Tile(64, 0, 64, 8, 3)},
        ("x", Width.MIXED): {128: Tile(64, 0, 64, 8, 2)},
    },
    Family.BLACKWELL: _COMMON
    | {
        ("one_pass", Width.HALF): {64: Tile(128, 256, 64, 8, 3), 128: Tile(128, 128, 64, 8, 3)},
        ("one_pass", Width.MIXED): {128: Tile(128, 64, 32, 8, 3)},
        ("v", Width.HALF): {32: Tile(64, 128, 0, 4, 3), 128: Tile(64, 64, 0, 8, 3)},
        ("v", Width.MIXED): {128: Tile(64, 64, 0, 8, 2)},
        ("t", Width.HALF): {32: Tile(64, 128, 0, 4, 3), 128: Tile(64, 64, 0, 8, 3)},
        ("t", Width.MIXED): {128: Tile(64, 64, 0, 8, 2)},
        ("x", Width.HALF): {64: Tile(64, 0, 64, 8, 3), 128: Tile(64, 0, 64, 8, 2)},
        ("x", Width.MIXED): {32: Tile(64, 0, 64, 4, 3), 128: Tile(64, 0, 64, 8, 2)},
        ("v", Width.SINGLE): {128: Tile(32, 64, 0, 8, 2)},
    },
}
FINISH_TILE = Tile(8, 0, 0, 4, 2)  # sums fp32 partials, the same way for every device, dtype and rank


def rank_padding(r: int) -> int:
    """The row length of u and of the partial sums: R rounded up to a multiple of 16, which wide loads want."""
    return -(-r // 16) * 16


def rank_block(r: int) -> int:
    """The extent of a tile along the rank: a power of two, and at least the 16 that 16-bit matrix instructions take."""
    return max(16, 1 << (r - 1).bit_length()) if r else 16


def width_of(compute_dtype: torch.dtype, *operands: torch.dtype) -> Width:
    """How wide the loads of operands of these dtypes are beside the dtype of the products.

    Raises:
        TypeError: the products are neither fp32, fp16 nor bf16.
    """
    if compute_dtype is torch.float32:
        return Width.SINGLE
    if compute_dtype not in (torch.float16, torch.bfloat16):
        raise TypeError(f"compute_dtype: expected float32, float16 or bfloat16, got {compute_dtype}")
    return Width.MIXED if any(dtype.itemsize > 2 for dtype in operands) else Width.HALF


def operand_width(compute_dtype: torch.dtype, *operands: Tensor | None) -> Width:
    """As ``width_of``, for tensors."""
    return width_of(compute_dtype, *(t.dtype for t in operands if t is not None))


@cache
def capability_of(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of a CUDA device; None where kernels are interpreted, on the CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


@cache
def device_family(device: torch.device) -> Family:
    """The family of a CUDA device; Ampere's where kernels are interpreted, on the CPU."""
    return family_of(capability_of(device))


def family_of(capability: tuple[int, int] | None) -> Family:
    """The family of the devices of a compute capability."""
    families = {9: Family.HOPPER, 10: Family.BLACKWELL}
    return Family.AMPERE if capability is None else families.get(capability[0], Family.AMPERE)


@cache
def multiprocessors(device: torch.device) -> int:
    """Of a CUDA device; few where each program is interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _programs_wanted(device: torch.device) -> int:
    """Programs that fill a device twice over."""
    return 2 * multiprocessors(device) if device.type == "cuda" else 4


def measured_tile(kernel: str, capability: tuple[int, int] | None, width: Width, r: int) -> Tile | None:
    """What was found fastest for a kernel on such a device, which goes before any table; None where nothing was."""
    fields = measured.tile(kernel, capability, width.value, r)
    return None if fields is None else Tile(*fields)


@cache
def lookup(kernel: str, family: Family, width: Width, r: int) -> Tile:
    """The table's tile for a kernel; ValueError where the rank exceeds ``MAX_RANK``."""
    for max_rank, tile in _TABLES[family][kernel, width].items():
        if r <= max_rank:
            return tile
    raise ValueError(f"lora_A: expected a rank of at most {MAX_RANK}, got {r}")


def choose(
    kernel: str, device: torch.device, r: int, compute_dtype: torch.dtype, *operands: Tensor | None, adapter: Tensor
) -> Tile:
    """The tile for one launch.

    Args:
        kernel: "one_pass", "delta", "v", "t" or "x".
        device: of the tensors.
        r: the rank.
        compute_dtype: dtype of the products.
        operands: the large matrices that the kernel loads.
        adapter: the factor that it loads beside them.

    Raises:
        TypeError: the products are neither fp32, fp16 nor bf16.
        ValueError: the rank exceeds ``MAX_RANK``.
    """
    width = operand_width(compute_dtype, *operands)
    tile = measured_tile(kernel, capability_of(device), width, r) or lookup(kernel, device_family(device), width, r)
    # The table's pipelines hold elements of up to 32 bits.
    wide = any(t is not None and t.itemsize > 4 for t in (*operands, adapter))
    return replace(tile, num_stages=1) if wide else tile


def slabs(tokens: int, block_m: int, column_blocks: int, device: torch.device) -> tuple[int, int]:
    """Into how many slabs, at least one, of how many rows a sum over tokens is cut, to fill the device."""
    row_blocks = max(1, -(-tokens // block_m))
    wanted = max(1, min(row_blocks, -(-_programs_wanted(device) // column_blocks)))
    rows = -(-row_blocks // wanted) * block_m
    return -(-row_blocks * block_m // rows), rows


def configurations() -> Iterator[Configuration]:
    """Every entry of the table."""
    for family, table in _TABLES.items():
        for (kernel, width), by_rank in table.items():
            for max_rank, tile in by_rank.items():
                yield Configuration(kernel, family, width, max_rank, tile)


__all__ = [
    "FINISH_TILE",
    "GROUP_M",
    "MAX_RANK",
    "Configuration",
    "Family",
    "Tile",
    "Width",
    "capability_of",
    "choose",
    "configurations",
    "device_family",
    "family_of",
    "lookup",
    "measured_tile",
    "multiprocessors",
    "operand_width",
    "rank_block",
    "rank_padding",
    "slabs",
    "width_of",
]
