"""The dropout mask, regenerated inside each kernel that needs it, so that none is stored.

Element (m, k) of an [M, K] matrix is dropped iff the first output word of Philox 4x32-10 (Salmon et al., SC'11), with
counter m·K + k (64 bits, words 0 and 1) and the 64-bit seed as key, is below round(p · 2³²): the definition of
``reference.philox``.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl

from adalora_kernels.backends.triton.products import rounded


@triton.jit
def keep_mask(m, k, K, seed, last_dropped):
    """Which elements of an [M, K] matrix survive in rows m, int64 [BLOCK_M], and columns k: [BLOCK_M, BLOCK_K]."""
    counter = m[:, None] * K + k[None, :]
    low = counter.to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    word, _, _, _ = tl.philox(seed, low, high, zero, zero)
    return word > last_dropped.to(tl.uint32)


@triton.jit
def drop(tile, keep, keep_scale):
    """A tile with its dropped elements 0 and the rest scaled, in the tile's dtype."""
    return rounded(tl.where(keep, tile.to(tl.float32) * keep_scale, 0.0), tile.dtype)


def dropout_arguments(p: float) -> tuple[int, float]:
    """The largest word that means dropped (-1: none is) and the factor of what is kept, for a dropout probability p.

    Comparing with the last dropped word and not the first kept one lets p = 1, whose first kept word would be 2³², fit
    32 bits.
    """
    return round(p * 2**32) - 1, 1.0 / (1.0 - p) if p < 1 else 0.0


__all__ = ["drop", "dropout_arguments", "keep_mask"]
