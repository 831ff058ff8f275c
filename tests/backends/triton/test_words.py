"""Tensors as the numbers that launches read: the same by the extension and without it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from adalora_kernels.backends import native_views
from adalora_kernels.backends.triton.engine import tables

CPU = torch.device("cpu")
SIZES = tables.sizes_of([(4, 4), (4, 4)])


@pytest.fixture(params=["extension", "one by one"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who reads the tensors."""
    if request.param == "one by one":
        monkeypatch.setattr(native_views, "words_of", lambda *arguments: None)
    return str(request.param)


@pytest.mark.parametrize("asked", [True, False])
def test_words(way: str, asked: bool) -> None:
    shapes = [(4, 4), (3, 7), (2, 1), (0, 5)]
    dtypes = (torch.bfloat16, torch.float32, torch.float16, torch.float32)
    tensors = [torch.zeros(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    sizes = tables.sizes_of([*shapes, (9, 9)]) if asked else None
    found = tables.words_of("x", [*tensors, None], sizes, CPU, some_missing=True)
    words = [t.data_ptr() | tables.CODES[t.dtype] << tables.ADDRESS_BITS for t in tensors]
    assert found.words == [*words, 0]
    assert len(found.held) == 4 and all(a is b for a, b in zip(found.held, tensors, strict=True))
    assert found.sizes == tables.sizes_of([*shapes, (-1, -1)])
    assert tables.shapes_in(found.sizes) == [*shapes, (-1, -1)]
    assert tables.are_aligned(words[:1]) and not tables.are_aligned([words[0] + 8])


def test_the_extension_reads_them() -> None:
    """Else the case above compares nothing."""
    tensor = torch.zeros(4, 4)
    assert native_views.words_of([tensor, None], tensor, None) is not None
    assert native_views.words_of([tensor, tensor.t()[:3]], tensor, None) is None
    assert native_views.words_of([tensor, tensor], tensor, tables.sizes_of([(4, 4), (4, 5)])) is None


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (torch.zeros(4, 3), ValueError),
        (torch.zeros(16), ValueError),
        (torch.zeros(4, 4, device="meta"), ValueError),
        (torch.zeros(4, 4, dtype=torch.float64), TypeError),
        (torch.zeros(4, 4, dtype=torch.int32), TypeError),
        (torch.zeros(4, 4).to_sparse(), TypeError),
        (None, TypeError),
        (FakeTensorMode().from_tensor(torch.zeros(4, 4)), TypeError),
    ],
)
def test_what_has_no_word(way: str, bad: Tensor | None, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"x\[1\]: expected .*, got"):
        tables.words_of("x", [torch.zeros(4, 4), bad], SIZES, CPU)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_another_number_of_tensors(way: str, count: int) -> None:
    with pytest.raises(ValueError, match=f"x: expected 2 tensors, got {count}"):
        tables.words_of("x", [torch.zeros(4, 4)] * count, SIZES, CPU)


def test_copies_and_flat_tensors(way: str) -> None:
    strided = torch.randn(4, 8)[:, ::2]
    found = tables.words_of("x", [torch.zeros(4, 4), strided], SIZES, CPU)
    assert found.held[1].is_contiguous() and torch.equal(found.held[1], strided)
    assert found.words[1] & (1 << tables.ADDRESS_BITS) - 1 == found.held[1].data_ptr()
    assert tables.words_of("x", [torch.zeros(2, 3, 4)], None, CPU).sizes == tables.sizes_of([(1, 24)])
