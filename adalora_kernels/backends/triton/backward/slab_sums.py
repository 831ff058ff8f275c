"""The second stage of the backward's sums over tokens: add what each slab of rows left, and finish the gradients.

    dA = Σ_s dA_s,   dB = (Σ_s T_s) ⊙ λ,   dE = c · mask ⊙ Σ_s colsum(B ⊙ T_s)

Reads the partials, R (slabs_T N + slabs_A K) fp32 elements, once and writes the gradients once, in their
parameters' dtypes.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl

from adalora_kernels.backends.triton.products import rounded, singular_values


@triton.jit
def _sum_slabs(partial_ptr, slabs, rows, ROWS, RANK_PADDED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr):
    """Some rows of fp32 partials [slabs, ROWS, RANK_PADDED] summed over the slabs in order: [BLOCK, BLOCK_R]."""
    r = tl.arange(0, BLOCK_R)
    partial_ptrs = partial_ptr + rows[:, None] * RANK_PADDED + r[None, :]
    total = tl.zeros((BLOCK, BLOCK_R), tl.float32)
    for _ in range(slabs):
        total += tl.load(partial_ptrs, mask=(rows[:, None] < ROWS) & (r[None, :] < RANK_PADDED), other=0.0)
        partial_ptrs += ROWS * RANK_PADDED
    return total


@triton.jit(do_not_specialize=["slabs_t", "slabs_a", "colsum_rows", "blocks_b", "blocks_a"])
def svd_linear_backward_finish_kernel(
    t_ptr,
    colsum_ptr,
    partial_a_ptr,
    e_ptr,
    mask_ptr,
    da_ptr,
    de_ptr,
    db_ptr,
    N,
    K,
    R,
    slabs_t,
    slabs_a,
    colsum_rows,
    blocks_b,
    blocks_a,
    stride_er,
    stride_mask,
    scaling,
    RANK_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Add the slabs up: the first ``blocks_b`` programs finish dB, the next ``blocks_a`` dA, the one after them dE."""
    pid = tl.program_id(0)
    r = tl.arange(0, BLOCK_R)
    if pid < blocks_b:
        if db_ptr is not None:
            n = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            t = _sum_slabs(t_ptr, slabs_t, n, N, RANK_PADDED, BLOCK, BLOCK_R)
            db = t * singular_values(e_ptr, mask_ptr, stride_er, stride_mask, scaling, r, R)[None, :]
            db_ptrs = db_ptr + n[:, None] * R + r[None, :]
            tl.store(db_ptrs, rounded(db, db_ptr.dtype.element_ty), mask=(n[:, None] < N) & (r[None, :] < R))
    elif pid < blocks_b + blocks_a:
        if da_ptr is not None:
            k = (pid - blocks_b).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            da = _sum_slabs(partial_a_ptr, slabs_a, k, K, RANK_PADDED, BLOCK, BLOCK_R)
            da_ptrs = da_ptr + r.to(tl.int64)[None, :] * K + k[:, None]
            tl.store(da_ptrs, rounded(da, da_ptr.dtype.element_ty), mask=(k[:, None] < K) & (r[None, :] < R))
    else:
        if de_ptr is not None:
            rows = tl.arange(0, BLOCK)
            total = tl.zeros((BLOCK, BLOCK_R), tl.float32)
            for start in range(0, colsum_rows, BLOCK):
                offsets = (start + rows)[:, None] * RANK_PADDED + r[None, :]
                inside = (start + rows < colsum_rows)[:, None] & (r[None, :] < RANK_PADDED)
                total += tl.load(colsum_ptr + offsets, mask=inside, other=0.0)
            de = tl.sum(total, axis=0) * scaling
            if mask_ptr is not None:
                de *= tl.load(mask_ptr + r * stride_mask, mask=r < R, other=0).to(tl.float32)
            tl.store(de_ptr + r, rounded(de, de_ptr.dtype.element_ty), mask=r < R)


__all__ = ["svd_linear_backward_finish_kernel"]
