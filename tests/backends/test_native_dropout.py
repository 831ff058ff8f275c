"""Dropout on the CPU: the specification's mask and values, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from adalora_kernels.backends import native
from adalora_kernels.reference import philox

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SEEDS = [0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF]
VIEWS = {
    "rows": lambda x: x,
    "transposed": lambda x: x.t(),
    "every other": lambda x: x[::2, 1::3],
    "repeated row": lambda x: x[:1].expand(5, -1),
    "repeated column": lambda x: x[:, :1].expand(-1, 7),
    "no rows": lambda x: x[:0],
    "no columns": lambda x: x[:, :0],
}


def assert_same(x: Tensor, p: float, seed: int) -> None:
    key = torch.tensor([seed])
    ours, expected = native.dropout(x, p, key), philox.dropout(x, p, key)
    assert ours.dtype == x.dtype and ours.is_contiguous() and torch.equal(ours, expected)
    assert ours.numel() == 0 or ours.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("view", VIEWS)
def test_views(dtype: torch.dtype, view: str) -> None:
    x = torch.randn(37, 301, generator=torch.Generator().manual_seed(0)).to(dtype)
    for p in (0.0, 0.1, 0.5, 1.0):
        assert_same(VIEWS[view](x), p, 42)


@pytest.mark.parametrize("seed", SEEDS)
def test_seeds_over_many_threads_items(seed: int) -> None:
    assert_same(torch.randn(300, 257), 0.3, seed)


def test_every_half_survives_unscaled() -> None:
    bits = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(256, 256)
    for dtype in (torch.float16, torch.bfloat16):
        x = bits.view(dtype)
        kept = native.dropout(x, 0.0, torch.tensor([0]))
        assert torch.equal(kept.isnan(), x.isnan()) and torch.equal(kept[~x.isnan()], x[~x.isnan()])


def test_rounding_of_every_half() -> None:
    bits = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(256, 256)
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.where(bits.view(dtype).isnan(), 0, bits.view(dtype))
        assert_same(x, 0.1, 3)


def test_bad_arguments() -> None:
    x, seed = torch.randn(4, 5), torch.tensor([1])
    with pytest.raises(ValueError, match=r"x: .*\[5\]"):
        native.dropout(x[0], 0.1, seed)
    with pytest.raises(ValueError, match=r"p: expected a probability, got 1\.5"):
        native.dropout(x, 1.5, seed)
    with pytest.raises(TypeError, match=r"x: .*int32"):
        native.dropout(x.int(), 0.1, seed)
    with pytest.raises(TypeError, match="seed"):
        native.dropout(x, 0.1, seed.int())
    with pytest.raises(ValueError, match="seed"):
        native.dropout(x, 0.1, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="meta"):
        native.dropout(x.to("meta"), 0.1, seed)
