"""Dropout from a counter-based generator (Philox 4x32-10; Salmon et al., SC'11), so that no mask is stored.

Element (m, k) of an [M, K] matrix is dropped iff the first output word of Philox, with counter (m·K + k) as a 64-bit
number in words 0 and 1, zeros in words 2 and 3, and the 64-bit seed as the key, is below round(p · 2³²). Every backend
draws the same mask from the same seed.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF


def _mulhilo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of the 64-bit product of 32-bit words held in int64, where the whole would overflow."""
    low = (b & 0xFFFF) * a
    high = (b >> 16) * a + (low >> 16)
    return (high >> 16) & _WORD, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def random_words(count: int, seed: Tensor, device: torch.device) -> Tensor:
    """The first output word for the counters 0 … count-1: int64 [count] with values in [0, 2³²)."""
    counter = torch.arange(count, dtype=torch.int64, device=device)
    key = seed.to(device=device, dtype=torch.int64).reshape(())
    k0, k1 = key & _WORD, (key >> 32) & _WORD
    c0, c1 = counter & _WORD, counter >> 32
    c2 = c3 = torch.zeros_like(counter)
    for _ in range(10):
        high_0, low_0 = _mulhilo(_MULTIPLIER_0, c0)
        high_1, low_1 = _mulhilo(_MULTIPLIER_1, c2)
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0, k1 = (k0 + _WEYL_0) & _WORD, (k1 + _WEYL_1) & _WORD
    return c0


def dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """x with each element dropped with probability p and the rest multiplied by 1/(1-p); [M, K] in x's dtype."""
    keep = random_words(x.numel(), seed, x.device).reshape(x.shape) >= round(p * 2**32)
    return torch.where(keep, x * (1.0 / (1.0 - p) if p < 1 else 0.0), torch.zeros((), dtype=x.dtype, device=x.device))


__all__ = ["dropout", "random_words"]
