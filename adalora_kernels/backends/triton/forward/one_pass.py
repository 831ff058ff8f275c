"""y = x Wᵀ + b + (u ⊙ λ) Bᵀ with u = drop(x) Aᵀ and λ = c · E ⊙ mask, in one pass over x (plan ``one_pass``).

Every N-tile of a row block computes u anew with a second, narrow product in the loop over K that it runs anyway, and
adds the low-rank term to its accumulator before the store. Beyond the frozen product that costs Rpad/BLOCK_N + Rpad/K
of its FLOPs, and of memory traffic only A and B (R (K + N) elements) and the store of u (M Rpad elements), which the
first N-tile does.
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
from adalora_kernels.backends.triton.products import TRITON_DTYPES, product, rounded, singular_values, step, strides
from adalora_kernels.backends.triton.tiles import Width
from adalora_kernels.reference.svd_linear import Adapter


@triton.jit(do_not_specialize=["M", "last_dropped"])
def _svd_linear_one_pass_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
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
):
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    # Row blocks in groups, so that the tiles in flight share rows of x and of W in L2.
    pid_m, pid_n = tl.swizzle2d(pid // tiles_n, pid % tiles_n, tiles_m, tiles_n, GROUP_M)
    m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    r = tl.arange(0, BLOCK_R)
    k_wide = k.to(tl.int64)

    x_ptrs = x_ptr + m[:, None] * stride_xm + k_wide[None, :] * stride_xk
    a_ptrs = a_ptr + k_wide[:, None] * stride_ak + r.to(tl.int64)[None, :] * stride_ar
    w_ptrs = w_ptr + k_wide[:, None] * stride_wk + n[None, :] * stride_wn
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    u = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    if seed_ptr is not None:
        seed = tl.load(seed_ptr)

    for start in range(0, K, BLOCK_K):
        left = K - start
        x_tile = tl.load(x_ptrs, mask=(m[:, None] < M) & (k[None, :] < left), other=0.0)  # [BLOCK_M, BLOCK_K]
        x_tile = rounded(x_tile, COMPUTE)
        w_tile = tl.load(w_ptrs, mask=(k[:, None] < left) & (n[None, :] < N), other=0.0)  # [BLOCK_K, BLOCK_N]
        acc = product(x_tile, rounded(w_tile, COMPUTE), acc)
        if RANK_PADDED > 0:
            a_tile = tl.load(a_ptrs, mask=(k[:, None] < left) & (r[None, :] < R), other=0.0)  # [BLOCK_K, BLOCK_R]
            if seed_ptr is not None:
                x_tile = drop(x_tile, keep_mask(m, start + k, K, seed, last_dropped), keep_scale)
            u = product(x_tile, rounded(a_tile, COMPUTE), u)
            a_ptrs += step(BLOCK_K, stride_ak)
        x_ptrs += step(BLOCK_K, stride_xk)
        w_ptrs += step(BLOCK_K, stride_wk)

    if RANK_PADDED > 0:
        if pid_n == 0:
            u_ptrs = u_ptr + m[:, None] * RANK_PADDED + r[None, :]
            tl.store(u_ptrs, rounded(u, COMPUTE), mask=(m[:, None] < M) & (r[None, :] < RANK_PADDED))
        scale = singular_values(e_ptr, mask_ptr, stride_er, stride_mask, scaling, r, R)
        b_ptrs = b_ptr + r.to(tl.int64)[:, None] * stride_br + n[None, :] * stride_bn
        b_tile = tl.load(b_ptrs, mask=(r[:, None] < R) & (n[None, :] < N), other=0.0)  # [BLOCK_R, BLOCK_N]
        acc = product(rounded(u * scale[None, :], COMPUTE), rounded(b_tile, COMPUTE), acc)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n * stride_bias, mask=n < N, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + m[:, None] * N + n[None, :]
    tl.store(y_ptrs, rounded(acc, COMPUTE), mask=(m[:, None] < M) & (n[None, :] < N))


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, base: None, adapter: Adapter) -> tuple[Tensor, Tensor]:
    """As ``reference.svd_linear.forward`` with a weight, and with u [M, rank_padding(R)]: 0 in its columns past R."""
    lora_A, lora_E, lora_B, mask, seed, scaling, dropout_p, compute_dtype = adapter
    (M, K), (N, R) = x.shape, lora_B.shape
    rank_padded = tiles.rank_padding(R)
    u = torch.empty((M, rank_padded), dtype=compute_dtype, device=x.device)
    y = torch.empty((M, N), dtype=compute_dtype, device=x.device)
    if M == 0:
        return y, u
    last_dropped, keep_scale = dropout_arguments(dropout_p if seed is not None else 0.0)
    width = tiles.operand_width(compute_dtype, x, weight)
    if width is Width.HALF and not (describable(x) and describable(weight if weight.stride(1) == 1 else weight.t())):
        width = Width.MIXED
    tile = configurations.choose("one_pass", width, R, x, weight, lora_A, dropout=last_dropped >= 0)
    launch(
        _svd_linear_one_pass_kernel,
        (-(-M // tile.block_m) * -(-N // tile.block_n),),
        x,
        weight,
        bias,
        lora_A,
        lora_E,
        lora_B,
        mask,
        seed if last_dropped >= 0 else None,
        y,
        u,
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
        RANK_PADDED=rank_padded,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        BLOCK_R=tiles.rank_block(R),
        GROUP_M=tiles.GROUP_M,
        **tile.options,
    )
    return y, u


__all__ = ["forward"]
