"""One pass over x for all members of a stack: their dA, and the low-rank terms of the dx that they share.

    dx = p + Σ_i (v_i ⊙ λ_i) A_i        p: Σ_i g_i W_i, or also the terms of the stacks before
    dA_i = (v_i ⊙ λ_i)ᵀ x

One product of x, and one into dx, with the members' v side by side. As in ``x_pass``, a program owns some columns of x
and a slab of rows, and keeps its tile of all dAᵀ in registers; ``slab_sums`` adds each member's slabs up. Moves x once
and M Σ Rpad_i of v for each block of columns; for dx also p and dx once.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from adalora_kernels.backends.triton import configurations, tiles
from adalora_kernels.backends.triton.launch import launch
from adalora_kernels.backends.triton.products import TRITON_DTYPES, product, rounded
from adalora_kernels.backends.triton.stack import Stack, of_member


@triton.jit(do_not_specialize=["M", "r0", "r1", "r2", "r3", "rows_per_slab"])
def _svd_linear_group_backward_x_kernel(
    x_ptr,
    v0_ptr,
    v1_ptr,
    v2_ptr,
    v3_ptr,
    a0_ptr,
    a1_ptr,
    a2_ptr,
    a3_ptr,
    product_ptr,
    dx_ptr,
    da_ptr,
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
    rows_per_slab,
    stride_xm,
    stride_xk,
    stride_ar,
    stride_ak,
    COMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """For a block of columns of x: dx, one slab's share of each member's dAᵀ, or both.

    v_ptrs hold v ⊙ λ in COMPUTE, contiguous. ``product_ptr`` is p [M, K], row-major, and may be ``dx_ptr`` itself.
    """
    k_block = tl.program_id(0).to(tl.int64)
    slab = tl.program_id(1).to(tl.int64)
    k = k_block * BLOCK_K + tl.arange(0, BLOCK_K)
    c = tl.arange(0, BLOCK_R)
    rows = tl.arange(0, BLOCK_M)
    first_m = slab * rows_per_slab
    slab_rows = tl.minimum(M - first_m, rows_per_slab).to(tl.int32)
    first = of_member(c, first1, first2, first3, 0, first1, first2, first3)
    width = of_member(c, first1, first2, first3, first1, first2 - first1, first3 - first2, total - first3)
    r = c - first
    v_columns = of_member(c, first1, first2, first3, v0_ptr, v1_ptr, v2_ptr, v3_ptr) + r
    if dx_ptr is not None:
        owned = r < of_member(c, first1, first2, first3, r0, r1, r2, r3)
        a_rows = of_member(c, first1, first2, first3, a0_ptr, a1_ptr, a2_ptr, a3_ptr) + r.to(tl.int64) * stride_ar
        a_ptrs = a_rows[:, None] + k[None, :] * stride_ak
        a_tile = rounded(tl.load(a_ptrs, mask=owned[:, None] & (k[None, :] < K), other=0.0), COMPUTE)
    da = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    for start in range(0, slab_rows, BLOCK_M):
        m = first_m + start + rows
        row = rows < slab_rows - start
        inside = row[:, None] & (k[None, :] < K)
        v_ptrs = v_columns[None, :] + m[:, None] * width[None, :]
        v_tile = tl.load(v_ptrs, mask=row[:, None] & (c[None, :] < total), other=0.0)  # [BLOCK_M, BLOCK_R]
        if da_ptr is not None:
            x_ptrs = x_ptr + m[:, None] * stride_xm + k[None, :] * stride_xk
            x_tile = rounded(tl.load(x_ptrs, mask=inside, other=0.0), COMPUTE)  # [BLOCK_M, BLOCK_K]
            da = product(tl.trans(x_tile), v_tile, da)
        if dx_ptr is not None:
            dx = product(v_tile, a_tile, tl.zeros((BLOCK_M, BLOCK_K), tl.float32))
            offsets = m[:, None] * K + k[None, :]
            dx += tl.load(product_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
            tl.store(dx_ptr + offsets, rounded(dx, dx_ptr.dtype.element_ty), mask=inside)
    if da_ptr is not None:
        shares = first.to(tl.int64)[None, :] * tl.num_programs(1) * K + (slab * K + k)[:, None] * width[None, :]
        tl.store(da_ptr + shares + r[None, :], da, mask=(k[:, None] < K) & (c[None, :] < total))


def pass_over_x(
    x: Tensor,
    vs: Sequence[Tensor],
    factors: Sequence[Tensor],
    stack: Stack,
    frozen: Tensor | None,
    with_da: bool,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """dx [M, K] in x's dtype, and of each member fp32 shares [slabs, K, rank_padding(R)] of dAᵀ.

    Args:
        x: [M, K], any strides, not empty.
        vs: v ⊙ λ of each member, contiguous [M, rank_padding(R)] in the dtype of the products.
        factors: A [R, K] of each member, of one dtype and one layout.
        stack: the places of their ranks.
        frozen: p, contiguous [M, K]; dx is made in it if it is of x's dtype. None where dx isn't asked for.
        with_da: whether any dA is asked for; otherwise the shares are None.
    """
    (M, K), device, compute_dtype = x.shape, x.device, vs[0].dtype
    tile = configurations.choose("group_x", tiles.operand_width(compute_dtype, x), stack.total, x, *factors)
    blocks_k = -(-K // tile.block_k)
    slabs, rows_per_slab = tiles.slabs(M, tile.block_m, blocks_k, device)
    dx = frozen
    if frozen is not None and frozen.dtype != x.dtype:
        dx = torch.empty((M, K), dtype=x.dtype, device=device)
    da = torch.empty(slabs * K * stack.total, dtype=torch.float32, device=device) if with_da else None
    launch(
        _svd_linear_group_backward_x_kernel,
        (blocks_k, slabs),
        x,
        *stack.pointers(vs),
        *stack.pointers(factors),
        frozen,
        dx,
        da,
        M,
        K,
        *stack.places,
        rows_per_slab,
        *x.stride(),
        *factors[0].stride(),
        COMPUTE=TRITON_DTYPES[compute_dtype],
        BLOCK_M=tile.block_m,
        BLOCK_K=tile.block_k,
        BLOCK_R=tiles.rank_block(stack.total),
        **tile.options,
    )
    return dx, [None] * len(vs) if da is None else [*stack.pieces(da, slabs, K)]


__all__ = ["pass_over_x"]
