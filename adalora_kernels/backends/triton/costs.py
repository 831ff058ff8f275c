"""What each plan costs on the device, calculated: the choice for as long as nothing has been measured.

A product takes the longer of its arithmetic and its traffic, a pass over a matrix its bytes, and each launch a gap on
the stream. Only the ratios of these count. Hopper's figures were measured on an H100 (8192³ in bf16; a copy), the other
families' are the vendor's peaks times the share that the H100 reaches of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from adalora_kernels.backends.triton.problem import Problem
from adalora_kernels.backends.triton.tiles import Family, Width, rank_block, rank_padding


class _Speed(NamedTuple):
    half: float  # FLOP/s of 16-bit products
    single: float  # FLOP/s of fp32 products
    memory: float  # B/s, read plus written


_SPEEDS = {
    Family.AMPERE: _Speed(250e12, 16e12, 1.8e12),
    Family.HOPPER: _Speed(798e12, 54e12, 3.0e12),
    Family.BLACKWELL: _Speed(1800e12, 65e12, 7.2e12),
}
_LAUNCH = 2e-6  # s between the end of one kernel and the start of the next
# s of host time of an eager layer, forward and backward: torch 2.11, Python 3.12 and Triton's own launchers over a CUDA
# driver that does nothing.
HOST = 1.2e-4
# The speed of a Triton product beside cuBLAS's, published figures on Hopper: through pointers; persistent and through
# descriptors.
_POINTERS, _DESCRIPTORS = 0.86, 0.97
_BLOCK = 128  # rows or columns of a tile, where the order of magnitude counts
_ONE_G_PASS = 32  # rank up to which one pass over g makes both v and T
_MOST_SHARES = 32 << 20  # bytes of fp32 shares of T and dA that ``one_gemm`` makes


def frozen(p: Problem) -> float:
    """x Wᵀ, or g W, by cuBLAS alone, in s."""
    return _LAUNCH + _product(p)


def one_pass(p: Problem) -> float:
    """Each column of tiles computes u anew, in a narrow product beside its own."""
    columns = -(-p.out_features // _BLOCK)
    return _LAUNCH + _product(p, columns * p.in_features + p.out_features, _POINTERS)


def published(p: Problem) -> float:
    """One column of tiles computes u, in a narrow product at half the speed of a wide one; all have a tail."""
    return _LAUNCH + _product(p, 2 * p.in_features + p.out_features, _quality(p))


def shrink_tail(p: Problem) -> float:
    """x is read once more, by a launch of its own; all tiles have a tail."""
    return 2 * _LAUNCH + _read_x(p) + _product(p, p.out_features, _quality(p))


def forward_blas(p: Problem) -> float:
    """x is read once more, and y is written before cuBLAS adds to it."""
    if p.rank == 0:
        return _LAUNCH + _copies(p) + _product(p)
    return 3 * _LAUNCH + _copies(p) + _read_x(p) + _pass(p, p.out_features) + _product(p)


def delta(p: Problem) -> float:
    """x is read once, the base's output read and written."""
    return _LAUNCH + _read_x(p) + 2 * _pass(p, p.out_features)


def split(p: Problem) -> float:
    """A pass over g, a product with a tail for dx, a pass over x for dA; without a weight that one writes dx."""
    if p.weight_dtype is None or not p.need_x:
        return 4 * _LAUNCH + _read_g(p) + _read_x(p) + (_pass(p, p.in_features) if p.need_x else 0.0)
    return 5 * _LAUNCH + _read_g(p) + _product(p, p.in_features, _quality(p)) + _read_x(p)


def backward_blas(p: Problem) -> float:
    """As ``split``, but dx by cuBLAS, and then read and written in the pass over x."""
    return 5 * _LAUNCH + _copies(p) + _read_g(p) + _product(p) + _read_x(p) + 2 * _pass(p, p.in_features)


