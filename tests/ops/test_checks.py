"""A layer's layout is checked once, and no other passes in its place."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import pytest
import torch
from torch import Tensor

from adalora_kernels.ops import checks
from adalora_kernels.ops.checks import check_layer

M, K, N, R = 3, 4, 5, 2


def layout_of(*tensors: Tensor | None) -> Hashable:
    """In place of the extension's."""
    return tuple((t.dtype, t.device, t.shape, t.stride()) if isinstance(t, Tensor) else None for t in tensors)


def layer() -> dict[str, Any]:
    shapes = {"x": (M, K), "weight": (N, K), "bias": (N,), "lora_A": (R, K), "lora_E": (R, 1), "lora_B": (N, R)}
    return {name: torch.zeros(shape) for name, shape in shapes.items()} | {"base": None, "mask": None, "dropout_p": 0.1}


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """x of each call whose tensors are looked at."""
    found: list[Tensor] = []
    look = checks._check_tensors

    def noting(*tensors: Any) -> None:
        found.append(tensors[0])
        look(*tensors)

    monkeypatch.setattr(checks, "_check_tensors", noting)
    monkeypatch.setattr(checks, "_layout_of", layout_of)
    monkeypatch.setattr(checks, "_passed", set())
    return found


def test_once_for_each_layout(looked_at: list[Tensor]) -> None:
    for m in (1, 2, 1, 2, 2):
        check_layer(**layer() | {"x": torch.zeros(m, K)})
    assert [len(x) for x in looked_at] == [1, 2]


WRONG: dict[str, Any] = {
    "x": torch.zeros(M, K, dtype=torch.int64), "weight": torch.zeros(N, K + 1), "bias": torch.zeros(N + 1),
    "lora_A": torch.zeros(R, K, device="meta"), "lora_E": torch.zeros(R + 1, 1), "lora_B": 3,
    "mask": torch.zeros(R + 1),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_fails_fails_again(name: str, looked_at: list[Tensor]) -> None:
    """Beside a layout that has passed, and at each call."""
    check_layer(**layer())
    for _ in range(2):
        with pytest.raises((TypeError, ValueError), match=f"^{name}: expected"):
            check_layer(**layer() | {name: WRONG[name]})
    assert len(looked_at) == 3


@pytest.mark.parametrize("dropout_p", [1.5, "0.1", float("nan")])
def test_probabilities_are_always_looked_at(dropout_p: Any, looked_at: list[Tensor]) -> None:
    check_layer(**layer())
    with pytest.raises((TypeError, ValueError), match=r"^dropout_p: expected"):
        check_layer(**layer() | {"dropout_p": dropout_p})


def test_few_are_remembered(looked_at: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_MOST", 3)
    for m in range(9):
        check_layer(**layer() | {"x": torch.zeros(m, K)})
        assert len(checks._passed) <= 3


def test_off_cuda_nothing_is_remembered() -> None:
    assert checks._layout_of(torch.zeros(2)) is None and checks._layout_of(3) is None
