"""Masking on the CPU against the specification, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from adalora_kernels.backends import native
from adalora_kernels.reference import allocation

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
RANKS = (3, 0, 5, 12, 1)
TOTAL = sum(RANKS)


def values(dtype: torch.dtype, strided: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    wide = [torch.randn(r, 2, generator=generator).to(dtype) for r in RANKS]
    return [w[:, :1] if strided else w[:, :1].contiguous() for w in wide]


def assert_same(scores: Tensor, budget: int, live: Tensor, enabled: Tensor | None, ours: list[Tensor]) -> None:
    theirs, live_theirs = [e.clone() for e in ours], live.clone()
    versions = [e._version for e in ours]
    threshold = native.mask_to_budget(scores, ours, budget, live, enabled)
    expected = allocation.mask_to_budget(scores, theirs, budget, live_theirs, enabled)
    assert threshold.shape == () and threshold.dtype == scores.dtype and torch.equal(threshold, expected)
    assert torch.equal(live, live_theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert all(e._version > before for e, before in zip(ours, versions, strict=True)), "autograd must see the write"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("score_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("budget", [0, 1, 10, TOTAL - 1, TOTAL, TOTAL + 5])
def test_budgets(dtype: torch.dtype, score_dtype: torch.dtype, budget: int) -> None:
    scores = torch.rand(TOTAL, dtype=score_dtype, generator=torch.Generator().manual_seed(1))
    live = torch.ones(TOTAL, dtype=torch.bool)
    ours = values(dtype)
    assert_same(scores, budget, live, None, ours)
    assert live.sum() == min(budget, TOTAL)


def test_ties_all_die() -> None:
    scores = torch.tensor([1.0, 2.0] * (TOTAL // 2) + [3.0])
    live = torch.zeros(TOTAL, dtype=torch.bool)
    assert_same(scores, TOTAL // 2, live, None, values(torch.float32))
    assert live.sum() == 1


def test_zero_scores_die_together() -> None:
    live = torch.ones(TOTAL, dtype=torch.bool)
    assert_same(torch.zeros(TOTAL), TOTAL - 1, live, None, values(torch.float32))
    assert not live.any()


@pytest.mark.parametrize("enabled", [True, False])
def test_enabled(enabled: bool) -> None:
    live = torch.arange(TOTAL) % 3 > 0
    before = live.clone()
    ours = values(torch.float32)
    kept = [e.clone() for e in ours]
    assert_same(torch.rand(TOTAL), 4, live, torch.tensor([enabled]), ours)
    if not enabled:
        assert torch.equal(live, before) and all(torch.equal(a, b) for a, b in zip(ours, kept, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_values_and_parameters(dtype: torch.dtype) -> None:
    ours = [torch.nn.Parameter(e) for e in values(dtype, strided=True)]
    with torch.no_grad():
        assert_same(torch.rand(TOTAL), 7, torch.ones(TOTAL, dtype=torch.bool), None, ours)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_pruned(dtype: torch.dtype) -> None:
    live = torch.arange(TOTAL) % 4 == 1
    ours = values(dtype)
    theirs = [e.clone() for e in ours]
    native.zero_pruned(live, ours)
    allocation.zero_pruned(live, theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_no_layers() -> None:
    empty = torch.zeros(0, dtype=torch.bool)
    assert native.mask_to_budget(torch.zeros(0), [], 0, empty).item() == -torch.inf


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"budget": -1}, ValueError, "budget.*-1"),
        ({"scores": torch.zeros(TOTAL, dtype=torch.int32)}, TypeError, "scores"),
        ({"scores": torch.zeros(TOTAL, 1)}, TypeError, "scores"),
        ({"live": torch.ones(TOTAL)}, TypeError, "live"),
        ({"live": torch.ones(TOTAL - 1, dtype=torch.bool)}, ValueError, "live"),
        ({"enabled": torch.ones(2, dtype=torch.bool)}, ValueError, "enabled"),
        ({"lora_E": [torch.ones(TOTAL - 1, 1)]}, ValueError, "lora_E"),
        ({"lora_E": [torch.ones(1, TOTAL)]}, ValueError, r"lora_E\[0\]"),
        ({"lora_E": [torch.ones(TOTAL, 1, dtype=torch.int32)]}, TypeError, "lora_E"),
        ({"lora_E": [torch.ones(TOTAL, 1, device="meta")]}, ValueError, r"lora_E\[0\].*meta"),
    ],
)
def test_bad_arguments_change_nothing(change, error, message) -> None:  # type: ignore[no-untyped-def]
    ours, live = values(torch.float32), torch.ones(TOTAL, dtype=torch.bool)
    arguments = {"scores": torch.zeros(TOTAL), "lora_E": ours, "budget": 3, "live": live, "enabled": None, **change}
    with pytest.raises(error, match=message):
        native.mask_to_budget(**arguments)
    assert live.all() and all(torch.equal(a, b) for a, b in zip(ours, values(torch.float32), strict=True))
