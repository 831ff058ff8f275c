"""What each plan costs on the device, calculated: the choice for as long as nothing has been measured.

A product takes the longer of its arithmetic and its traffic, a pass over a matrix its bytes, and each launch a gap on
the stream. Of a family only the ratio of arithmetic to bandwidth matters. Hopper's figures were measured on an H100
(8192³ in bf16; a copy), the others are the vendor's peaks times the share that the H100 reaches of its own.
"""

from __future__ import annotations

from typing import NamedTuple

from adalora_kernels.backends.triton import tiles
from adalora_kernels.backends.triton.problem import Problem
from adalora_kernels.backends.triton.tiles import Family, Width


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
# The speed of a product of ours beside cuBLAS's: published Triton figures on Hopper, not persistent with pointers and
# persistent with descriptors.
_POINTERS, _DESCRIPTORS = 0.86, 0.97


def frozen(p: Problem) -> float:
    """x Wᵀ, or g W, by cuBLAS alone, in s."""
    return _LAUNCH + _product(p, 0)


def one_pass(p: Problem) -> float:
    """Each column of tiles computes u anew, in an extra product of the rank's width."""
    columns = -(-p.out_features // tiles.lookup("one_pass", p.family, p.width, p.rank).block_n)
    return _LAUNCH + _product(p, columns * p.in_features + p.out_features, _POINTERS)


def delta(p: Problem) -> float:
    """x is read once, the base's output read and written."""
    return (
        _LAUNCH + _pass(p, p.in_features, p.x_dtype.itemsize) + _pass(p, p.out_features, 2 * p.compute_dtype.itemsize)
    )


def split(p: Problem) -> float:
    """dx by cuBLAS; g is read for v and for T, x and dx are read and dx written for dA and the low-rank term of dx."""
    compute = p.compute_dtype.itemsize
    through_g = _pass(p, p.out_features, 2 * compute)
    through_x = _pass(p, p.in_features, p.x_dtype.itemsize + (2 * compute if p.need_x else 0))
    dx = frozen(p) if p.need_x and p.weight_dtype is not None else 0.0
    return dx + 4 * _LAUNCH + through_g + through_x


def _pass(p: Problem, columns: int, itemsize: int) -> float:
    """A pass over [M, columns] that moves ``itemsize`` bytes of each element."""
    return p.tokens * columns * itemsize / _SPEEDS[p.family].memory


def _product(p: Problem, extra: int, quality: float = 1.0) -> float:
    """[M, K] by [K, N], with ``extra`` columns' worth of products of the rank's width, each M elements long."""
    speed = _SPEEDS[p.family]
    peak = speed.single if p.width is Width.SINGLE else speed.half
    columns = tiles.rank_block(p.rank) * extra if p.rank else 0
    arithmetic = 2 * p.tokens * (p.in_features * p.out_features + columns) / (peak * quality)
    weight = p.weight_dtype.itemsize if p.weight_dtype is not None else 0
    traffic = p.in_features * p.out_features * weight / speed.memory
    traffic += _pass(p, p.in_features, p.x_dtype.itemsize) + _pass(p, p.out_features, p.compute_dtype.itemsize)
    return max(arithmetic, traffic)


__all__ = ["delta", "frozen", "one_pass", "split"]
