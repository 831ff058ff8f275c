"""The generator against its published known answers, and the mask it makes."""

from __future__ import annotations

import pytest
import torch

from adalora_kernels.reference import philox

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("seed", "counter", "word"),
    # Random123's kat_vectors for philox4x32, 10 rounds: counter and key of zeros.
    ((0, 0, 0x6627E8D5),),
)
def test_known_answer(seed: int, counter: int, word: int) -> None:
    assert philox.random_words(counter + 1, torch.tensor([seed]), CPU)[counter].item() == word


def test_words_against_plain_integers() -> None:
    """The same rounds with Python's unbounded integers, for counters and keys with all their bits in use."""
    seed = 0x0123456789ABCDEF
    words = philox.random_words(50, torch.tensor([seed]), CPU)
    for counter in range(50):
        c, key = [counter, 0, 0, 0], [seed & 0xFFFFFFFF, seed >> 32]
        for _ in range(10):
            p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [(p1 >> 32) ^ c[1] ^ key[0], p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ key[1], p0 & 0xFFFFFFFF]
            key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
        assert words[counter].item() == c[0]


def test_words_are_uniform() -> None:
    words = philox.random_words(1 << 18, torch.tensor([42]), CPU).double() / 2**32
    assert abs(words.mean().item() - 0.5) < 4 * (1 / 12 / (1 << 18)) ** 0.5
    counts = torch.histc(words, bins=64, min=0, max=1)
    chi_squared = ((counts - (1 << 12)) ** 2 / (1 << 12)).sum().item()
    assert chi_squared < 120  # 63 degrees of freedom: exceeded once in 50,000 seeds
