"""The product of ``one_gemm`` and ``split``: dx = g W + drop'((v ⊙ λ) A), with v, T = gᵀ u and dA on its way.

A program walks tiles [BLOCK_M, BLOCK_K] of dx; the low-rank term is a tail of the product, R more columns of its inner
dimension. Who makes v = g B is a constexpr:

* an earlier launch: ``v_ptr`` is read;
* the first tile of each row block (MAKE_V), whose main loop holds all of g's rows on its way along N: a second narrow
  product beside its own makes v, a third the row block's share of T. It publishes v ⊙ λ to the later tiles of its row
  block (``tickets``). A tile is of one kind or the other, so each kind has its own loop over N.

Where dA is asked for, each tile loads the tile of x at its own coordinates and leaves its share of dAᵀ. A ticket stands
for one column of tiles in a slab of row blocks, walked in order by one program, which adds to the shares that it left
before: there is one share of T and of dA for each slab, whoever took which ticket, and ``slab_sums`` adds them up.

g, x, W and dx go through tensor descriptors where the device has them and the operands allow it, elsewhere through
pointers: any strides, any width. Moves g and W as any tiled product does, dx once, x once, M Rpad of v for each column
of tiles, and the shares, slabs (N + K) Rpad fp32, once (twice with more than one row block to a slab).
"""

# mypy: allow-untyped-defs
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from adalora_kernels.backends.triton import configurations, tickets, tiles
from adalora_kernels.backends.triton.descriptors import describable, has_descriptors
from adalora_kernels.backends.triton.dropout import drop, dropout_arguments, keep_mask
from adalora_kernels.backends.triton.launch import launch
from adalora_kernels.backends.triton.products import TRITON_DTYPES, product, rounded, singular_values, strides
from adalora_kernels.backends.triton.tickets import await_published, publish, take_ticket, tile_of
from adalora_kernels.backends.triton.tiles import Width
from adalora_kernels.reference.svd_linear import Adapter

_SHARES = 32 << 20  # bytes that the shares of T and dA may take before slabs grow: what stays in the L2 of an H100
_TICKETS_PER_PROGRAM = 4  # below which slabs don't grow: the last tickets should keep all programs busy


