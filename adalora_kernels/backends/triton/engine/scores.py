"""The end of a sweep: the score of each triplet from the sums that items left, and whether all is taken.

S_i = s(E_i) + mean_k s(A_ik) + mean_j s(B_ji)
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl

_SUMS = tl.constexpr(512)  # of a layer, in flight at a time


@triton.jit
def _total(sums_ptr, slots, i, R, BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr):
    """The sums [slots, R] of the triplets i over their slots, fp64 [BLOCK_R]."""
    slot = tl.arange(0, BLOCK_S)
    total = tl.zeros((BLOCK_R,), tl.float64)
    for first in range(0, slots, BLOCK_S):
        at = (first + slot)[:, None] * R + i[None, :]
        inside = (first + slot < slots)[:, None] & (i < R)[None, :]
        total += tl.sum(tl.load(sums_ptr + at, mask=inside, other=0.0).to(tl.float64), axis=0)
    return total


@triton.jit
def score(sums_ptr, scores_ptr, R, inverse_k, inverse_n, slots_a, slots_b, BLOCK_R: tl.constexpr):
    """S of a layer's triplets, from the sums that its items left: [slots_a, R] of A, [R] of E, [slots_b, R] of B."""
    for first in range(0, R, BLOCK_R):
        i = first + tl.arange(0, BLOCK_R)
        a = _total(sums_ptr, slots_a, i, R, _SUMS // BLOCK_R, BLOCK_R)
        e = tl.load(sums_ptr + slots_a * R + i, mask=i < R, other=0.0).to(tl.float64)
        b = _total(sums_ptr + (slots_a + 1) * R, slots_b, i, R, _SUMS // BLOCK_R, BLOCK_R)
        score = e + (a * inverse_k + b * inverse_n)
        tl.store(scores_ptr + i, score.to(tl.float32), mask=i < R)


@triton.jit
def commit(overflow_ptr, half_ptr, scores_ptr, pending_ptr, total_rank, taken_ptr):
    """Take the new half and scores unless some s was not finite, and say so."""
    finite = tl.atomic_xchg(overflow_ptr, 0, sem="relaxed") == 0
    if finite:
        for first in range(0, total_rank, 1024):
            i = first + tl.arange(0, 1024)
            tl.store(scores_ptr + i, tl.load(pending_ptr + i, mask=i < total_rank), mask=i < total_rank)
        tl.store(half_ptr, 1 - tl.load(half_ptr))
    tl.store(taken_ptr, finite)


__all__ = ["commit", "score"]
