"""u_i = x A_iᵀ of all members of a stack in one launch: one product of x with their factors side by side.

Reads x and the factors once for each row block, M K + Σ R_i K elements, and writes M Σ Rpad_i. Where the row blocks
don't fill the device K is cut into slices, as in ``shrink``: the program that arrives last adds them up in their order.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from adalora_kernels.backends.triton import configurations, tiles
from adalora_kernels.backends.triton.descriptors import describable
from adalora_kernels.backends.triton.forward.shrink import slices_of
from adalora_kernels.backends.triton.launch import launch
from adalora_kernels.backends.triton.products import TRITON_DTYPES, product, rounded, step
from adalora_kernels.backends.triton.stack import Stack, of_member
from adalora_kernels.backends.triton.tickets import arrives_last, workspace
from adalora_kernels.backends.triton.tiles import Width


@triton.jit(do_not_specialize=["M", "r0", "r1", "r2", "r3", "columns_per_slice"])
def _svd_linear_group_shrink_kernel(
    x_ptr,
    a0_ptr,
    a1_ptr,
    a2_ptr,
    a3_ptr,
    u_ptr,
    partial_ptr,
    workspace_ptr,
    M,
    K,
    first1,
    first2,
    first3,
    total,
    r0,
    r1,
    r2,
    r3,
    columns_per_slice,
    stride_xm,
    stride_xk,
    stride_ar,
    stride_ak,
    COMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    LETS_NEXT_BEGIN: tl.constexpr,
):
    """The members' u in one row block, member after member; partial_ptr is the same in fp32 for each slice of K."""
    if LETS_NEXT_BEGIN:
        gdc_launch_dependents()
    pid_m = tl.program_id(0)
    piece = tl.program_id(1)
    first_k = tl.multiple_of(piece * columns_per_slice, BLOCK_K)
    last_k = tl.minimum(first_k + columns_per_slice, K)
    m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    k_wide = k.to(tl.int64) + first_k
    c = tl.arange(0, BLOCK_R)
    first = of_member(c, first1, first2, first3, 0, first1, first2, first3)
    width = of_member(c, first1, first2, first3, first1, first2 - first1, first3 - first2, total - first3)
    r = c - first
    owned = r < of_member(c, first1, first2, first3, r0, r1, r2, r3)
    a_rows = of_member(c, first1, first2, first3, a0_ptr, a1_ptr, a2_ptr, a3_ptr) + r.to(tl.int64) * stride_ar
    x_ptrs = x_ptr + m[:, None] * stride_xm + k_wide[None, :] * stride_xk
    a_ptrs = a_rows[None, :] + k_wide[:, None] * stride_ak
    u = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(first_k, last_k, BLOCK_K):
        left = K - start  # slices end between tiles, and of K is known whether loads may be wide
        x_tile = tl.load(x_ptrs, mask=(m[:, None] < M) & (k[None, :] < left), other=0.0)  # [BLOCK_M, BLOCK_K]
        a_tile = tl.load(a_ptrs, mask=(k[:, None] < left) & owned[None, :], other=0.0)  # [BLOCK_K, BLOCK_R]
        u = product(rounded(x_tile, COMPUTE), rounded(a_tile, COMPUTE), u)
        x_ptrs += step(BLOCK_K, stride_xk)
        a_ptrs += step(BLOCK_K, stride_ak)
    offsets = first.to(tl.int64)[None, :] * M + m[:, None] * width[None, :] + r[None, :]
    inside = (m[:, None] < M) & (c[None, :] < total)
    if partial_ptr is None:
        tl.store(u_ptr + offsets, rounded(u, COMPUTE), mask=inside)
    else:
        partial_ptrs = partial_ptr + offsets
        slice_size = M.to(tl.int64) * total
        tl.store(partial_ptrs + piece * slice_size, u, mask=inside)
        slices = tl.num_programs(1)
        if arrives_last(workspace_ptr + pid_m, slices):
            u = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
            for _ in range(slices):
                u += tl.load(partial_ptrs, mask=inside, other=0.0)
                partial_ptrs += slice_size
            tl.store(u_ptr + offsets, rounded(u, COMPUTE), mask=inside)


def shrink_stack(
    x: Tensor, factors: Sequence[Tensor], stack: Stack, compute_dtype: torch.dtype, lets_next_begin: bool
) -> list[Tensor]:
    """u = x Aᵀ of each member, contiguous [M, rank_padding(R)] in the dtype of the products, 0 in columns past R.

    Args:
        x: [M, K], any strides.
        factors: A [R, K] of each member, of one dtype and one layout.
        stack: the places of their ranks.
        compute_dtype: of the products.
        lets_next_begin: the next launch on the stream is a dependent one, and may begin while this one runs.
    """
    M, K = x.shape
    buffer = torch.empty(M * stack.total, dtype=compute_dtype, device=x.device)
    us = stack.pieces(buffer, M)
    if M == 0:
        return us
    width = tiles.operand_width(compute_dtype, x)
    if width is Width.HALF and not describable(x):
        width = Width.MIXED
    tile = configurations.choose("group_shrink", width, stack.total, x, *factors)
    row_blocks = -(-M // tile.block_m)
    slices, columns_per_slice = slices_of(K, tile.block_k, row_blocks, x.device)
    partial = counters = None
    if slices > 1:
        partial = torch.empty((slices, M * stack.total), dtype=torch.float32, device=x.device)
        counters = workspace(x.device, row_blocks)
    launch(
        _svd_linear_group_shrink_kernel,
        (row_blocks, slices),
        x,
        *stack.pointers(factors),
        buffer,
        partial,
        counters,
        M,
        K,
        *stack.places,
        columns_per_slice,
        *x.stride(),
        *factors[0].stride(),
        COMPUTE=TRITON_DTYPES[compute_dtype],
        BLOCK_M=tile.block_m,
        BLOCK_K=tile.block_k,
        BLOCK_R=tiles.rank_block(stack.total),
        LETS_NEXT_BEGIN=lets_next_begin,
        **tile.options,
    )
    return us


__all__ = ["shrink_stack"]
