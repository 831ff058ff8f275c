"""The gradients of the layer, from g = ∂L/∂y, x and u = drop(x) Aᵀ, each in passes of their own (plan ``split``).

    v  = g B                                  one pass over g (M N elements)
    T  = gᵀ u,  colsum(B ⊙ T)                 one pass over g, mostly from L2
    dx = g W + drop'((v ⊙ λ) A)               g W through the BLAS; its low-rank term and
    dA = (v ⊙ λ)ᵀ drop(x)                     this share one pass over x (and one over dx)
    dB = T ⊙ λ,  dE = c · mask ⊙ colsum(B ⊙ T)

v is kept raw and in fp32 [M, Rpad]. The sums over tokens (T, dA) are taken in two stages: each slab of rows leaves a
partial sum, and the kernel of ``slab_sums`` adds the partials in the order of the slabs. No float atomics, so two runs
agree bit for bit. Beyond g and x that moves M Rpad fp32 of v and (slabs_T N + slabs_A K) Rpad fp32 of partials, each
written once and read again.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from adalora_kernels.backends.triton import tiles
from adalora_kernels.backends.triton.backward.slab_sums import svd_linear_backward_finish_kernel
from adalora_kernels.backends.triton.dropout import drop, dropout_arguments, keep_mask
from adalora_kernels.backends.triton.launch import launch
from adalora_kernels.backends.triton.products import TRITON_DTYPES, product, rounded, singular_values, strides
from adalora_kernels.reference.svd_linear import Adapter


@triton.jit(do_not_specialize=["M"])
def _svd_linear_backward_v_kernel(
    g_ptr,
    b_ptr,
    v_ptr,
    M,
    N,
    R,
    stride_gm,
    stride_gn,
    stride_bn,
    stride_br,
    COMPUTE: tl.constexpr,
    RANK_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """v = g B for a block of rows, raw, in fp32; columns past R are 0."""
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
        g_ptrs += BLOCK_N * stride_gn
        b_ptrs += BLOCK_N * stride_bn
    v_ptrs = v_ptr + m[:, None] * RANK_PADDED + r[None, :]
    tl.store(v_ptrs, v, mask=(m[:, None] < M) & (r[None, :] < RANK_PADDED))


@triton.jit(do_not_specialize=["M", "rows_per_slab"])
def _svd_linear_backward_t_kernel(
    g_ptr,
    u_ptr,
    b_ptr,
    t_ptr,
    colsum_ptr,
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
    """One slab's share of T = gᵀ u for a block of columns of g, and of colsum(B ⊙ T), which is linear in T."""
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
    for start in range(0, slab_rows, BLOCK_M):
        left = slab_rows - start
        g_tile = tl.load(g_ptrs, mask=(rows[:, None] < left) & (n[None, :] < N), other=0.0)  # [BLOCK_M, BLOCK_N]
        u_tile = tl.load(u_ptrs, mask=(rows[:, None] < left) & (r[None, :] < R), other=0.0)  # [BLOCK_M, BLOCK_R]
        t = product(tl.trans(rounded(g_tile, COMPUTE)), rounded(u_tile, COMPUTE), t)
        g_ptrs += BLOCK_M * stride_gm
        u_ptrs += BLOCK_M * stride_um
    row = r < RANK_PADDED
    t_ptrs = t_ptr + (slab * N + n)[:, None] * RANK_PADDED + r[None, :]
    tl.store(t_ptrs, t, mask=(n[:, None] < N) & row[None, :])
    b_ptrs = b_ptr + n[:, None] * stride_bn + r_wide[None, :] * stride_br
    b_tile = tl.load(b_ptrs, mask=(n[:, None] < N) & (r[None, :] < R), other=0.0).to(tl.float32)  # [BLOCK_N, BLOCK_R]
    colsum_ptrs = colsum_ptr + (slab * tl.num_programs(0) + n_block) * RANK_PADDED + r
    tl.store(colsum_ptrs, tl.sum(b_tile * t, axis=0), mask=row)


