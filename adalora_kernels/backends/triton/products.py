"""What forward and backward kernels share: the product of tiles, steps from one to the next, rounding, and λ."""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TRITON_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def rounded(value, DTYPE: tl.constexpr):
    """The value in DTYPE, to the nearest."""
    if INTERPRETED and DTYPE.is_bf16():
        # The interpreter would truncate: round the upper half of the word to nearest even beforehand.
        bits = value.to(tl.float32).to(tl.int32, bitcast=True)
        value = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return value.to(DTYPE)


@triton.jit
def product(a, b, acc):
    """acc + a b for tiles of one dtype, accumulated in fp32; fp32 operands are multiplied as such, not as tf32."""
    if INTERPRETED:
        # The interpreter would multiply the bit patterns of bf16 operands.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def step(BLOCK: tl.constexpr, stride):
    """What takes pointers to the next tile, BLOCK rows or columns on; int64, for with far rows it passes 2³¹."""
    return tl.full((), BLOCK, tl.int64) * stride


@triton.jit
def singular_values(e_ptr, mask_ptr, stride_er, stride_mask, scaling, r, R):
    """λ = c · E ⊙ mask of the triplets r, fp32 [BLOCK_R]; 0 past R."""
    values = tl.load(e_ptr + r * stride_er, mask=r < R, other=0.0).to(tl.float32) * scaling
    if mask_ptr is not None:
        values *= tl.load(mask_ptr + r * stride_mask, mask=r < R, other=0).to(tl.float32)
    return values


def strides(tensor: Tensor | None, dims: int) -> tuple[int, ...]:
    """The leading strides of an argument that may be absent (then 0, which no kernel reads)."""
    return (0,) * dims if tensor is None else tensor.stride()[:dims]


__all__ = ["TRITON_DTYPES", "product", "rounded", "singular_values", "step", "strides"]
