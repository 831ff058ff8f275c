"""Importance while a gradient is still in registers: what ``slab_sums`` does with it besides storing it.

    I = |θ g|,  Ī ← β₁ Ī + (1-β₁) I,  Ū ← β₂ Ū + (1-β₂) |I - Ī|,  s = Ī Ū

with g the gradient, the layer's share D A (B D) of the orthogonality term in it, and what accumulated before.
``reference.handover`` is the contract. An element of A costs 20 bytes in fp32 (θ, Ī, Ū read; Ī, Ū written), one of B
16, since dE reads B anyway; of the launch before the step there remain 4 / ``POSITIONS`` bytes written and read again.
That launch alone costs 24.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from adalora_kernels.backends.triton.engine.elements import averaged
from adalora_kernels.backends.triton.products import product, rounded
from adalora_kernels.reference import handover
from adalora_kernels.reference.handover import LayerImportance

_PROBES = tl.constexpr(handover.PROBES)
_INNER = tl.constexpr(16)  # triplets at a time of the orthogonality term
_INFINITY = tl.constexpr(0x7F800000)  # its bits in fp32


@triton.jit
def with_share(
    g,
    matrix_ptr,
    positions,
    length,
    stride_position,
    stride_triplet,
    slopes_ptr,
    scale_ptr,
    R,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Of a gradient [BLOCK, BLOCK_R], positions by triplets: with its share of the orthogonality term, in DTYPE.

    D is symmetric: the share of position p and triplet i is Σ_j θ_pj D_ji.
    """
    r = tl.arange(0, BLOCK_R)
    scale = tl.load(scale_ptr).to(tl.float32)
    share = tl.zeros((BLOCK, BLOCK_R), tl.float32)
    rows = matrix_ptr + positions.to(tl.int64)[:, None] * stride_position
    for first in range(0, R, _INNER):
        j = first + tl.arange(0, _INNER)
        inside = (positions < length)[:, None] & (j < R)[None, :]
        tile = tl.load(rows + j.to(tl.int64)[None, :] * stride_triplet, mask=inside, other=0.0).to(tl.float32)
        at = j[:, None] * R + r[None, :]
        slopes = tl.load(slopes_ptr + at, mask=(j < R)[:, None] & (r < R)[None, :], other=0.0).to(tl.float32)
        share = product(tile, slopes * scale, share)
    return rounded(share + g.to(tl.float32), DTYPE)


@triton.jit
def with_before(g, before_ptr, at, inside, DTYPE: tl.constexpr):
    """The gradient as autograd will add it to the one that was there, in fp32."""
    total = g.to(tl.float32)
    if before_ptr is not None:
        before = tl.load(before_ptr + at, mask=inside, other=0.0).to(tl.float32)
        total = rounded(before + total, DTYPE).to(tl.float32)
    return total


@triton.jit
def importance_of(g, theta_ptr, at, inside, state_ptr, half_ptr, elements, first, smoothing):
    """Step Ī and Ū of the elements ``at`` of a parameter, which begins at ``first``; returns s, 0 where not inside."""
    half = tl.load(half_ptr).to(tl.int64)
    all_elements = tl.full((), 0, tl.int64) + elements
    average_ptrs = state_ptr + half * 2 * all_elements + first + at
    new_ptrs = state_ptr + (1 - half) * 2 * all_elements + first + at
    theta = tl.load(theta_ptr + at, mask=inside, other=0.0).to(tl.float32)
    average = tl.load(average_ptrs, mask=inside, other=0.0)
    uncertainty = tl.load(average_ptrs + all_elements, mask=inside, other=0.0)
    average, uncertainty = averaged(theta, g, average, uncertainty, smoothing)
    tl.store(new_ptrs, average, mask=inside)
    tl.store(new_ptrs + all_elements, uncertainty, mask=inside)
    return tl.where(inside, average * uncertainty, 0.0)


@triton.jit
def _unless_broken(total, largest):
    """The sums, NaN where the largest of their summands, given by its bits, is not finite."""
    return tl.where(largest >= _INFINITY, float("nan"), total)


@triton.jit
def leave_sums(s, sums_ptr, slot, R, BLOCK_R: tl.constexpr):
    """Σ s of each triplet over the positions of a tile [BLOCK, BLOCK_R]."""
    r = tl.arange(0, BLOCK_R)
    largest = tl.max(s.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0)
    sums_ptrs = sums_ptr + slot.to(tl.int64) * R + r
    tl.store(sums_ptrs, _unless_broken(tl.sum(s, axis=0), largest), mask=r < R)


@triton.jit
def leave_probes(g, probes_ptr, positions, length, R, BLOCK_R: tl.constexpr):
    """Those of the parameter's probes that lie in a tile [BLOCK, BLOCK_R]."""
    r = tl.arange(0, BLOCK_R)
    step = tl.maximum(length // _PROBES, 1)
    positions = positions.to(tl.int32)
    i = positions // step
    chosen = (positions < length) & (positions % step == 0) & (i < _PROBES)
    probe_ptrs = probes_ptr + i[:, None] + tl.zeros((1, BLOCK_R), tl.int32)
    tl.store(probe_ptrs, g, mask=chosen[:, None] & (r[None, :] == (i % R)[:, None]))


@triton.jit
def finish_singular_values(
    g, theta_ptr, before_ptr, state_ptr, half_ptr, elements, first, sums_ptr, probes_ptr, R, smoothing,
    DTYPE: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """All of the above for dE [BLOCK_R]: each element is a sum of its own."""
    r = tl.arange(0, BLOCK_R)
    total = with_before(g, before_ptr, r, r < R, DTYPE)
    s = importance_of(total, theta_ptr, r, r < R, state_ptr, half_ptr, elements, first, smoothing)
    tl.store(sums_ptr + r, _unless_broken(s, s.to(tl.int32, bitcast=True) & 0x7FFFFFFF), mask=r < R)
    step = tl.maximum(R // _PROBES, 1)
    tl.store(probes_ptr + r // step, total, mask=(r < R) & (r % step == 0) & (r // step < _PROBES))


_NOTHING = (None,) * 9 + (0, 0, 0, 0) + (0.0,) * 4


def arguments(update: LayerImportance | None) -> tuple[Any, ...]:
    """What the kernel takes besides the layer's own."""
    if update is None:
        return _NOTHING
    offset_A, offset_B, first, beta1, beta2 = update.numbers
    elements = update.state.numel() // 4
    return (*update.tensors, offset_A, offset_B, elements, first, beta1, 1.0 - beta1, beta2, 1.0 - beta2)


__all__ = [
    "arguments",
    "finish_singular_values",
    "importance_of",
    "leave_probes",
    "leave_sums",
    "with_before",
    "with_share",
]
