"""y += (u ⊙ λ) Bᵀ with u = drop(x) Aᵀ and λ = c · E ⊙ mask, in place in any base's output (plan ``delta``).

For bases that are not a plain weight: quantised ones, or any module. A program computes u of its row block and walks
its share of the columns; as many programs share a row block as it takes to fill the device, and each of them computes u
anew. Moves x once for each share, y twice, R (K + N) elements of A and B for each row block, and the store of u.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from adalora_kernels.backends.triton import configurations, tiles
from adalora_kernels.backends.triton.dropout import drop, dropout_arguments, keep_mask
from adalora_kernels.backends.triton.launch import launch
from adalora_kernels.backends.triton.products import TRITON_DTYPES, product, rounded, singular_values, step, strides
from adalora_kernels.reference.svd_linear import Adapter


@triton.jit(do_not_specialize=["M", "columns_per_share", "last_dropped"])
def _svd_linear_delta_kernel(
    x_ptr,
    a_ptr,
    e_ptr,
    b_ptr,
    mask_ptr,
    seed_ptr,
    y_ptr,
    u_ptr,
    M,
    N,
    K,
    R,
    columns_per_share,
    stride_xm,
    stride_xk,
    stride_ar,
    stride_ak,
    stride_er,
    stride_bn,
    stride_br,
    stride_mask,
    stride_ym,
    stride_yn,
    scaling,
    last_dropped,
    keep_scale,
    COMPUTE: tl.constexpr,
    RANK_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    share = tl.program_id(1)
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    r = tl.arange(0, BLOCK_R)
    k_wide = k.to(tl.int64)
    r_wide = r.to(tl.int64)
    row = m[:, None] < M

    x_ptrs = x_ptr + m[:, None] * stride_xm + k_wide[None, :] * stride_xk
    a_ptrs = a_ptr + k_wide[:, None] * stride_ak + r_wide[None, :] * stride_ar
    u = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    for start in range(0, K, BLOCK_K):
        left = K - start
        x_tile = rounded(tl.load(x_ptrs, mask=row & (k[None, :] < left), other=0.0), COMPUTE)  # [BLOCK_M, BLOCK_K]
        a_tile = tl.load(a_ptrs, mask=(k[:, None] < left) & (r[None, :] < R), other=0.0)  # [BLOCK_K, BLOCK_R]
        if seed_ptr is not None:
            x_tile = drop(x_tile, keep_mask(m, start + k, K, seed, last_dropped), keep_scale)
        u = product(x_tile, rounded(a_tile, COMPUTE), u)
        x_ptrs += step(BLOCK_K, stride_xk)
        a_ptrs += step(BLOCK_K, stride_ak)
    if share == 0:
        u_ptrs = u_ptr + m[:, None] * RANK_PADDED + r[None, :]
        tl.store(u_ptrs, rounded(u, COMPUTE), mask=row & (r[None, :] < RANK_PADDED))

    scale = singular_values(e_ptr, mask_ptr, stride_er, stride_mask, scaling, r, R)
    u_scaled = rounded(u * scale[None, :], COMPUTE)
    first = tl.multiple_of(share * columns_per_share, BLOCK_N)  # or loads of y and B would be narrow
    n = first.to(tl.int64) + tl.arange(0, BLOCK_N)
    y_ptrs = y_ptr + m[:, None] * stride_ym + n[None, :] * stride_yn
    b_ptrs = b_ptr + r_wide[:, None] * stride_br + n[None, :] * stride_bn
    columns = tl.arange(0, BLOCK_N)
    for start in range(first, tl.minimum(first + columns_per_share, N), BLOCK_N):
        column = columns[None, :] < N - start
        b_tile = tl.load(b_ptrs, mask=(r[:, None] < R) & column, other=0.0)  # [BLOCK_R, BLOCK_N]
        y_tile = tl.load(y_ptrs, mask=row & column, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_N]
        y_tile = product(u_scaled, rounded(b_tile, COMPUTE), y_tile)
        tl.store(y_ptrs, rounded(y_tile, y_ptr.dtype.element_ty), mask=row & column)
        y_ptrs += step(BLOCK_N, stride_yn)
        b_ptrs += step(BLOCK_N, stride_bn)


def forward(x: Tensor, weight: None, bias: None, base: Tensor, adapter: Adapter) -> tuple[Tensor, Tensor]:
    """As ``reference.svd_linear.forward`` with a base, and with u [M, rank_padding(R)]: 0 in its columns past R."""
    lora_A, lora_E, lora_B, mask, seed, scaling, dropout_p, compute_dtype = adapter
    (M, K), (N, R) = x.shape, lora_B.shape
    rank_padded = tiles.rank_padding(R)
    u = torch.empty((M, rank_padded), dtype=compute_dtype, device=x.device)
    if R == 0 or M == 0:
        return base, u
    last_dropped, keep_scale = dropout_arguments(dropout_p if seed is not None else 0.0)
    width = tiles.operand_width(compute_dtype, x)
    tile = configurations.choose("delta", width, R, x, lora_A, dropout=last_dropped >= 0)
    row_blocks = -(-M // tile.block_m)
    shares, columns_per_share = tiles.slabs(N, tile.block_n, row_blocks, x.device)
    launch(
        _svd_linear_delta_kernel,
        (row_blocks, shares),
        x,
        lora_A,
        lora_E,
        lora_B,
        mask,
        seed if last_dropped >= 0 else None,
        base,
        u,
        M,
        N,
        K,
        R,
        columns_per_share,
        *x.stride(),
        *lora_A.stride(),
        *strides(lora_E, 1),
        *lora_B.stride(),
        *strides(mask, 1),
        *base.stride(),
        scaling,
        last_dropped,
        keep_scale,
        COMPUTE=TRITON_DTYPES[compute_dtype],
        RANK_PADDED=rank_padded,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        BLOCK_R=tiles.rank_block(R),
        **tile.options,
    )
    torch.autograd.graph.increment_version(base)  # which kernels don't: a base may have saved it for its own backward
    return base, u


__all__ = ["forward"]
