"""What the sweep does with a parameter that a backward has updated already (``reference.handover``)."""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl

from adalora_kernels.backends.triton.engine.operands import read

_INFINITY = tl.constexpr(0x7F800000)  # its bits in fp32; those of NaN are above


@triton.jit
def is_as_seen(grad, known, probes_ptr, part, R, K, N, PROBES: tl.constexpr):
    """Whether the gradient of part 0 (A), 1 (E) or 2 (B) has its probes' bits; False where not ``known``.

    Some write without telling autograd: a GradScaler, a collective, ``.data``.
    """
    i = tl.arange(0, PROBES)
    length = tl.where(part == 0, K, tl.where(part == 1, R, N))
    position = i * tl.maximum(length // PROBES, 1)
    triplet = i % tl.maximum(R, 1)
    at = tl.where(part == 0, triplet * K + position, tl.where(part == 1, position, position * R + triplet))
    inside = (position < length) & (R > 0) & known
    now = read(grad, at, inside, False).to(tl.int32, bitcast=True)
    seen = tl.load(probes_ptr + i, mask=inside, other=0.0).to(tl.int32, bitcast=True)
    return known & (tl.max(tl.where(inside & (now != seen), 1, 0)) == 0)


@triton.jit
def take_sums(
    left_ptr, slots, R, triplets, sum_ptr, overflow_ptr, SLOTS: tl.constexpr, TRIPLETS: tl.constexpr
):  # fmt: skip
    """Store the sums over the slots [slots, R] that a backward left of up to TRIPLETS triplets.

    Where one is NaN some s was not finite: the overflow flag is set.
    """
    slot, i = tl.arange(0, SLOTS), tl.arange(0, TRIPLETS)
    inside = (slot < slots)[:, None] & (i < triplets)[None, :]
    sums = tl.load(left_ptr + slot.to(tl.int64)[:, None] * R + i[None, :], mask=inside, other=0.0)
    tl.store(sum_ptr + i, tl.sum(sums, axis=0), mask=i < triplets)
    if tl.max(sums.to(tl.int32, bitcast=True) & 0x7FFFFFFF) > _INFINITY:
        tl.atomic_or(overflow_ptr, 1, sem="relaxed")


__all__ = ["is_as_seen", "take_sums"]
