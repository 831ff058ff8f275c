"""What the extension reads off tensors: their views, and which tensors have none."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from adalora_kernels.backends import native
from adalora_kernels.backends.native_views import Layout, views_of, views_or_copies, words_of
from adalora_kernels.reference.importance import TripletLayout

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NONE = [0, 0, -1, -1, 0]
PLACE = torch.empty(0)


def rows(tensors: list[Tensor | None], layout: Layout = Layout.CONTIGUOUS_MATRICES) -> list[list[int]]:
    found: list[list[int]] = views_of("tensors", tensors, PLACE, layout).tolist()
    return found


def test_views() -> None:
    whole = [torch.zeros(3, 5, dtype=dtype) for dtype in DTYPES]
    parameter, part = torch.nn.Parameter(torch.zeros(4, 2)), torch.zeros(9, 2)[4:]
    expected = [[t.data_ptr(), code, 3, 5, 5] for code, t in enumerate(whole)]
    expected += [NONE, [parameter.data_ptr(), 0, 4, 2, 2], [part.data_ptr(), 0, 5, 2, 2], [0, 0, 0, 7, 7]]
    assert rows([*whole, None, parameter, part, torch.zeros(0, 7)]) == expected
    assert rows([]) == []


def test_rows_of_a_wider_matrix() -> None:
    wide = torch.zeros(6, 8)
    column, block = wide[:, 3:4], wide[1:5, 2:4]
    expected = [[column.data_ptr(), 0, 6, 1, 8], [block.data_ptr(), 0, 4, 2, 8]]
    assert rows([column, block], Layout.CONTIGUOUS_ROWS) == expected
    for matrix in (column, block):
        with pytest.raises(RuntimeError, match=r"tensors\[1\]"):
            rows([wide, matrix])


def test_any_shape_is_one_row() -> None:
    number, cube = torch.tensor(1.0), torch.zeros(2, 3, 4)
    assert rows([number, cube], Layout.CONTIGUOUS) == [[number.data_ptr(), 0, 1, 1, 1], [cube.data_ptr(), 0, 1, 24, 24]]
    with pytest.raises(RuntimeError, match=r"tensors\[0\]"):
        rows([cube.transpose(0, 1)], Layout.CONTIGUOUS)


@pytest.mark.parametrize(
    "unreadable",
    [
        torch.zeros(4, dtype=torch.float32),
        torch.zeros(2, 2, 2),
        torch.zeros(3, 4).t(),
        torch.zeros(3, 4, dtype=torch.int32),
        torch.zeros(3, 4, dtype=torch.bool),
        torch.zeros(3, 4, dtype=torch.complex64),
        torch.zeros(3, 4, device="meta"),
        torch.zeros(3, 4).to_sparse(),
        1.0,
    ],
)
@pytest.mark.parametrize("layout", [Layout.CONTIGUOUS_ROWS, Layout.CONTIGUOUS_MATRICES])
def test_what_has_no_view(unreadable: Tensor, layout: Layout) -> None:
    with pytest.raises(RuntimeError):
        rows([torch.zeros(2, 2), unreadable], layout)


class Wrapper(Tensor):
    """Around a tensor, as DTensor is: a shape, a dtype and a device, but no memory."""

    @staticmethod
    def __new__(cls, tensor: Tensor) -> Wrapper:
        made: Wrapper = Tensor._make_wrapper_subclass(cls, tensor.shape, dtype=tensor.dtype, device=tensor.device)
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(func)


def test_what_lies_nowhere() -> None:
    wrapper, nothing = Wrapper(torch.zeros(3, 4)), Wrapper(torch.zeros(0, 4))
    for layout in Layout:
        with pytest.raises(RuntimeError, match=r"tensors\[0\]: expected .*, got Wrapper"):
            rows([wrapper], layout)
    assert words_of([wrapper], PLACE, None) is None
    assert rows([nothing]) == [[0, 0, 0, 4, 4]]
    with pytest.raises(RuntimeError, match=r"tensors\[0\]: expected .*, got FakeTensor"):
        rows([FakeTensorMode().from_tensor(torch.zeros(3, 4))])


def test_a_table_that_lies_nowhere() -> None:
    from adalora_kernels import _C

    for table in (Wrapper(torch.zeros(1, 5, dtype=torch.int64)), torch.zeros(1, 5, dtype=torch.int64, device="meta")):
        with pytest.raises((ValueError, RuntimeError), match=r"table: expected int64|meta"):
            _C.read([PLACE[None]], PLACE, table, 1)
    _C.read([], PLACE, Wrapper(torch.zeros(0, 5, dtype=torch.int64)), 1)


def test_refused_in_words_before_anything_changes() -> None:
    layout, state, half = TripletLayout(((2, 3, 4),)), torch.zeros(4 * 16), torch.zeros(1, dtype=torch.int32)
    params = [torch.ones(2, 3), torch.ones(2, 1), torch.ones(4, 2)]
    grads = [params[0], FakeTensorMode().from_tensor(params[1]), params[2]]
    with pytest.raises(TypeError, match=r"grads\[1\]: expected a dense tensor with memory of its own, got FakeTensor"):
        native.importance_update(layout, params, grads, state, half, torch.zeros(2), 0.9, 0.9)
    assert not state.any() and half == 0


def test_default_device() -> None:
    """Tables lie on the CPU whatever ``torch.set_default_device`` says."""
    ones, live = torch.ones(1, 1), torch.ones(1, dtype=torch.bool)
    state, half, scores = torch.zeros(12), torch.zeros(1, dtype=torch.int32), torch.zeros(1)
    with torch.device("meta"):
        assert rows([PLACE[None]]) == [[0, 0, 1, 0, 0]]
        assert native.total_norm([torch.full((3, 4), 2.0, device="cpu")]).item() == pytest.approx(48**0.5)
        assert native.importance_update(
            TripletLayout(((1, 1, 1),)), [ones] * 3, [ones] * 3, state, half, scores, 0.5, 0.5
        ).item()
        native.mask_to_budget(scores, [ones], 0, live)
    assert scores.item() > 0 and not live.any() and not ones.any()


def test_copies_where_needed() -> None:
    across = torch.randn(4, 3).t()
    tensors = [torch.randn(3, 4), across, None]
    table, held = views_or_copies("tensors", tensors, PLACE)
    assert [row[1:] for row in table.tolist()] == [[0, 3, 4, 4], [0, 3, 4, 4], [0, -1, -1, 0]]
    assert isinstance(held[1], Tensor) and table[1, 0] == held[1].data_ptr() and torch.equal(held[1], across)
    assert views_or_copies("tensors", tensors[:1], PLACE)[1][0] is tensors[0]


def test_nothing_is_owned() -> None:
    tensor = torch.zeros(3, 4)
    before = sys.getrefcount(tensor), sys.getrefcount(None)
    for _ in range(1000):
        views_of("tensors", [tensor, None], PLACE)
        words_of([tensor, None], PLACE, None)
    assert sys.getrefcount(tensor) == before[0] and sys.getrefcount(None) - before[1] < 500


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ([PLACE], PLACE, torch.zeros(1, 5, dtype=torch.int64)),
        (5, PLACE, torch.zeros(1, 5, dtype=torch.int64), 1),
        ([PLACE], 3, torch.zeros(1, 5, dtype=torch.int64), 1),
        ([PLACE], PLACE, torch.zeros(2, 5, dtype=torch.int64), 1),
        ([PLACE], PLACE, torch.zeros(1, 4, dtype=torch.int64), 1),
        ([PLACE], PLACE, torch.zeros(1, 5), 1),
        ([PLACE], PLACE, torch.zeros(5, 1, dtype=torch.int64).t(), "1"),
        ([PLACE], PLACE, None, 1),
    ],
)
def test_wrong_calls_raise(arguments: tuple[object, ...]) -> None:
    from adalora_kernels import _C

    with pytest.raises((TypeError, ValueError, AttributeError, RuntimeError)):
        _C.read(*arguments)


@pytest.mark.parametrize(
    "arguments", [(), ([PLACE], PLACE, b"12"), ([PLACE], PLACE, 1), (5, PLACE, None), ([1], 2, None)]
)
def test_wrong_calls_for_words_raise(arguments: tuple[object, ...]) -> None:
    from adalora_kernels import _C

    with pytest.raises((TypeError, ValueError, AttributeError, RuntimeError)):
        _C.words(*arguments)
