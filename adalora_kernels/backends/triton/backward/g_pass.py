"""v ⊙ λ with v = g B, and shares of T = gᵀ u, from g = ∂L/∂y: what ``split`` and ``blas`` make before dx and dA.

Up to rank 32, where both are asked for, one pass over g makes both (tiles ``g``): a program owns some columns of g and
a slab of rows, keeps its tile of T in registers, and leaves its columns' share of v for each row, which a second launch
adds up in the order of the columns. Moves g once and 2 ceil(N / BLOCK_N) M Rpad fp32 of shares. Above that rank, or for
one of the two, ``v`` walks along the rows of g and ``t`` along its columns, each once over g.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from adalora_kernels.backends.triton import configurations, tiles
from adalora_kernels.backends.triton.backward.slab_sums import sum_v
from adalora_kernels.backends.triton.launch import launch
from adalora_kernels.backends.triton.products import TRITON_DTYPES, product, rounded, singular_values, step, strides
from adalora_kernels.reference.svd_linear import Adapter


@triton.jit(do_not_specialize=["M"])
def _svd_linear_backward_v_kernel(
    g_ptr,
    e_ptr,
    b_ptr,
    mask_ptr,
    v_ptr,
    M,
    N,
    R,
    stride_gm,
    stride_gn,
    stride_er,
    stride_bn,
    stride_br,
    stride_mask,
    scaling,
    COMPUTE: tl.constexpr,
    RANK_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """v ⊙ λ for a block of rows, in COMPUTE; columns past R are 0."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_R)
    n_wide = n.to(tl.int64)
    g_ptrs = g_ptr + m[:, None] * stride_gm + n_wide[None, :] * stride_gn
    b_ptrs = b_ptr + n_wide[:, None] * stride_bn + r.to(tl.int64)[None, :] * stride_br
    v = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(0, N, BLOCK_N):
        left = N - start
        g_tile = tl.load(g_ptrs, mask=(m[:, None] < M) & (n[None, :] < left), other=0.0)  # [BLOCK_M, BLOCK_N]
        b_tile = tl.load(b_ptrs, mask=(n[:, None] < left) & (r[None, :] < R), other=0.0)  # [BLOCK_N, BLOCK_R]
        v = product(rounded(g_tile, COMPUTE), rounded(b_tile, COMPUTE), v)
        g_ptrs += step(BLOCK_N, stride_gn)
        b_ptrs += step(BLOCK_N, stride_bn)
    v *= singular_values(e_ptr, mask_ptr, stride_er, stride_mask, scaling, r, R)[None, :]
    v_ptrs = v_ptr + m[:, None] * RANK_PADDED + r[None, :]
    tl.store(v_ptrs, rounded(v, COMPUTE), mask=(m[:, None] < M) & (r[None, :] < RANK_PADDED))