@triton.jit
def _load_tile(
    matrix,
    first_row,
    first_column,
    ROWS,
    COLUMNS,
    stride_row,
    stride_column,
    COMPUTE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """A tile [BLOCK_ROWS, BLOCK_COLUMNS], 0 past the ends. A descriptor may be of the TRANSPOSED matrix."""
    if DESCRIPTORS:
        if TRANSPOSED:
            return matrix.load([first_column, first_row]).T
        else:
            return matrix.load([first_row, first_column])
    else:
        rows = tl.cast(first_row, tl.int64) + tl.arange(0, BLOCK_ROWS)
        columns = tl.cast(first_column, tl.int64) + tl.arange(0, BLOCK_COLUMNS)
        pointers = matrix + rows[:, None] * stride_row + columns[None, :] * stride_column
        return rounded(
            tl.load(pointers, mask=(rows < ROWS)[:, None] & (columns < COLUMNS)[None, :], other=0.0), COMPUTE
        )


@triton.jit(do_not_specialize=["M", "slab_blocks", "last_dropped"])
def _svd_linear_backward_gemm_kernel(
    g,
    x,
    w,
    dx,
    u_ptr,
    v_ptr,
    a_ptr,
    e_ptr,
    b_ptr,
    mask_ptr,
    seed_ptr,
    t_ptr,
    da_ptr,
    workspace_ptr,
    M,
    N,
    K,
    R,
    slab_blocks,
    stride_gm,
    stride_gn,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_um,
    stride_ur,
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
    MAKE_V: tl.constexpr,
    ONE_BLOCK_SLABS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    K_CONTIGUOUS: tl.constexpr,
):
    """g, x, w and dx are descriptors (of W as [K, N] unless K_CONTIGUOUS) or pointers; v_ptr holds v ⊙ λ."""
    blocks_m = tl.cdiv(M, BLOCK_M)
    blocks_k = tl.cdiv(K, BLOCK_K)
    slabs = tl.cdiv(blocks_m, slab_blocks)
    ticket = take_ticket(workspace_ptr, slabs * blocks_k)
    while ticket < slabs * blocks_k:
        slab, block_k = tile_of(ticket, slabs, blocks_k, GROUP_M)
        first_k = block_k * BLOCK_K
        first_block = slab * slab_blocks
        # Addresses hoisted out of the loops would take the registers that the accumulators need.
        for block_m in tl.range(first_block, tl.minimum(first_block + slab_blocks, blocks_m), disable_licm=True):
            first_m = block_m * BLOCK_M
            rows = tl.arange(0, BLOCK_M)
            m = tl.cast(first_m, tl.int64) + rows
            r = tl.arange(0, BLOCK_R)
            r_wide = r.to(tl.int64)
            acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
            if MAKE_V and block_k == 0:
                v = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
                if t_ptr is not None:
                    u_ptrs = u_ptr + m[:, None] * stride_um + r_wide[None, :] * stride_ur
                    u_tile = tl.load(u_ptrs, mask=(m < M)[:, None] & (r < R)[None, :], other=0.0)  # [BLOCK_M, BLOCK_R]
                    u_tile = rounded(u_tile, COMPUTE)
                for first_n in tl.range(0, N, BLOCK_N, disable_licm=True):
                    g_tile = _load_tile(
                        g, first_m, first_n, M, N, stride_gm, stride_gn, COMPUTE, BLOCK_M, BLOCK_N, DESCRIPTORS, False
                    )
                    w_tile = _load_tile(
                        w,
                        first_n,
                        first_k,
                        N,
                        K,
                        stride_wn,
                        stride_wk,
                        COMPUTE,
                        BLOCK_N,
                        BLOCK_K,
                        DESCRIPTORS,
                        not K_CONTIGUOUS,
                    )
                    n = tl.cast(first_n, tl.int64) + tl.arange(0, BLOCK_N)
                    b_ptrs = b_ptr + n[:, None] * stride_bn + r_wide[None, :] * stride_br
                    b_tile = tl.load(b_ptrs, mask=(n < N)[:, None] & (r < R)[None, :], other=0.0)  # [BLOCK_N, BLOCK_R]
                    acc = product(g_tile, w_tile, acc)
                    v = product(g_tile, rounded(b_tile, COMPUTE), v)
                    if t_ptr is not None:
                        t = product(tl.trans(g_tile), u_tile, tl.zeros((BLOCK_N, BLOCK_R), tl.float32))
                        t_offsets = tl.arange(0, BLOCK_N)[:, None] * RANK_PADDED + r[None, :]
                        t_ptrs = t_ptr + (slab.to(tl.int64) * N + first_n) * RANK_PADDED + t_offsets
                        in_t = (n < N)[:, None] & (r < RANK_PADDED)[None, :]
                        if not ONE_BLOCK_SLABS:
                            t += tl.load(t_ptrs, mask=in_t & (block_m > first_block), other=0.0)
                        tl.store(t_ptrs, t, mask=in_t)
                scale = singular_values(e_ptr, mask_ptr, stride_er, stride_mask, scaling, r, R)
                v_tile = rounded(v * scale[None, :], COMPUTE)
                v_ptrs = v_ptr + tl.cast(first_m, tl.int64) * RANK_PADDED + (rows[:, None] * RANK_PADDED + r[None, :])
                tl.store(v_ptrs, v_tile, mask=(m < M)[:, None] & (r < RANK_PADDED)[None, :])
                publish(workspace_ptr, block_m, blocks_k - 1)
            else:
                for first_n in tl.range(0, N, BLOCK_N, disable_licm=True):
                    g_tile = _load_tile(
                        g, first_m, first_n, M, N, stride_gm, stride_gn, COMPUTE, BLOCK_M, BLOCK_N, DESCRIPTORS, False
                    )
                    w_tile = _load_tile(
                        w,
                        first_n,
                        first_k,
                        N,
                        K,
                        stride_wn,
                        stride_wk,
                        COMPUTE,
                        BLOCK_N,
                        BLOCK_K,
                        DESCRIPTORS,
                        not K_CONTIGUOUS,
                    )
                    acc = product(g_tile, w_tile, acc)
                if MAKE_V:
                    await_published(workspace_ptr, block_m)
                v_ptrs = v_ptr + tl.cast(first_m, tl.int64) * RANK_PADDED + (rows[:, None] * RANK_PADDED + r[None, :])
                v_tile = tl.load(v_ptrs, mask=(m < M)[:, None] & (r < RANK_PADDED)[None, :], other=0.0)

            k = first_k.to(tl.int64) + tl.arange(0, BLOCK_K)
            a_ptrs = a_ptr + r_wide[:, None] * stride_ar + k[None, :] * stride_ak
            a_tile = tl.load(a_ptrs, mask=(r < R)[:, None] & (k < K)[None, :], other=0.0)  # [BLOCK_R, BLOCK_K]
            a_tile = rounded(a_tile, COMPUTE)
            if seed_ptr is not None:
                keep = keep_mask(m, k, K, tl.load(seed_ptr), last_dropped)
                low_rank = product(v_tile, a_tile, tl.zeros((BLOCK_M, BLOCK_K), tl.float32))
                acc += drop(low_rank, keep, keep_scale)
            else:
                acc = product(v_tile, a_tile, acc)
            if DESCRIPTORS:
                dx.store([first_m, first_k], rounded(acc, COMPUTE))
            else:
                dx_ptrs = dx + m[:, None] * K + k[None, :]
                tl.store(dx_ptrs, rounded(acc, dx.dtype.element_ty), mask=(m < M)[:, None] & (k < K)[None, :])
            if da_ptr is not None:
                x_tile = _load_tile(
                    x, first_m, first_k, M, K, stride_xm, stride_xk, COMPUTE, BLOCK_M, BLOCK_K, DESCRIPTORS, False
                )
                if seed_ptr is not None:
                    x_tile = drop(x_tile, keep, keep_scale)
                da = product(tl.trans(x_tile), v_tile, tl.zeros((BLOCK_K, BLOCK_R), tl.float32))
                da_offsets = tl.arange(0, BLOCK_K)[:, None] * RANK_PADDED + r[None, :]
                da_ptrs = da_ptr + (slab.to(tl.int64) * K + first_k) * RANK_PADDED + da_offsets
                in_da = (k < K)[:, None] & (r < RANK_PADDED)[None, :]
                if not ONE_BLOCK_SLABS:
                    da += tl.load(da_ptrs, mask=in_da & (block_m > first_block), other=0.0)
                tl.store(da_ptrs, da, mask=in_da)
            if not ONE_BLOCK_SLABS:
                tl.debug_barrier()  # other threads of this program may load what this one stored
        ticket = take_ticket(workspace_ptr, slabs * blocks_k)


class Products(NamedTuple):
    """What the kernel leaves: dx [M, K] in x's dtype, and fp32 shares [slabs, N or K, rank_padding(R)] of T and dAᵀ."""

    dx: Tensor
    t: Tensor | None
    da: Tensor | None


def slab_blocks(blocks_m: int, blocks_k: int, bytes_per_slab: int, programs: int) -> int:
    """How many row blocks make a slab: as few as keep the shares within ``_SHARES``, if enough tickets are left."""
    for_memory = -(-blocks_m * bytes_per_slab // _SHARES)
    for_balance = blocks_m * blocks_k // (_TICKETS_PER_PROGRAM * programs)
    return max(1, min(for_memory, for_balance))


def multiply(
    grad_y: Tensor,
    x: Tensor,
    u: Tensor | None,
    weight: Tensor,
    adapter: Adapter,
    v: Tensor,
    make_v: bool,
    with_da: bool,
) -> Products:
    """dx, and on its way what else is asked for. No dimension is 0, and neither is the rank.

    Args:
        grad_y, x, weight, adapter: as in ``reference.svd_linear.backward``.
        u: [M, ≥R], or None where T isn't asked for. Needs ``make_v``.
        v: contiguous [M, rank_padding(R)] in the dtype of the products, for v ⊙ λ; its columns past R are 0.
        make_v: v is written here; otherwise it is read.
        with_da: whether dA is asked for.
    """
    lora_A, lora_E, lora_B, mask, seed, scaling, dropout_p, compute_dtype = adapter
    (M, K), (N, R) = x.shape, lora_B.shape
    dx = torch.empty((M, K), dtype=x.dtype, device=x.device)
    last_dropped, keep_scale = dropout_arguments(dropout_p if seed is not None else 0.0)
    k_contiguous = weight.stride(1) == 1
    w_rows = weight if k_contiguous else weight.t()
    aligned = all(matrix.dtype == compute_dtype and describable(matrix) for matrix in (grad_y, x, w_rows, dx))
    described = aligned and compute_dtype.itemsize == 2 and has_descriptors(x.device)
    kernel = "one_gemm" if make_v else "dx"
    width = tiles.operand_width(compute_dtype, grad_y, x, weight)
    if width is Width.HALF and not aligned:
        width = Width.MIXED
    factors = lora_A, lora_B
    tile = configurations.choose(kernel, width, R, grad_y, x, weight, *factors, dropout=last_dropped >= 0)
    rank_padded = v.shape[1]
    blocks_m, blocks_k = -(-M // tile.block_m), -(-K // tile.block_k)
    programs = tickets.programs(x.device)
    share_rows = (N if u is not None else 0) + (K if with_da else 0)
    blocks = slab_blocks(blocks_m, blocks_k, share_rows * rank_padded * 4, programs)
    slabs = -(-blocks_m // blocks)
    shares = (
        torch.empty((slabs, rows, rank_padded), dtype=torch.float32, device=x.device) if wanted else None
        for rows, wanted in ((N, u is not None), (K, with_da))
    )
    t, da = shares

    def operand(matrix: Tensor, rows: int, columns: int) -> Tensor | TensorDescriptor:
        return TensorDescriptor.from_tensor(matrix, [rows, columns]) if described else matrix

    w_block = (tile.block_n, tile.block_k) if k_contiguous else (tile.block_k, tile.block_n)
    launch(
        _svd_linear_backward_gemm_kernel,
        (min(slabs * blocks_k, programs),),
        operand(grad_y, tile.block_m, tile.block_n),
        operand(x, tile.block_m, tile.block_k),
        operand(w_rows if described else weight, *w_block),
        operand(dx, tile.block_m, tile.block_k),
        u,
        v,
        lora_A,
        lora_E,
        lora_B,
        mask,
        seed if last_dropped >= 0 else None,
        t,
        da,
        tickets.workspace(x.device, blocks_m),
        M,
        N,
        K,
        R,
        blocks,
        *grad_y.stride(),
        *x.stride(),
        *weight.stride(),
        *strides(u, 2),
        *lora_A.stride(),
        *strides(lora_E, 1),
        *lora_B.stride(),
        *strides(mask, 1),
        scaling,
        last_dropped,
        keep_scale,
        COMPUTE=TRITON_DTYPES[compute_dtype],
        RANK_PADDED=rank_padded,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        BLOCK_R=tiles.rank_block(R),
        GROUP_M=tiles.GROUP_M,
        MAKE_V=make_v,
        ONE_BLOCK_SLABS=blocks == 1,
        DESCRIPTORS=described,
        K_CONTIGUOUS=k_contiguous,
        **tile.options,
    )
    return Products(dx, t, da)


__all__ = ["Products", "multiply", "slab_blocks"]
