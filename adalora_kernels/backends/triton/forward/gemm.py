"""The persistent product that ``published`` and ``shrink_tail`` share: y = x Wᵀ + b + (u ⊙ λ) Bᵀ.

A program walks tiles [BLOCK_M, BLOCK_N] of y. The low-rank term is a tail of the product: R more columns of its inner
dimension, multiplied into the same fp32 accumulator. What ``U`` says is where u comes from:

* "given": an earlier launch. Tiles go in a fixed order, and none waits for u before its tail.
* "beside": the first tile of each row block makes it with a second, narrow product in a loop over K of its own, and
  publishes it to the later tiles (``tickets``).
* "ahead": likewise, in a pass over its rows of x before its product. That reads them once more, but leaves the product
  alone: for dropout and for adapters that are rounded on the way in, which would stall it, and for high ranks.

x, W and y go through tensor descriptors where the device has them and the operands allow it, elsewhere through
pointers: any strides, any width. Moves x and W as any tiled product does, y once, and for each row of tiles R (N + K)
elements of the adapter; u itself, M Rpad elements, is read by every tile of its row.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from adalora_kernels.backends.triton import configurations, tiles
from adalora_kernels.backends.triton.descriptors import describable, has_descriptors
from adalora_kernels.backends.triton.dropout import dropout_arguments
from adalora_kernels.backends.triton.forward.shrink import add_low_rank, low_rank_rows
from adalora_kernels.backends.triton.launch import launch
from adalora_kernels.backends.triton.products import TRITON_DTYPES, product, rounded, step, strides
from adalora_kernels.backends.triton.tickets import (
    await_published,
    programs,
    publish,
    take_ticket,
    tile_of,
    workspace,
)
from adalora_kernels.backends.triton.tiles import Width
from adalora_kernels.reference.svd_linear import Adapter

_HIGHEST_RANK_BESIDE = 32  # past it the narrow product costs as much as a pass over the rows


@triton.jit
def _tile_product(
    x,
    w,
    a_ptr,
    pid_m,
    pid_n,
    M,
    N,
    K,
    R,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_ar,
    stride_ak,
    COMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    K_CONTIGUOUS: tl.constexpr,
):
    """A tile of x Wᵀ, fp32 [BLOCK_M, BLOCK_N], and beside it, given a_ptr, its rows of u, fp32 [BLOCK_M, BLOCK_R]."""
    m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    r = tl.arange(0, BLOCK_R)
    k_wide = k.to(tl.int64)
    if not DESCRIPTORS:
        x_ptrs = x + m[:, None] * stride_xm + k_wide[None, :] * stride_xk
        w_ptrs = w + k_wide[:, None] * stride_wk + n[None, :] * stride_wn
    if a_ptr is not None:
        a_ptrs = a_ptr + k_wide[:, None] * stride_ak + r.to(tl.int64)[None, :] * stride_ar
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    u = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(0, K, BLOCK_K):
        left = K - start
        if DESCRIPTORS:
            x_tile = x.load([pid_m * BLOCK_M, start])  # [BLOCK_M, BLOCK_K]
            if K_CONTIGUOUS:
                w_tile = w.load([pid_n * BLOCK_N, start]).T  # [BLOCK_K, BLOCK_N]
            else:
                w_tile = w.load([start, pid_n * BLOCK_N])
        else:
            x_tile = rounded(tl.load(x_ptrs, mask=(m[:, None] < M) & (k[None, :] < left), other=0.0), COMPUTE)
            w_tile = rounded(tl.load(w_ptrs, mask=(k[:, None] < left) & (n[None, :] < N), other=0.0), COMPUTE)
            x_ptrs += step(BLOCK_K, stride_xk)
            w_ptrs += step(BLOCK_K, stride_wk)
        acc = product(x_tile, w_tile, acc)
        if a_ptr is not None:
            a_tile = tl.load(a_ptrs, mask=(k[:, None] < left) & (r[None, :] < R), other=0.0)  # [BLOCK_K, BLOCK_R]
            u = product(x_tile, rounded(a_tile, COMPUTE), u)
            a_ptrs += step(BLOCK_K, stride_ak)
    return acc, u


@triton.jit(do_not_specialize=["M", "last_dropped"])
def _svd_linear_gemm_kernel(
    x,
    w,
    bias_ptr,
    a_ptr,
    e_ptr,
    b_ptr,
    mask_ptr,
    seed_ptr,
    y,
    u_ptr,
    workspace_ptr,
    M,
    N,
    K,
    R,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_bias,
    stride_ar,
    stride_ak,
    stride_er,
    stride_bn,
    stride_br,
    stride_mask,
    scaling,
    last_dropped,
    keep_scale,
    COMPUTE: tl.constexpr,
    RANK_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    U: tl.constexpr,
    DEPENDENT: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    K_CONTIGUOUS: tl.constexpr,
):
    """x, w and y are pointers or descriptors, of W as [K, N] unless K_CONTIGUOUS; DEPENDENT: u may not be there yet."""
    blocks_m = tl.cdiv(M, BLOCK_M)
    blocks_n = tl.cdiv(N, BLOCK_N)
    count = blocks_m * blocks_n
    if U == "given":
        tile = tl.program_id(0)
    else:
        tile = take_ticket(workspace_ptr, count)
    while tile < count:
        pid_m, pid_n = tile_of(tile, blocks_m, blocks_n, GROUP_M)
        m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        r = tl.arange(0, BLOCK_R)
        u_ptrs = u_ptr + m[:, None] * RANK_PADDED + r[None, :]
        u_inside = (m[:, None] < M) & (r[None, :] < RANK_PADDED)
        if U == "ahead" and pid_n == 0:
            u = low_rank_rows(
                x,
                a_ptr,
                seed_ptr,
                pid_m,
                0,
                K,
                M,
                K,
                R,
                stride_xm,
                stride_xk,
                stride_ar,
                stride_ak,
                last_dropped,
                keep_scale,
                COMPUTE,
                BLOCK_M,
                BLOCK_K,
                BLOCK_R,
                DESCRIPTORS,
            )
            tl.store(u_ptrs, rounded(u, COMPUTE), mask=u_inside)
            publish(workspace_ptr, pid_m, blocks_n - 1)
        if U == "beside" and pid_n == 0:
            acc, u = _tile_product(
                x,
                w,
                a_ptr,
                pid_m,
                pid_n,
                M,
                N,
                K,
                R,
                stride_xm,
                stride_xk,
                stride_wn,
                stride_wk,
                stride_ar,
                stride_ak,
                COMPUTE,
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
                BLOCK_R,
                DESCRIPTORS,
                K_CONTIGUOUS,
            )
            tl.store(u_ptrs, rounded(u, COMPUTE), mask=u_inside)
            publish(workspace_ptr, pid_m, blocks_n - 1)
        else:
            acc, _ = _tile_product(
                x,
                w,
                None,
                pid_m,
                pid_n,
                M,
                N,
                K,
                R,
                stride_xm,
                stride_xk,
                stride_wn,
                stride_wk,
                stride_ar,
                stride_ak,
                COMPUTE,
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
                BLOCK_R,
                DESCRIPTORS,
                K_CONTIGUOUS,
            )
        if U != "given" and pid_n > 0:
            await_published(workspace_ptr, pid_m)
        if DEPENDENT:
            gdc_wait()
        u_tile = None
        if RANK_PADDED > 0:
            u_tile = tl.load(u_ptrs, mask=u_inside, other=0.0)
        acc = add_low_rank(
            acc,
            u_tile,
            bias_ptr,
            e_ptr,
            b_ptr,
            mask_ptr,
            n,
            N,
            R,
            stride_bias,
            stride_er,
            stride_bn,
            stride_br,
            stride_mask,
            scaling,
            COMPUTE,
            BLOCK_R,
        )
        if DESCRIPTORS:
            y.store([pid_m * BLOCK_M, pid_n * BLOCK_N], rounded(acc, COMPUTE))
        else:
            y_ptrs = y + m[:, None] * N + n[None, :]
            tl.store(y_ptrs, rounded(acc, COMPUTE), mask=(m[:, None] < M) & (n[None, :] < N))
        if U == "given":
            tile += tl.num_programs(0)
        else:
            tile = take_ticket(workspace_ptr, count)


def multiply(
    x: Tensor, weight: Tensor, bias: Tensor | None, adapter: Adapter, u: Tensor, make_u: bool, dependent: bool = False
) -> Tensor:
    """y = x Wᵀ + b + (u ⊙ λ) Bᵀ, [M, N] in the dtype of the products.

    Args:
        x, weight, bias, adapter: as in ``reference.svd_linear.forward``.
        u: contiguous [M, rank_padding(R)] in the dtype of the products.
        make_u: u is written here; otherwise it is read.
        dependent: u is made by the launch before this one on the stream, and that one lets this one begin early.
    """
    lora_A, lora_E, lora_B, mask, seed, scaling, dropout_p, compute_dtype = adapter
    (M, K), (N, R) = x.shape, lora_B.shape
    y = torch.empty((M, N), dtype=compute_dtype, device=x.device)
    if y.numel() == 0:
        return y
    last_dropped, keep_scale = dropout_arguments(dropout_p if seed is not None else 0.0)
    k_contiguous = weight.stride(1) == 1
    w_rows = weight if k_contiguous else weight.t()
    width = tiles.operand_width(compute_dtype, x, weight)
    if width is Width.HALF and not (
        x.dtype == weight.dtype == compute_dtype and all(describable(matrix) for matrix in (x, w_rows, y))
    ):
        width = Width.MIXED
    described = width is Width.HALF and has_descriptors(x.device)
    if not make_u:
        source = "given"
    elif last_dropped < 0 and lora_A.dtype == compute_dtype and width is Width.HALF and R <= _HIGHEST_RANK_BESIDE:
        source = "beside"
    else:
        source = "ahead"
    count = programs(x.device)
    tile = configurations.choose("gemm", width, R, x, weight, lora_A, lora_B, dropout=last_dropped >= 0, m=M, n=N)
    x_block, y_block = [tile.block_m, tile.block_k], [tile.block_m, tile.block_n]
    w_block = [tile.block_n, tile.block_k] if k_contiguous else [tile.block_k, tile.block_n]
    row_blocks, column_blocks = -(-M // tile.block_m), -(-N // tile.block_n)
    launch(
        _svd_linear_gemm_kernel,
        (min(row_blocks * column_blocks, count),),
        TensorDescriptor.from_tensor(x, x_block) if described else x,
        TensorDescriptor.from_tensor(w_rows, w_block) if described else weight,
        bias,
        lora_A,
        lora_E,
        lora_B,
        mask,
        seed if last_dropped >= 0 else None,
        TensorDescriptor.from_tensor(y, y_block) if described else y,
        u,
        workspace(x.device, row_blocks) if make_u else None,
        M,
        N,
        K,
        R,
        *x.stride(),
        *weight.stride(),
        *strides(bias, 1),
        *lora_A.stride(),
        *strides(lora_E, 1),
        *lora_B.stride(),
        *strides(mask, 1),
        scaling,
        last_dropped,
        keep_scale,
        COMPUTE=TRITON_DTYPES[compute_dtype],
        RANK_PADDED=u.shape[1],
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        BLOCK_R=tiles.rank_block(R),
        GROUP_M=tiles.GROUP_M,
        U=source,
        DEPENDENT=dependent,
        DESCRIPTORS=described,
        K_CONTIGUOUS=k_contiguous,
        **tile.options,
        launch_pdl=dependent,
    )
    return y


__all__ = ["multiply"]
