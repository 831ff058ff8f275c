"""What a tile is, which devices and loads share one, and the sizes that follow from a rank or a device.

Which tile a kernel runs with is said in ``configurations``.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import cache

import torch
from torch import Tensor

from adalora_kernels.backends.select import MAX_TRITON_RANK

MAX_RANK = MAX_TRITON_RANK
GROUP_M = 8  # row blocks that are in flight together


class Family(str, Enum):
    """Devices that share tiles. Any other takes Ampere's, which fit 99 KiB of shared memory."""

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


def slabs(tokens: int, block_m: int, column_blocks: int, device: torch.device) -> tuple[int, int]:
    """Into how many slabs, at least one, of how many rows a sum over tokens is cut, to fill the device."""
    row_blocks = max(1, -(-tokens // block_m))
    wanted = max(1, min(row_blocks, -(-_programs_wanted(device) // column_blocks)))
    rows = -(-row_blocks // wanted) * block_m
    return -(-row_blocks * block_m // rows), rows


__all__ = [
    "GROUP_M",
    "MAX_RANK",
    "Family",
    "Tile",
    "Width",
    "capability_of",
    "device_family",
    "family_of",
    "multiprocessors",
    "operand_width",
    "rank_block",
    "rank_padding",
    "slabs",
    "width_of",
]
