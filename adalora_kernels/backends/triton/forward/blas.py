"""y = (u ⊙ λ) Bᵀ + b first, then x Wᵀ accumulated into it by the BLAS (plan ``blas``).

Beyond the frozen product that costs a pass over x for u = drop(x) Aᵀ (M K elements), the write of the low-rank term
(M N elements) and its read by the product, part of which hides under it, but nothing in the product's own loop. The sum
of low-rank term and bias is rounded to the dtype of the products before x Wᵀ joins it, and once more with it: one
rounding more than the other plans have, and one fewer than the expression in PyTorch.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F
from triton.language.extra.cuda import gdc_wait

from adalora_kernels.backends.triton import configurations, tiles
from adalora_kernels.backends.triton.forward.shrink import add_low_rank, has_dependent_launch, shrink
from adalora_kernels.backends.triton.launch import launch
from adalora_kernels.backends.triton.products import TRITON_DTYPES, rounded, strides
from adalora_kernels.reference.svd_linear import Adapter


@triton.jit(do_not_specialize=["M"])
def _svd_linear_low_rank_kernel(
    bias_ptr,
    e_ptr,
    b_ptr,
    mask_ptr,
    u_ptr,
    y_ptr,
    M,
    N,
    R,
    stride_bias,
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
    DEPENDENT: tl.constexpr,
):
    """(u ⊙ λ) Bᵀ + b, a tile for each program; DEPENDENT: u may not be there yet."""
    blocks_m = tl.cdiv(M, BLOCK_M)
    pid = tl.program_id(0)  # a second axis of the grid would end at 65,535 blocks of columns
    m = (pid % blocks_m).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (pid // blocks_m).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_R)
    if DEPENDENT:
        gdc_wait()
    u_ptrs = u_ptr + m[:, None] * RANK_PADDED + r[None, :]
    u_tile = tl.load(u_ptrs, mask=(m[:, None] < M) & (r[None, :] < RANK_PADDED), other=0.0)
    acc = add_low_rank(
        tl.zeros((BLOCK_M, BLOCK_N), tl.float32),
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
    y_ptrs = y_ptr + m[:, None] * N + n[None, :]
    tl.store(y_ptrs, rounded(acc, COMPUTE), mask=(m[:, None] < M) & (n[None, :] < N))


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, base: None, adapter: Adapter) -> tuple[Tensor, Tensor]:
    """As ``reference.svd_linear.forward`` with a weight, and with u [M, rank_padding(R)]: 0 in its columns past R."""
    _, lora_E, lora_B, mask, _, scaling, _, compute_dtype = adapter
    M, (N, R) = x.shape[0], lora_B.shape
    x_compute, w_compute = x.to(compute_dtype), weight.to(compute_dtype)
    dependent = R > 0 and has_dependent_launch(x.device)
    u = shrink(x, adapter, lets_next_begin=dependent)
    if u.numel() == 0:
        return F.linear(x_compute, w_compute, None if bias is None else bias.to(compute_dtype)), u
    y = torch.empty((M, N), dtype=compute_dtype, device=x.device)
    tile = configurations.choose("low_rank", tiles.width_of(compute_dtype), R, u, lora_B)
    launch(
        _svd_linear_low_rank_kernel,
        (-(-M // tile.block_m) * -(-N // tile.block_n),),
        bias,
        lora_E,
        lora_B,
        mask,
        u,
        y,
        M,
        N,
        R,
        *strides(bias, 1),
        *strides(lora_E, 1),
        *lora_B.stride(),
        *strides(mask, 1),
        scaling,
        COMPUTE=TRITON_DTYPES[compute_dtype],
        RANK_PADDED=u.shape[1],
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_R=tiles.rank_block(R),
        DEPENDENT=dependent,
        **tile.options,
        launch_pdl=dependent,
    )
    return y.addmm_(x_compute, w_compute.t()), u


__all__ = ["forward"]
