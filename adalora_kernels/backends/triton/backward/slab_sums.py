"""The second stage of the backward's sums: add what each slab of rows left, and finish the gradients.

    dA = Σ_s dA_s,   T = Σ_s T_s,   dB = T ⊙ λ,   dE = c · mask ⊙ colsum(B ⊙ T)

Reads the shares, slabs_T N Rpad + slabs_A K Rpad fp32 elements, once, and writes the gradients once, in their
parameters' dtypes. Sums are taken in an order that depends on the shapes alone: whichever program happens to be the
last to finish its rows of T, it adds the rows' column sums in the same order. v = g B is summed likewise, from the
shares of the blocks of g's columns.

Where the layer's importance is fused into its backward, it is updated here, on the way of each gradient to memory
(``finishing``).
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from adalora_kernels.backends.triton import configurations, tiles
from adalora_kernels.backends.triton.backward.finishing import (
    arguments,
    finish_singular_values,
    importance_of,
    leave_probes,
    leave_sums,
    with_before,
    with_share,
)
from adalora_kernels.backends.triton.launch import launch
from adalora_kernels.backends.triton.products import rounded, singular_values, strides
from adalora_kernels.backends.triton.tickets import arrives_last, workspace
from adalora_kernels.reference.handover import PROBES, LayerImportance
from adalora_kernels.reference.svd_linear import Adapter

_ELEMENTS = 4096  # in flight at a time in a program, of fp32


@triton.jit
def _sum_slabs(
    shares_ptr,
    slabs,
    first_row,
    ROWS,
    RANK_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """BLOCK rows of fp32 shares [slabs, ROWS, RANK_PADDED] summed over the slabs: [BLOCK, BLOCK_R]."""
    s = tl.arange(0, BLOCK_S)
    rows = first_row + tl.arange(0, BLOCK)
    r = tl.arange(0, BLOCK_R)
    inside = (rows < ROWS)[:, None] & (r < RANK_PADDED)[None, :]
    share_ptrs = shares_ptr + s.to(tl.int64)[:, None, None] * ROWS * RANK_PADDED
    share_ptrs += (rows.to(tl.int64)[:, None] * RANK_PADDED + r[None, :])[None, :, :]
    total = tl.zeros((BLOCK, BLOCK_R), tl.float32)
    for start in range(0, slabs, BLOCK_S):
        shares = tl.load(share_ptrs, mask=(s < slabs - start)[:, None, None] & inside[None, :, :], other=0.0)
        total += tl.sum(shares, axis=0)
        share_ptrs += tl.full((), BLOCK_S, tl.int64) * ROWS * RANK_PADDED
    return total


# What differs from layer to layer of one shape: one compiled kernel serves them all.
_FREE = (
    "slabs_t", "slabs_a", "blocks_t", "sums_ptr", "probes_ptr", "first_slope_a", "first_slope_b", "elements", "first"
)  # fmt: skip


@triton.jit(do_not_specialize=_FREE)
def _svd_linear_backward_finish_kernel(
    t_ptr,
    da_shares_ptr,
    a_ptr,
    e_ptr,
    b_ptr,
    mask_ptr,
    colsum_ptr,
    workspace_ptr,
    da_ptr,
    de_ptr,
    db_ptr,
    N,
    K,
    R,
    slabs_t,
    slabs_a,
    blocks_t,
    stride_er,
    stride_bn,
    stride_br,
    stride_mask,
    scaling,
    a_before_ptr,
    e_before_ptr,
    b_before_ptr,
    slopes_ptr,
    scale_ptr,
    state_ptr,
    half_ptr,
    sums_ptr,
    probes_ptr,
    first_slope_a,
    first_slope_b,
    elements,
    first,
    beta1,
    rest1,
    beta2,
    rest2,
    IMPORTANCE: tl.constexpr,
    RANK_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PROBES: tl.constexpr,
):
    """The first ``blocks_t`` programs sum T and finish dB and dE, the others dA.

    From ``a_before_ptr`` on the arguments are those of importance. Parameters and gradients are contiguous there.
    """
    pid = tl.program_id(0)
    r = tl.arange(0, BLOCK_R)
    smoothing = (beta1, rest1, beta2, rest2)
    first_e = tl.full((), R, tl.int64) * K + first
    slots_a = tl.cdiv(K, BLOCK)
    if pid < blocks_t:
        if t_ptr is not None:
            t = _sum_slabs(t_ptr, slabs_t, pid * BLOCK, N, RANK_PADDED, BLOCK, BLOCK_R, BLOCK_S)
            n = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            inside = (n < N)[:, None] & (r < R)[None, :]
            if db_ptr is not None:
                at = n[:, None] * R + r[None, :]
                db = t * singular_values(e_ptr, mask_ptr, stride_er, stride_mask, scaling, r, R)[None, :]
                db = rounded(db, db_ptr.dtype.element_ty)
                if slopes_ptr is not None:
                    db = with_share(
                        db, b_ptr, n, N, stride_bn, stride_br, slopes_ptr + first_slope_b, scale_ptr, R,
                        db_ptr.dtype.element_ty, BLOCK, BLOCK_R,
                    )  # fmt: skip
                tl.store(db_ptr + at, db, mask=inside)
                if IMPORTANCE:
                    total = with_before(db, b_before_ptr, at, inside, db_ptr.dtype.element_ty)
                    s = importance_of(total, b_ptr, at, inside, state_ptr, half_ptr, elements, first_e + R, smoothing)
                    leave_sums(s, sums_ptr, slots_a + 1 + pid, R, BLOCK_R)
                    leave_probes(total, probes_ptr + 2 * PROBES, n, N, R, BLOCK_R)
            if de_ptr is not None:
                b_ptrs = b_ptr + n[:, None] * stride_bn + r.to(tl.int64)[None, :] * stride_br
                b_tile = tl.load(b_ptrs, mask=inside, other=0.0).to(tl.float32)  # [BLOCK, BLOCK_R]
                tl.store(colsum_ptr + pid * RANK_PADDED + r, tl.sum(b_tile * t, axis=0), mask=r < RANK_PADDED)
                if arrives_last(workspace_ptr, blocks_t):
                    c = tl.arange(0, BLOCK_C)
                    colsum = tl.zeros((BLOCK_R,), tl.float32)
                    for start in range(0, blocks_t, BLOCK_C):
                        colsum_ptrs = colsum_ptr + (start + c)[:, None] * RANK_PADDED + r[None, :]
                        here = (start + c < blocks_t)[:, None] & (r < RANK_PADDED)[None, :]
                        colsum += tl.sum(tl.load(colsum_ptrs, mask=here, other=0.0), axis=0)
                    de = colsum * scaling
                    if mask_ptr is not None:
                        de *= tl.load(mask_ptr + r * stride_mask, mask=r < R, other=0).to(tl.float32)
                    de = rounded(de, de_ptr.dtype.element_ty)
                    tl.store(de_ptr + r, de, mask=r < R)
                    if IMPORTANCE:
                        finish_singular_values(
                            de, e_ptr, e_before_ptr, state_ptr, half_ptr, elements, first_e,
                            sums_ptr + tl.full((), R, tl.int64) * slots_a, probes_ptr + PROBES, R, smoothing,
                            de_ptr.dtype.element_ty, BLOCK_R,
                        )  # fmt: skip
    else:
        if da_ptr is not None:
            block_a = pid - blocks_t
            da = _sum_slabs(da_shares_ptr, slabs_a, block_a * BLOCK, K, RANK_PADDED, BLOCK, BLOCK_R, BLOCK_S)
            k = block_a * BLOCK + tl.arange(0, BLOCK)
            at = r.to(tl.int64)[None, :] * K + k[:, None]
            inside = (k < K)[:, None] & (r < R)[None, :]
            da = rounded(da, da_ptr.dtype.element_ty)
            if slopes_ptr is not None:
                da = with_share(
                    da, a_ptr, k, K, 1, K, slopes_ptr + first_slope_a, scale_ptr, R,
                    da_ptr.dtype.element_ty, BLOCK, BLOCK_R,
                )  # fmt: skip
            tl.store(da_ptr + at, da, mask=inside)
            if IMPORTANCE:
                total = with_before(da, a_before_ptr, at, inside, da_ptr.dtype.element_ty)
                s = importance_of(total, a_ptr, at, inside, state_ptr, half_ptr, elements, first, smoothing)
                leave_sums(s, sums_ptr, block_a, R, BLOCK_R)
                leave_probes(total, probes_ptr, k, K, R, BLOCK_R)


@triton.jit(do_not_specialize=["M", "blocks_n"])
def _svd_linear_backward_sum_v_kernel(
    shares_ptr,
    e_ptr,
    mask_ptr,
    v_ptr,
    M,
    R,
    blocks_n,
    stride_er,
    stride_mask,
    scaling,
    RANK_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """v ⊙ λ from the shares of v that each block of columns of g left."""
    first_m = tl.program_id(0).to(tl.int64) * BLOCK
    m = first_m + tl.arange(0, BLOCK)
    r = tl.arange(0, BLOCK_R)
    v = _sum_slabs(shares_ptr, blocks_n, first_m, M, RANK_PADDED, BLOCK, BLOCK_R, BLOCK_S)
    v *= singular_values(e_ptr, mask_ptr, stride_er, stride_mask, scaling, r, R)[None, :]
    v_ptrs = v_ptr + m[:, None] * RANK_PADDED + r[None, :]
    tl.store(v_ptrs, rounded(v, v_ptr.dtype.element_ty), mask=(m < M)[:, None] & (r < RANK_PADDED)[None, :])


def sum_v(shares: Tensor, adapter: Adapter) -> Tensor:
    """v ⊙ λ [M, rank_padding(R)] in the dtype of the products, from fp32 shares [column blocks, M, rank_padding(R)]."""
    blocks_n, M, rank_padded = shares.shape
    _, lora_E, lora_B, mask, _, scaling, _, compute_dtype = adapter
    R = lora_B.shape[1]
    tile, rank_block = configurations.FINISH, tiles.rank_block(R)
    v = torch.empty((M, rank_padded), dtype=compute_dtype, device=shares.device)
    launch(
        _svd_linear_backward_sum_v_kernel,
        (-(-M // tile.block_m),),
        shares,
        lora_E,
        mask,
        v,
        M,
        R,
        blocks_n,
        *strides(lora_E, 1),
        *strides(mask, 1),
        scaling,
        RANK_PADDED=rank_padded,
        BLOCK=tile.block_m,
        BLOCK_R=rank_block,
        BLOCK_S=_ELEMENTS // (tile.block_m * rank_block),
        **tile.options,
    )
    return v


def finish(
    t: Tensor | None,
    da_shares: Tensor | None,
    adapter: Adapter,
    needs: tuple[bool, bool, bool, bool],
    importance: LayerImportance | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dA, dE and dB, each None where it isn't asked for.

    Args:
        t: contiguous fp32 [slabs, N, rank_padding(R)], each slab's share of T; None where neither dE nor dB is needed.
        da_shares: likewise [slabs, K, rank_padding(R)] of dAᵀ; None where dA isn't needed.
        adapter: of the layer.
        needs: whether dx, dA, dE, dB are asked for.
        importance: to be updated on the way, where all three are; its term is added to dA and dB.
    """
    lora_A, lora_E, lora_B, mask, _, scaling, _, _ = adapter
    (R, K), N = lora_A.shape, lora_B.shape[0]
    _, need_A, need_E, need_B = needs
    device = lora_A.device
    if importance is not None and importance.finisher is not None:
        assert t is not None and da_shares is not None
        importance.done = True
        return importance.finisher(t, da_shares, adapter, importance, workspace(device, 0))
    dA = torch.empty((R, K), dtype=lora_A.dtype, device=device) if need_A else None
    dE = torch.empty(lora_E.shape, dtype=lora_E.dtype, device=device) if need_E else None
    dB = torch.empty((N, R), dtype=lora_B.dtype, device=device) if need_B else None
    if not (need_A or need_E or need_B):
        return dA, dE, dB
    tile, rank_padded, rank_block = configurations.FINISH, tiles.rank_padding(R), tiles.rank_block(R)
    options = tile.options | {"enable_fp_fusion": False}  # importance is rounded as by the launch before the step
    if importance is not None:
        options["num_warps"], options["maxnreg"] = configurations.FINISH_WITH_IMPORTANCE[rank_block]
    blocks_t = -(-N // tile.block_m) if t is not None else 0
    blocks_a = -(-K // tile.block_m) if need_A else 0
    launch(
        _svd_linear_backward_finish_kernel,
        (blocks_t + blocks_a,),
        t,
        da_shares,
        lora_A if importance is not None else None,
        lora_E,
        lora_B,
        mask,
        torch.empty((blocks_t, rank_padded), dtype=torch.float32, device=device) if need_E else None,
        workspace(device, 0) if need_E else None,
        dA,
        dE,
        dB,
        N,
        K,
        R,
        t.shape[0] if t is not None else 0,
        da_shares.shape[0] if da_shares is not None else 0,
        blocks_t,
        *strides(lora_E, 1),
        *lora_B.stride(),
        *strides(mask, 1),
        scaling,
        *arguments(importance),
        IMPORTANCE=importance is not None,
        RANK_PADDED=rank_padded,
        BLOCK=tile.block_m,
        BLOCK_R=rank_block,
        BLOCK_S=_ELEMENTS // (tile.block_m * rank_block),
        BLOCK_C=_ELEMENTS // rank_block,
        PROBES=PROBES,
        **options,
    )
    if importance is not None:
        importance.done = True
    return dA, dE, dB


__all__ = ["finish", "sum_v"]