@triton.jit(do_not_specialize=["M", "rows_per_slab", "last_dropped"])
def _svd_linear_backward_x_kernel(
    x_ptr,
    v_ptr,
    a_ptr,
    e_ptr,
    mask_ptr,
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
    stride_er,
    stride_mask,
    scaling,
    last_dropped,
    keep_scale,
    COMPUTE: tl.constexpr,
    RANK_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """For a block of columns of x: dx, one slab's share of dAᵀ, or both, sharing v ⊙ λ and the dropout mask.

    ``product_ptr`` is g W [M, K], row-major, and may be ``dx_ptr`` itself; None leaves the base's share out of dx.
    """
    k_block = tl.program_id(0).to(tl.int64)
    slab = tl.program_id(1).to(tl.int64)
    k = k_block * BLOCK_K + tl.arange(0, BLOCK_K)
    r = tl.arange(0, BLOCK_R)
    rows = tl.arange(0, BLOCK_M)
    scale = singular_values(e_ptr, mask_ptr, stride_er, stride_mask, scaling, r, R)
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
        v_scaled = rounded(v_tile * scale[None, :], COMPUTE)
        if seed_ptr is not None:
            keep = keep_mask(m, k, K, seed, last_dropped)
        if da_ptr is not None:
            x_ptrs = x_ptr + m[:, None] * stride_xm + k[None, :] * stride_xk
            x_tile = rounded(tl.load(x_ptrs, mask=inside, other=0.0), COMPUTE)  # [BLOCK_M, BLOCK_K]
            if seed_ptr is not None:
                x_tile = drop(x_tile, keep, keep_scale)
            da = product(tl.trans(x_tile), v_scaled, da)
        if dx_ptr is not None:
            dx = product(v_scaled, a_tile, tl.zeros((BLOCK_M, BLOCK_K), tl.float32))
            if seed_ptr is not None:
                dx = drop(dx, keep, keep_scale)
            offsets = m[:, None] * K + k[None, :]
            if product_ptr is not None:
                dx += tl.load(product_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
            tl.store(dx_ptr + offsets, rounded(dx, dx_ptr.dtype.element_ty), mask=inside)
    if da_ptr is not None:
        da_ptrs = da_ptr + (slab * K + k)[:, None] * RANK_PADDED + r[None, :]
        tl.store(da_ptrs, da, mask=(k[:, None] < K) & (r[None, :] < RANK_PADDED))


def backward(
    grad_y: Tensor,
    x: Tensor,
    u: Tensor,
    weight: Tensor | None,
    adapter: Adapter,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """As ``reference.svd_linear.backward``; only what ``needs`` asks for is computed."""
    lora_A, lora_E, lora_B, mask, seed, scaling, dropout_p, compute_dtype = adapter
    need_x, need_A, need_E, need_B = needs
    (M, K), (N, R) = x.shape, lora_B.shape
    # From the BLAS in the dtype of the products; the low-rank term is added where it lies if that is also x's dtype.
    frozen = grad_y.to(compute_dtype) @ weight.to(compute_dtype) if need_x and weight is not None else None
    dA = torch.empty((R, K), dtype=lora_A.dtype, device=x.device) if need_A else None
    dE = torch.empty(lora_E.shape, dtype=lora_E.dtype, device=x.device) if need_E else None
    dB = torch.empty((N, R), dtype=lora_B.dtype, device=x.device) if need_B else None
    if R == 0:
        dx = torch.zeros((M, K), dtype=x.dtype, device=x.device) if need_x and frozen is None else None
        return (dx if frozen is None else frozen.to(x.dtype)), dA, dE, dB
    if frozen is not None and frozen.dtype == x.dtype:
        dx = frozen
    else:
        dx = torch.empty((M, K), dtype=x.dtype, device=x.device) if need_x else None

    rank_padded = tiles.rank_padding(R)
    ranks = {"RANK_PADDED": rank_padded, "BLOCK_R": tiles.rank_block(R)}
    compute = TRITON_DTYPES[compute_dtype]
    t = colsum = partial_a = None
    slabs_t = slabs_a = blocks_n = 0
    if need_x or need_A:
        v = torch.empty((M, rank_padded), dtype=torch.float32, device=x.device)
        tile = tiles.choose("v", x.device, R, compute_dtype, grad_y, adapter=lora_B)
        if M > 0:
            launch(
                _svd_linear_backward_v_kernel,
                (triton.cdiv(M, tile.block_m),),
                grad_y,
                lora_B,
                v,
                M,
                N,
                R,
                *grad_y.stride(),
                *lora_B.stride(),
                COMPUTE=compute,
                BLOCK_M=tile.block_m,
                BLOCK_N=tile.block_n,
                **tile.options,
                **ranks,
            )
        tile = tiles.choose("x", x.device, R, compute_dtype, x, adapter=lora_A)
        blocks_k = triton.cdiv(K, tile.block_k)
        slabs_a, rows_per_slab = tiles.slabs(M, tile.block_m, blocks_k, x.device)
        if need_A:
            partial_a = torch.empty((slabs_a, K, rank_padded), dtype=torch.float32, device=x.device)
        last_dropped, keep_scale = dropout_arguments(dropout_p if seed is not None else 0.0)
        launch(
            _svd_linear_backward_x_kernel,
            (blocks_k, slabs_a),
            x,
            v,
            lora_A,
            lora_E,
            mask,
            seed if last_dropped >= 0 else None,
            frozen,
            dx,
            partial_a,
            M,
            K,
            R,
            rows_per_slab,
            *x.stride(),
            *lora_A.stride(),
            *strides(lora_E, 1),
            *strides(mask, 1),
            scaling,
            last_dropped,
            keep_scale,
            COMPUTE=compute,
            BLOCK_M=tile.block_m,
            BLOCK_K=tile.block_k,
            **tile.options,
            **ranks,
        )
    if need_E or need_B:
        tile = tiles.choose("t", x.device, R, compute_dtype, grad_y, adapter=lora_B)
        blocks_n = triton.cdiv(N, tile.block_n)
        slabs_t, rows_per_slab = tiles.slabs(M, tile.block_m, blocks_n, x.device)
        t = torch.empty((slabs_t, N, rank_padded), dtype=torch.float32, device=x.device)
        colsum = torch.empty((slabs_t, blocks_n, rank_padded), dtype=torch.float32, device=x.device)
        launch(
            _svd_linear_backward_t_kernel,
            (blocks_n, slabs_t),
            grad_y,
            u,
            lora_B,
            t,
            colsum,
            M,
            N,
            R,
            rows_per_slab,
            *grad_y.stride(),
            *u.stride(),
            *lora_B.stride(),
            COMPUTE=compute,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            **tile.options,
            **ranks,
        )
    if need_A or need_E or need_B:
        tile = tiles.FINISH_TILE
        blocks_b = triton.cdiv(N, tile.block_m) if need_B else 0
        blocks_a = triton.cdiv(K, tile.block_m) if need_A else 0
        launch(
            svd_linear_backward_finish_kernel,
            (blocks_b + blocks_a + need_E,),
            t,
            colsum,
            partial_a,
            lora_E,
            mask,
            dA,
            dE,
            dB,
            N,
            K,
            R,
            slabs_t,
            slabs_a,
            slabs_t * blocks_n,
            blocks_b,
            blocks_a,
            *strides(lora_E, 1),
            *strides(mask, 1),
            scaling,
            BLOCK=tile.block_m,
            **tile.options,
            **ranks,
        )
    return dx, dA, dE, dB


__all__ = ["backward"]
