"""u = drop(x) Aᵀ, the raw low-rank product of the layer, and the low-rank term (u ⊙ λ) Bᵀ + b as a tile.

A program of the shrink kernel computes u of a row block, reading its rows of x and A once: M K + R K elements for each
row block, and M Rpad written. Where the row blocks don't fill the device, K is cut into slices, a program each; every
slice leaves fp32 partials and the program that arrives last adds them in the order of the slices, so the sum is the
same in every run.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from adalora_kernels.backends.triton import configurations, tiles
from adalora_kernels.backends.triton.descriptors import describable, has_descriptors
from adalora_kernels.backends.triton.dropout import drop, dropout_arguments, keep_mask
from adalora_kernels.backends.triton.launch import launch
from adalora_kernels.backends.triton.products import TRITON_DTYPES, product, rounded, singular_values, step
from adalora_kernels.backends.triton.tickets import arrives_last, programs, workspace
from adalora_kernels.backends.triton.tiles import Width
from adalora_kernels.reference.svd_linear import Adapter

_SHORTEST_SLICE = 8  # steps over K: below that, starting a program costs more than its slice


@triton.jit
def low_rank_rows(
    x,
    a_ptr,
    seed_ptr,
    pid_m,
    first,
    last,
    M,
    K,
    R,
    stride_xm,
    stride_xk,
    stride_ar,
    stride_ak,
    last_dropped,
    keep_scale,
    COMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """The share of columns first to last of x in a row block of u, fp32 [BLOCK_M, BLOCK_R]; x as in ``gemm``.

    ``first`` is a multiple of BLOCK_K, and so is ``last``, unless it is K.
    """
    m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    r = tl.arange(0, BLOCK_R)
    k_wide = k.to(tl.int64) + first
    if not DESCRIPTORS:
        x_ptrs = x + m[:, None] * stride_xm + k_wide[None, :] * stride_xk
    a_ptrs = a_ptr + k_wide[:, None] * stride_ak + r.to(tl.int64)[None, :] * stride_ar
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)
    u = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(first, last, BLOCK_K):
        left = K - start  # of K, and not of last, is known whether loads may be wide
        if DESCRIPTORS:
            x_tile = x.load([pid_m * BLOCK_M, start])  # [BLOCK_M, BLOCK_K]
        else:
            x_tile = rounded(tl.load(x_ptrs, mask=(m[:, None] < M) & (k[None, :] < left), other=0.0), COMPUTE)
            x_ptrs += step(BLOCK_K, stride_xk)
        a_tile = tl.load(a_ptrs, mask=(k[:, None] < left) & (r[None, :] < R), other=0.0)  # [BLOCK_K, BLOCK_R]
        if seed_ptr is not None:
            x_tile = drop(x_tile, keep_mask(m, start + k, K, seed, last_dropped), keep_scale)
        u = product(x_tile, rounded(a_tile, COMPUTE), u)
        a_ptrs += step(BLOCK_K, stride_ak)
    return u


@triton.jit
def add_low_rank(
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
    COMPUTE: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """acc + (u ⊙ λ) Bᵀ + b in columns n, with u in COMPUTE [BLOCK_M, BLOCK_R]; without u_tile, acc + b."""
    if u_tile is not None:
        r = tl.arange(0, BLOCK_R)
        scale = singular_values(e_ptr, mask_ptr, stride_er, stride_mask, scaling, r, R)
        b_ptrs = b_ptr + r.to(tl.int64)[:, None] * stride_br + n[None, :] * stride_bn
        b_tile = tl.load(b_ptrs, mask=(r[:, None] < R) & (n[None, :] < N), other=0.0)  # [BLOCK_R, BLOCK_N]
        u_scaled = rounded(u_tile.to(tl.float32) * scale[None, :], COMPUTE)
        acc = product(u_scaled, rounded(b_tile, COMPUTE), acc)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n * stride_bias, mask=n < N, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit(do_not_specialize=["M", "columns_per_slice", "last_dropped"])
def _svd_linear_shrink_kernel(
    x_ptr,
    a_ptr,
    seed_ptr,
    u_ptr,
    partial_ptr,
    workspace_ptr,
    M,
    K,
    R,
    columns_per_slice,
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
    LETS_NEXT_BEGIN: tl.constexpr,
):
    """u of one row block, from all of K or from one slice of it; partial_ptr is fp32 [slices, M, RANK_PADDED]."""
    if LETS_NEXT_BEGIN:
        gdc_launch_dependents()
    pid_m = tl.program_id(0)
    piece = tl.program_id(1)
    first = tl.multiple_of(piece * columns_per_slice, BLOCK_K)
    u = low_rank_rows(
        x_ptr,
        a_ptr,
        seed_ptr,
        pid_m,
        first,
        tl.minimum(first + columns_per_slice, K),
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
        False,
    )
    m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.arange(0, BLOCK_R)
    offsets = m[:, None] * RANK_PADDED + r[None, :]
    inside = (m[:, None] < M) & (r[None, :] < RANK_PADDED)
    if partial_ptr is None:
        tl.store(u_ptr + offsets, rounded(u, COMPUTE), mask=inside)
    else:
        partial_ptrs = partial_ptr + offsets
        slice_size = M.to(tl.int64) * RANK_PADDED
        tl.store(partial_ptrs + piece * slice_size, u, mask=inside)
        slices = tl.num_programs(1)
        if arrives_last(workspace_ptr + pid_m, slices):
            u = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
            for _ in range(slices):
                u += tl.load(partial_ptrs, mask=inside, other=0.0)
                partial_ptrs += slice_size
            tl.store(u_ptr + offsets, rounded(u, COMPUTE), mask=inside)


def slices_of(K: int, block_k: int, row_blocks: int, device: torch.device) -> tuple[int, int]:
    """Into how many slices, of how many columns, K is cut: into one where the row blocks fill half the device."""
    wanted = max(1, min(programs(device) // row_blocks, K // (_SHORTEST_SLICE * block_k)))
    columns = max(1, -(-K // (wanted * block_k))) * block_k
    return max(1, -(-K // columns)), columns


def has_dependent_launch(device: torch.device) -> bool:
    """Whether a launch can begin under the end of the one before it: where there are descriptors, too."""
    return has_descriptors(device)


def shrink(x: Tensor, adapter: Adapter, lets_next_begin: bool) -> Tensor:
    """u = drop(x) Aᵀ, [M, rank_padding(R)] in the dtype of the products, 0 in its columns past R.

    Args:
        x: [M, K], any strides.
        adapter: as in ``reference.svd_linear.forward``.
        lets_next_begin: the next launch on the stream is a dependent one, and may begin while this one runs.
    """
    lora_A, _, _, _, seed, _, dropout_p, compute_dtype = adapter
    (M, K), R = x.shape, lora_A.shape[0]
    rank_padded = tiles.rank_padding(R)
    u = torch.empty((M, rank_padded), dtype=compute_dtype, device=x.device)
    if u.numel() == 0:
        return u
    last_dropped, keep_scale = dropout_arguments(dropout_p if seed is not None else 0.0)
    width = tiles.operand_width(compute_dtype, x)
    if width is Width.HALF and not describable(x):
        width = Width.MIXED
    tile = configurations.choose("shrink", width, R, x, lora_A, dropout=last_dropped >= 0)
    row_blocks = -(-M // tile.block_m)
    slices, columns_per_slice = slices_of(K, tile.block_k, row_blocks, x.device)
    partial = counters = None
    if slices > 1:
        partial = torch.empty((slices, M, rank_padded), dtype=torch.float32, device=x.device)
        counters = workspace(x.device, row_blocks)
    launch(
        _svd_linear_shrink_kernel,
        (row_blocks, slices),
        x,
        lora_A,
        seed if last_dropped >= 0 else None,
        u,
        partial,
        counters,
        M,
        K,
        R,
        columns_per_slice,
        *x.stride(),
        *lora_A.stride(),
        last_dropped,
        keep_scale,
        COMPUTE=TRITON_DTYPES[compute_dtype],
        RANK_PADDED=rank_padded,
        BLOCK_M=tile.block_m,
        BLOCK_K=tile.block_k,
        BLOCK_R=tiles.rank_block(R),
        LETS_NEXT_BEGIN=lets_next_begin,
        **tile.options,
    )
    return u


__all__ = ["add_low_rank", "has_dependent_launch", "low_rank_rows", "shrink", "slices_of"]