def one_gemm(p: Problem) -> float:
    """v and T in one column of tiles, dA in all: narrow products at half the speed of a wide one. Then their sums."""
    quality = _POINTERS if p.dropout else _quality(p)
    rows = -(-p.tokens // _BLOCK) * (p.in_features + p.out_features)
    shares = min(_MOST_SHARES, rows * rank_padding(p.rank) * 4)
    sums = 2 * shares / _SPEEDS[p.family].memory
    return 2 * _LAUNCH + _product(p, 4 * p.out_features + 3 * p.in_features, quality) + _read_x(p) + sums


def sum_of_dx(p: Problem) -> float:
    """Adding the dx of one layer to that of another."""
    return _LAUNCH + 3 * _pass(p, p.in_features, p.x_dtype.itemsize)


def group_forward(problems: Sequence[Problem], passes: int) -> float:
    """Layers that read the same x: ``shrink_tail``, with ``passes`` over x for all of them."""
    return sum(shrink_tail(p) for p in problems) - _spared(problems, passes, 0)


def group_backward(problems: Sequence[Problem], passes: int) -> float:
    """Their gradients: as ``backward_blas``, each product added to the one before, and ``passes`` over x and dx."""
    p = problems[0]
    if not p.need_x:
        return sum(split(p) for p in problems) - _spared(problems, passes, 0)
    additions = (len(problems) - 1) * _pass(p, p.in_features)
    return sum(backward_blas(p) for p in problems) + additions - _spared(problems, passes, 2)


def _spared(problems: Sequence[Problem], passes: int, over_dx: int) -> float:
    """What launches and passes cost that a group doesn't make: over x, and ``over_dx`` times over dx beside it."""
    p = problems[0]
    return (len(problems) - passes) * (_LAUNCH + _read_x(p) + over_dx * _pass(p, p.in_features))


def _product(p: Problem, narrow: int = 0, quality: float = 1.0) -> float:
    """[M, K] by [K, N] or [M, N] by [N, K], and ``narrow`` times M products of the rank's width beside it."""
    speed = _SPEEDS[p.family]
    peak = speed.single if p.width is Width.SINGLE else speed.half
    products = p.in_features * p.out_features + (rank_block(p.rank) * narrow if p.rank else 0)
    weight = p.weight_dtype.itemsize if p.weight_dtype is not None else 0
    traffic = p.in_features * p.out_features * weight / speed.memory
    traffic += _pass(p, p.in_features, p.x_dtype.itemsize) + _pass(p, p.out_features)
    return max(2 * p.tokens * products / (peak * quality), traffic)


def _quality(p: Problem) -> float:
    """Of a persistent product, by whether its operands go through descriptors."""
    return _DESCRIPTORS if p.describable else _POINTERS


def _pass(p: Problem, columns: int, itemsize: int | None = None) -> float:
    """Moving [M, columns] once, in the dtype of the products unless an element is said to have ``itemsize`` bytes."""
    return p.tokens * columns * (itemsize or p.compute_dtype.itemsize) / _SPEEDS[p.family].memory


def _read_x(p: Problem) -> float:
    return _pass(p, p.in_features, p.x_dtype.itemsize) if p.rank else 0.0


def _read_g(p: Problem) -> float:
    """v and T: g once and fp32 shares of v for each block of columns, or g twice."""
    if p.rank > _ONE_G_PASS:
        return 2 * _pass(p, p.out_features)
    shares = -(-p.out_features // _BLOCK) * rank_padding(p.rank)
    return _pass(p, p.out_features) + _pass(p, 2 * shares, 4)


def _copies(p: Problem) -> float:
    """What the BLAS takes only in the dtype of the products is copied in it first: read, written."""
    seconds = 0.0
    if p.x_dtype != p.compute_dtype:
        seconds += _LAUNCH + _pass(p, p.in_features, p.x_dtype.itemsize + p.compute_dtype.itemsize)
    if p.weight_dtype not in (None, p.compute_dtype):
        itemsize = p.weight_dtype.itemsize + p.compute_dtype.itemsize
        seconds += _LAUNCH + p.in_features * p.out_features * itemsize / _SPEEDS[p.family].memory
    return seconds


__all__ = [
    "backward_blas",
    "delta",
    "forward_blas",
    "frozen",
    "group_backward",
    "group_forward",
    "one_gemm",
    "one_pass",
    "published",
    "shrink_tail",
    "split",
    "sum_of_dx",
]
