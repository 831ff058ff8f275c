"""‖·‖₂ of many tensors together, in one launch: reads each element once.

A program leaves the sum of squares of up to 16,384 elements of one tensor, in fp32; the last one adds these sums up in
fp64, in a fixed order.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from adalora_kernels.backends.triton.engine.operands import advanced, read
from adalora_kernels.backends.triton.engine.tables import are_aligned, on_device, shapes_in, words_of
from adalora_kernels.backends.triton.launch import launch
from adalora_kernels.backends.triton.tickets import arrives_last, workspace

_ITEM = 16384
_ITEM_ROW = tl.constexpr(3)  # tensor, first element, number of elements


@triton.jit(do_not_specialize=["items"])
def _total_norm_kernel(
    items_ptr, words_ptr, sums_ptr, norm_ptr, workspace_ptr, items, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):
    item = tl.program_id(0)
    row_ptr = items_ptr + item * _ITEM_ROW
    word = advanced(tl.load(words_ptr + tl.load(row_ptr)), tl.load(row_ptr + 1))
    count = tl.load(row_ptr + 2).to(tl.int32)
    i = tl.arange(0, BLOCK)
    squares = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, count, BLOCK):
        value = read(word, first + i, first + i < count, ALIGNED)
        squares += value * value
    tl.store(sums_ptr + item, tl.sum(squares, axis=0))
    if arrives_last(workspace_ptr, items):
        total = tl.zeros((BLOCK,), tl.float64)
        for start in range(0, items, BLOCK):
            total += tl.load(sums_ptr + start + i, mask=start + i < items, other=0.0).to(tl.float64)
        tl.store(norm_ptr, tl.sqrt(tl.sum(total, axis=0)))


@lru_cache(maxsize=16)
def _items_of(sizes: bytes, device: torch.device) -> Tensor:
    """The table of items, int64 [items, 3]; at least one, so that nothing has a norm too."""
    counts = [rows * columns for rows, columns in shapes_in(sizes)]
    rows = [(t, at, min(count - at, _ITEM)) for t, count in enumerate(counts) for at in range(0, count, _ITEM)]
    return torch.tensor(rows or [(0, 0, 0)], dtype=torch.int64).to(device)


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """‖·‖₂ of all tensors together, fp64 [1]; see ``reference.adamw.total_norm``.

    Bitwise repeatable. Tensors that aren't contiguous are copied.

    Raises:
        ValueError: no tensors, or tensors on several devices.
        TypeError: where a dtype is none that the kernel reads.
    """
    if not tensors:
        raise ValueError("tensors: expected at least one, got none")
    device = tensors[0].device
    found = words_of("tensors", tensors, None, device)
    items = _items_of(found.sizes, device)
    norm = torch.empty(1, dtype=torch.float64, device=device)
    launch(
        _total_norm_kernel,
        (len(items),),
        items,
        on_device(("norm", found.sizes), found.words, device),
        torch.empty(len(items), dtype=torch.float32, device=device),
        norm,
        workspace(device, 0),
        len(items),
        ALIGNED=are_aligned(found.words),
        BLOCK=2048,
        num_warps=4,
        num_stages=1,
        enable_fp_fusion=False,
    )
    del found
    return norm


__all__ = ["total_norm"]
