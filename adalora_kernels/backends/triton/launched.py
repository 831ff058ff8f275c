"""The kernels that are launched for a problem and their tiles: what ``explain`` says, held to the launches by a test.

Kernels go by their keys in the tables. The second stages of sums, whose tile is the same everywhere, and products of
the BLAS have none. g is taken to come in the dtype of the products, and to be asked for all gradients but dx.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from adalora_kernels.backends.triton import tiles
from adalora_kernels.backends.triton.backward import configurations as backward_tiles
from adalora_kernels.backends.triton.forward import configurations as forward_tiles
from adalora_kernels.backends.triton.problem import Problem
from adalora_kernels.backends.triton.tiles import Tile, Width

_G_PASS = ("g", "t", "v")


def launches(kernel: str, p: Problem) -> bool:
    """Whether a plan that has the kernel launches it for a problem."""
    if kernel in _G_PASS and p.rank > 0:
        return (kernel == "g") == (p.rank <= backward_tiles.largest_rank("g"))
    if kernel == "dx" and not (p.need_x and p.weight_dtype is not None):
        return False
    return p.rank > 0 or kernel in ("one_pass", "gemm")


def tile(kernel: str, p: Problem) -> Tile:
    """The tile of a kernel that is launched: as measured on such a device, else the table's."""
    operands = [dtype for dtype in _operands(kernel, p) if dtype is not None]
    width = tiles.width_of(p.compute_dtype, *operands)
    multiplies = kernel in ("gemm", "one_gemm", "dx")
    narrow_rows = (multiplies and not p.aligned) or (kernel == "shrink" and p.in_features % 8 > 0)
    if width is Width.HALF and narrow_rows:
        width = Width.MIXED
    found = tiles.measured_tile(kernel, p.capability, width, p.rank) or _of_table(kernel, p, width)
    # The tables' pipelines hold elements of up to 32 bits.
    wide = any(dtype.itemsize > 4 for dtype in (*operands, p.adapter_dtype))
    return replace(found, num_stages=1) if wide else found


def _operands(kernel: str, p: Problem) -> tuple[torch.dtype | None, ...]:
    """The large matrices that a kernel loads, g and y aside."""
    if kernel in ("delta", "shrink", "x"):
        return (p.x_dtype,)
    return () if kernel in (*_G_PASS, "low_rank") else (p.x_dtype, p.weight_dtype)


def _of_table(kernel: str, p: Problem, width: Width) -> Tile:
    if kernel == "gemm":
        return forward_tiles.lookup(kernel, p.family, width, p.rank, p.tokens, p.out_features, p.programs)
    if kernel in ("shrink", "low_rank"):
        return forward_tiles.lookup(kernel, p.family, width, p.rank)
    if kernel in ("one_gemm", "dx", "g"):
        slim = kernel != "g" and (p.dropout or not p.describable)
        return backward_tiles.lookup(kernel, p.family, width, p.rank, slim)
    return tiles.lookup(kernel, p.family, width, p.rank)


__all__ = ["launches", "tile"]