@triton.jit(do_not_specialize=["M", "rows_per_slab"])
def _svd_linear_backward_t_kernel(
    g_ptr,
    u_ptr,
    b_ptr,
    t_ptr,
    v_shares_ptr,
    M,
    N,
    R,
    rows_per_slab,
    stride_gm,
    stride_gn,
    stride_um,
    stride_ur,
    stride_bn,
    stride_br,
    COMPUTE: tl.constexpr,
    RANK_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One slab's share of T for a block of columns of g; with ``v_shares_ptr`` also those columns' share of v, raw."""
    n_block = tl.program_id(0).to(tl.int64)
    slab = tl.program_id(1).to(tl.int64)
    n = n_block * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_R)
    r_wide = r.to(tl.int64)
    first = slab * rows_per_slab
    rows = tl.arange(0, BLOCK_M)
    g_ptrs = g_ptr + (first + rows)[:, None] * stride_gm + n[None, :] * stride_gn
    u_ptrs = u_ptr + (first + rows)[:, None] * stride_um + r_wide[None, :] * stride_ur
    slab_rows = tl.minimum(M - first, rows_per_slab).to(tl.int32)
    t = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    if v_shares_ptr is not None:
        b_ptrs = b_ptr + n[:, None] * stride_bn + r_wide[None, :] * stride_br
        b_tile = tl.load(b_ptrs, mask=(n < N)[:, None] & (r < R)[None, :], other=0.0)  # [BLOCK_N, BLOCK_R]
        b_tile = rounded(b_tile, COMPUTE)
        v_ptrs = v_shares_ptr + (n_block * M + first + rows)[:, None] * RANK_PADDED + r[None, :]
    for start in range(0, slab_rows, BLOCK_M):
        left = slab_rows - start
        g_tile = tl.load(g_ptrs, mask=(rows[:, None] < left) & (n[None, :] < N), other=0.0)  # [BLOCK_M, BLOCK_N]
        u_tile = tl.load(u_ptrs, mask=(rows[:, None] < left) & (r[None, :] < R), other=0.0)  # [BLOCK_M, BLOCK_R]
        g_tile = rounded(g_tile, COMPUTE)
        t = product(tl.trans(g_tile), rounded(u_tile, COMPUTE), t)
        if v_shares_ptr is not None:
            v = product(g_tile, b_tile, tl.zeros((BLOCK_M, BLOCK_R), tl.float32))
            tl.store(v_ptrs, v, mask=(rows < left)[:, None] & (r < RANK_PADDED)[None, :])
            v_ptrs += BLOCK_M * RANK_PADDED
        g_ptrs += step(BLOCK_M, stride_gm)
        u_ptrs += step(BLOCK_M, stride_um)
    t_ptrs = t_ptr + (slab * N + n)[:, None] * RANK_PADDED + r[None, :]
    tl.store(t_ptrs, t, mask=(n < N)[:, None] & (r < RANK_PADDED)[None, :])


def pass_over_g(
    grad_y: Tensor, u: Tensor, adapter: Adapter, need_v: bool, need_t: bool
) -> tuple[Tensor | None, Tensor | None]:
    """v ⊙ λ, contiguous [M, rank_padding(R)] in the dtype of the products, and fp32 shares [slabs, N, …] of T.

    Args:
        grad_y, u, adapter: as in ``reference.svd_linear.backward``; no dimension is 0, and neither is the rank.
        need_v, need_t: which of the two are asked for; the other is None.
    """
    _, lora_E, lora_B, mask, _, scaling, _, compute_dtype = adapter
    (M, N), R, device = grad_y.shape, lora_B.shape[1], grad_y.device
    rank_padded, width = tiles.rank_padding(R), tiles.operand_width(compute_dtype, grad_y)
    ranks = {"COMPUTE": TRITON_DTYPES[compute_dtype], "RANK_PADDED": rank_padded, "BLOCK_R": tiles.rank_block(R)}
    at_once = need_v and need_t and configurations.largest_rank("g") >= R
    v = t = v_shares = None
    if need_t:
        tile = configurations.choose("g" if at_once else "t", width, R, grad_y, lora_B)
        blocks_n = -(-N // tile.block_n)
        slabs, rows_per_slab = tiles.slabs(M, tile.block_m, blocks_n, device)
        t = torch.empty((slabs, N, rank_padded), dtype=torch.float32, device=device)
        if at_once:
            v_shares = torch.empty((blocks_n, M, rank_padded), dtype=torch.float32, device=device)
        launch(
            _svd_linear_backward_t_kernel,
            (blocks_n, slabs),
            grad_y,
            u,
            lora_B,
            t,
            v_shares,
            M,
            N,
            R,
            rows_per_slab,
            *grad_y.stride(),
            *u.stride(),
            *lora_B.stride(),
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            **tile.options,
            **ranks,
        )
    if v_shares is not None:
        v = sum_v(v_shares, adapter)
    elif need_v:
        tile = configurations.choose("v", width, R, grad_y, lora_B)
        v = torch.empty((M, rank_padded), dtype=compute_dtype, device=device)
        launch(
            _svd_linear_backward_v_kernel,
            (-(-M // tile.block_m),),
            grad_y,
            lora_E,
            lora_B,
            mask,
            v,
            M,
            N,
            R,
            *grad_y.stride(),
            *strides(lora_E, 1),
            *lora_B.stride(),
            *strides(mask, 1),
            scaling,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            **tile.options,
            **ranks,
        )
    return v, t


__all__ = ["pass_over_g"]
