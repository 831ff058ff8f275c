"""Sizes that follow from ranks and dtypes, the cutting into slabs, and when the backend says that it can't run."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch

from adalora_kernels.backends import triton as backend
from adalora_kernels.backends.triton import tiles
from adalora_kernels.backends.triton.tiles import Width

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("r", "padding", "block"), [(0, 0, 16), (1, 16, 16), (16, 16, 16), (17, 32, 32), (33, 48, 64), (128, 128, 128)]
)
def test_rank_padding_and_block(r: int, padding: int, block: int) -> None:
    assert (tiles.rank_padding(r), tiles.rank_block(r)) == (padding, block)


def test_operand_width() -> None:
    half, single = torch.empty(1, dtype=torch.bfloat16), torch.empty(1)
    assert tiles.operand_width(torch.bfloat16, half, None) is Width.HALF
    assert tiles.operand_width(torch.float16, half, single) is Width.MIXED
    assert tiles.operand_width(torch.float32, half) is Width.SINGLE
    with pytest.raises(TypeError, match=r"compute_dtype: expected float32, float16 or bfloat16, got torch\.float64"):
        tiles.operand_width(torch.float64, single)


@pytest.mark.parametrize("tokens", [0, 1, 64, 65, 640, 8192])
@pytest.mark.parametrize("column_blocks", [1, 3, 1000])
def test_slabs_cover_all_rows_and_none_is_empty(tokens: int, column_blocks: int) -> None:
    count, rows = tiles.slabs(tokens, 64, column_blocks, CPU)
    assert count >= 1 and rows % 64 == 0
    assert count * rows >= tokens
    assert count == 1 or (count - 1) * rows < tokens


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """The module imports and says why it can't run."""
    monkeypatch.setattr(importlib.import_module("adalora_kernels.backends"), "triton", backend)  # put back afterwards
    names = [name for name in sys.modules if name.split(".")[0] == "triton" or name.startswith(backend.__name__)]
    for name in names:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    bare = importlib.import_module(backend.__name__)
    assert bare.unavailable_reason("cuda") == "triton is not installed"
    assert bare.rank_padding(12) == 16
    assert bare is not backend
    with pytest.raises(ImportError, match="triton"):
        importlib.import_module(f"{backend.__name__}.products")


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    knobs = pytest.importorskip("triton").knobs
    monkeypatch.setattr(knobs.runtime, "interpret", False)
    assert "not for cpu" in (backend.unavailable_reason("cpu") or "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backend.unavailable_reason("cuda") == "torch sees no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert backend.unavailable_reason("cuda") == "triton needs compute capability 8.0, this device has 7.5"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert backend.unavailable_reason("cuda") is None
    monkeypatch.setattr(knobs.runtime, "interpret", True)
    assert backend.unavailable_reason("cpu") is None
    assert "meta" in (backend.unavailable_reason("meta") or "")
