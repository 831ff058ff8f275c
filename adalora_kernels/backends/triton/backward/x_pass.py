"""One pass over x for dA and, where no product has it, the low-rank term of dx.

    dx = p + drop'((v ⊙ λ) A)        p: g W from the BLAS, or nothing
    dA = (v ⊙ λ)ᵀ drop(x)

A program owns some columns of x and a slab of rows, and keeps its tile of dAᵀ in registers; ``slab_sums`` adds the
slabs up. Moves x and M Rpad of v for each block of columns; for dx also p and dx once, and without dA x isn't read.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from adalora_kernels.backends.triton import configurations, tiles
from adalora_kernels.backends.triton.descriptors import describable
from adalora_kernels.backends.triton.dropout import drop, dropout_arguments, keep_mask
from adalora_kernels.backends.triton.launch import launch
from adalora_kernels.backends.triton.products import TRITON_DTYPES, product, rounded
from adalora_kernels.backends.triton.tiles import Width
from adalora_kernels.reference.svd_linear import Adapter


@triton.jit(do_not_specialize=["M", "rows_per_slab", "last_dropped"])
def _svd_linear_backward_x_kernel(
    x_ptr,
    v_ptr,
    a_ptr,
    seed_ptr,
    product_ptr,
    dx_ptr,
    da_ptr,
    M,
    K,
    R,
    rows_per_slab,
    stride_xm,
    stride_xk,
    stride_ar,
    stride_ak,
    last_dropped,
    keep_scale,
    COMPUTE: tl.constexpr,
    RANK_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """For a block of columns of x: dx, one slab's share of dAᵀ, or both, sharing v ⊙ λ and the dropout mask.

    ``v_ptr`` holds v ⊙ λ in COMPUTE. ``product_ptr`` is g W [M, K], row-major, and may be ``dx_ptr`` itself; None
    leaves the base's share out of dx.
    """
    k_block = tl.program_id(0).to(tl.int64)
    slab = tl.program_id(1).to(tl.int64)
    k = k_block * BLOCK_K + tl.arange(0, BLOCK_K)
    r = tl.arange(0, BLOCK_R)
    rows = tl.arange(0, BLOCK_M)
    first = slab * rows_per_slab
    slab_rows = tl.minimum(M - first, rows_per_slab).to(tl.int32)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    if dx_ptr is not None:
        a_ptrs = a_ptr + r.to(tl.int64)[:, None] * stride_ar + k[None, :] * stride_ak
        a_tile = tl.load(a_ptrs, mask=(r[:, None] < R) & (k[None, :] < K), other=0.0)  # [BLOCK_R, BLOCK_K]
        a_tile = rounded(a_tile, COMPUTE)
    da = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    for start in range(0, slab_rows, BLOCK_M):
        m = first + start + rows
        row = rows < slab_rows - start
        inside = row[:, None] & (k[None, :] < K)
        v_ptrs = v_ptr + m[:, None] * RANK_PADDED + r[None, :]
        v_tile = tl.load(v_ptrs, mask=row[:, None] & (r[None, :] < RANK_PADDED), other=0.0)  # [BLOCK_M, BLOCK_R]
        if seed_ptr is not None:
            keep = keep_mask(m, k, K, seed, last_dropped)
        if da_ptr is not None:
            x_ptrs = x_ptr + m[:, None] * stride_xm + k[None, :] * stride_xk
            x_tile = rounded(tl.load(x_ptrs, mask=inside, other=0.0), COMPUTE)  # [BLOCK_M, BLOCK_K]
            if seed_ptr is not None:
                x_tile = drop(x_tile, keep, keep_scale)
            da = product(tl.trans(x_tile), v_tile, da)
        if dx_ptr is not None:
            dx = product(v_tile, a_tile, tl.zeros((BLOCK_M, BLOCK_K), tl.float32))
            if seed_ptr is not None:
                dx = drop(dx, keep, keep_scale)
            offsets = m[:, None] * K + k[None, :]
            if product_ptr is not None:
                dx += tl.load(product_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
            tl.store(dx_ptr + offsets, rounded(dx, dx_ptr.dtype.element_ty), mask=inside)
    if da_ptr is not None:
        da_ptrs = da_ptr + (slab * K + k)[:, None] * RANK_PADDED + r[None, :]
        tl.store(da_ptrs, da, mask=(k[:, None] < K) & (r[None, :] < RANK_PADDED))


def pass_over_x(
    x: Tensor, v: Tensor, frozen: Tensor | None, adapter: Adapter, with_dx: bool, with_da: bool
) -> tuple[Tensor | None, Tensor | None]:
    """dx [M, K] in x's dtype, and fp32 shares [slabs, K, rank_padding(R)] of dAᵀ; None for what isn't asked for.

    Args:
        x, adapter: as in ``reference.svd_linear.backward``; no dimension is 0, and neither is the rank.
        v: v ⊙ λ, contiguous [M, rank_padding(R)] in the dtype of the products.
        frozen: g W, contiguous [M, K] in the dtype of the products; dx is made in it if that is also x's dtype.
        with_dx, with_da: which are asked for, at least one.
    """
    lora_A, _, _, _, seed, _, dropout_p, compute_dtype = adapter
    (M, K), R, device = x.shape, lora_A.shape[0], x.device
    last_dropped, keep_scale = dropout_arguments(dropout_p if seed is not None else 0.0)
    width = tiles.operand_width(compute_dtype, x)
    if width is Width.HALF and not describable(x):
        width = Width.MIXED
    tile = configurations.choose("x", width, R, x, lora_A, dropout=last_dropped >= 0)
    blocks_k = -(-K // tile.block_k)
    slabs, rows_per_slab = tiles.slabs(M, tile.block_m, blocks_k, device)
    dx = None
    if with_dx:
        dx = (
            frozen
            if frozen is not None and frozen.dtype == x.dtype
            else torch.empty((M, K), dtype=x.dtype, device=device)
        )
    da = torch.empty((slabs, K, v.shape[1]), dtype=torch.float32, device=device) if with_da else None
    launch(
        _svd_linear_backward_x_kernel,
        (blocks_k, slabs),
        x,
        v,
        lora_A,
        seed if last_dropped >= 0 else None,
        frozen,
        dx,
        da,
        M,
        K,
        R,
        rows_per_slab,
        *x.stride(),
        *lora_A.stride(),
        last_dropped,
        keep_scale,
        COMPUTE=TRITON_DTYPES[compute_dtype],
        RANK_PADDED=v.shape[1],
        BLOCK_M=tile.block_m,
        BLOCK_K=tile.block_k,
        BLOCK_R=tiles.rank_block(R),
        **tile.options,
    )
    return dx, da


__all__ = ["pass_over_x"]
