"""Reading and writing tensors by their words (``tables``): the dtype is known only when the kernel runs.

``ALIGNED`` says that a tensor begins at a multiple of four of its elements.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl

from adalora_kernels.backends.triton.engine import tables
from adalora_kernels.backends.triton.products import rounded

_ADDRESS_BITS = tl.constexpr(tables.ADDRESS_BITS)
_ADDRESS = tl.constexpr((1 << tables.ADDRESS_BITS) - 1)
_FLOAT32 = tl.constexpr(tables.CODES[torch.float32])
_BFLOAT16 = tl.constexpr(tables.CODES[torch.bfloat16])


@triton.jit
def _pointer(word, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = (word & _ADDRESS).to(tl.pointer_type(DTYPE))
    return tl.multiple_of(pointer, DTYPE.primitive_bitwidth // 2) if ALIGNED else pointer


@triton.jit
def advanced(word, elements):
    """The word of the tensor from so many elements on."""
    return word + elements * tl.where(word >> _ADDRESS_BITS == _FLOAT32, 4, 2)


@triton.jit
def read(word, at, mask, ALIGNED: tl.constexpr):
    """The elements ``at`` of the tensor, in fp32; 0 where the mask is False."""
    code = word >> _ADDRESS_BITS
    if code == _FLOAT32:
        value = tl.load(_pointer(word, tl.float32, ALIGNED) + at, mask=mask, other=0.0)
    elif code == _BFLOAT16:
        value = tl.load(_pointer(word, tl.bfloat16, ALIGNED) + at, mask=mask, other=0.0).to(tl.float32)
    else:
        value = tl.load(_pointer(word, tl.float16, ALIGNED) + at, mask=mask, other=0.0).to(tl.float32)
    return value


@triton.jit
def write(word, at, value, mask, ALIGNED: tl.constexpr):
    """Store fp32 values as the elements ``at`` of the tensor, rounded to its dtype."""
    code = word >> _ADDRESS_BITS
    if code == _FLOAT32:
        tl.store(_pointer(word, tl.float32, ALIGNED) + at, value, mask=mask)
    elif code == _BFLOAT16:
        tl.store(_pointer(word, tl.bfloat16, ALIGNED) + at, rounded(value, tl.bfloat16), mask=mask)
    else:
        tl.store(_pointer(word, tl.float16, ALIGNED) + at, value.to(tl.float16), mask=mask)


@triton.jit
def as_stored(word, value):
    """What fp32 values are once written to the tensor and read again."""
    code = word >> _ADDRESS_BITS
    if code == _BFLOAT16:
        value = rounded(value, tl.bfloat16).to(tl.float32)
    elif code != _FLOAT32:
        value = value.to(tl.float16).to(tl.float32)
    return value


__all__ = ["advanced", "as_stored", "read", "write"]
