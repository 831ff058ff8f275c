"""The kernels that are launched for a problem and their tiles: what ``explain`` says, held to the launches by a test.

Kernels go by their keys in the tables. The second stages of sums, whose tile is the same everywhere, and products of
the BLAS have none. g is taken to come in the dtype of the products, and to be asked for all gradients but dx.
"""

from __future__ import annotations

import torch

from adalora_kernels.backends.triton import configurations, tiles
from adalora_kernels.backends.triton.problem import Problem
from adalora_kernels.backends.triton.tiles import Tile, Width

_G_PASS = ("g", "t", "v")
_STACKED = ("group_shrink", "group_x")  # of a stack, which drops nothing
_DROPS = ("one_pass", "gemm", "shrink", "delta", "one_gemm", "dx", "x")  # elements, where the call has dropout
_PRODUCTS = ("gemm", "one_gemm", "dx")  # whose loads and stores take whole rows of x, W, y and g
_ALONG_K = ("one_pass", "shrink", "group_shrink", "x")  # whose loads take whole rows of x


def launches(kernel: str, p: Problem) -> bool:
    """Whether a plan that has the kernel launches it for a problem."""
    if kernel in _G_PASS and p.rank > 0:
        return (kernel == "g") == (p.rank <= configurations.largest_rank("g"))
    if kernel == "dx" and not (p.need_x and p.weight_dtype is not None):
        return False
    return p.rank > 0 or kernel in ("one_pass", "gemm")


def tile(kernel: str, p: Problem) -> Tile:
    """The tile of a kernel that is launched; of a stack's, the problem's rank is the stack's."""
    operands = [dtype for dtype in _operands(kernel, p) if dtype is not None]
    width = tiles.width_of(p.compute_dtype, *operands)
    narrow_rows = (kernel in _PRODUCTS and not p.aligned) or (kernel in _ALONG_K and p.in_features % 8 > 0)
    narrow_rows |= kernel == "one_pass" and p.transposed and p.out_features % 8 > 0
    if width is Width.HALF and narrow_rows:
        width = Width.MIXED
    wide = any(dtype.itemsize > 4 for dtype in (*operands, p.adapter_dtype))
    dropout = p.dropout and kernel in _DROPS
    m, n = (p.tokens, p.out_features) if kernel == "gemm" else (0, 0)
    return configurations.tile_of(kernel, p.family, p.capability, width, p.rank, dropout, wide, m, n, p.programs)


def _operands(kernel: str, p: Problem) -> tuple[torch.dtype | None, ...]:
    """The large matrices that a kernel loads, g and y aside."""
    if kernel in ("delta", "shrink", "x", *_STACKED):
        return (p.x_dtype,)
    return () if kernel in (*_G_PASS, "low_rank") else (p.x_dtype, p.weight_dtype)


__all__ = ["launches", "tile"]
