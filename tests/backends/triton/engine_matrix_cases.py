"""Orthogonality and masking on Triton against their specification: run by ``test_kernels.py`` in its own process.

To debug one: ``TRITON_INTERPRET=1 pytest tests/backends/triton/engine_matrix_cases.py -k <case>``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from adalora_kernels.backends import triton as backend
from adalora_kernels.reference import allocation, orthogonality
from adalora_kernels.testing.tolerances import assert_within_budget
from tests.backends.triton.engine_cases import BFLOAT16, FLOAT16, FLOAT32, random_like
from tests.backends.triton.kernel_cases import DEVICE, poisoned

__all__ = ["poisoned"]

SETTINGS = [[3e-3, 0.02, 0.9, 0.999, 1e-8], [1e-2, 0.0, 0.8, 0.98, 1e-6]]
# Layers without rank, rows that end in mid-tile, several pieces of a row of A, several slabs of B.
RAGGED = ((12, 300, 70), (0, 5, 7), (3, 2500, 33), (5, 31, 2100))
EVEN = ((16, 320, 600), (4, 64, 8))  # loaded in fours
ONE = ((1, 70, 50), (1, 3, 9))
WIDE = ((130, 20, 9), (1, 1, 1))  # more triplets than an item of B takes


def factors(ranks: list[int], lengths: list[int], dtypes: tuple[torch.dtype, ...], std: float) -> list[list[Tensor]]:
    """The A [R, K] and the B [N, R]."""
    drawn = [random_like([(r, k) for r, k in zip(ranks, lengths, strict=True)], dtypes, 0)]
    drawn.append(random_like([(n, r) for r, n in zip(ranks, lengths[::-1], strict=True)], dtypes, 1))
    return [[m.mul_(std) for m in matrices] for matrices in drawn]


def regularised(module: Any, lora_A: list[Tensor], lora_B: list[Tensor], squared: bool, add: bool) -> list[Tensor]:
    """Value and gradients; the latter written over NaN, or added to 0.25."""
    value, slopes = module.orthogonality(lora_A, lora_B, 0.1, squared)
    grads = [torch.full_like(m, 0.25 if add else torch.nan) for m in (*lora_A, *lora_B)]
    scale = torch.tensor(0.5, device=DEVICE)
    module.orthogonality_gradients(lora_A, lora_B, slopes, scale, grads, add)
    return [value, *grads]


@pytest.mark.parametrize("squared", [False, True], ids=["mean", "squared"])
@pytest.mark.parametrize(
    ("ranks", "lengths", "dtypes"),
    [
        ([12, 0, 5], [70, 9, 1100], (FLOAT32, BFLOAT16, FLOAT16)),
        ([8, 16], [128, 1040], (FLOAT32,)),
        ([33, 3], [40, 70], (FLOAT32,)),
        ([100, 128], [36, 68], (FLOAT32,)),
    ],
    ids=["ragged mixed", "even", "rank 33", "rank 128"],
)
def test_orthogonality(ranks: list[int], lengths: list[int], dtypes: tuple[torch.dtype, ...], squared: bool) -> None:
    """Matrices in one piece and in several, one or four blocks of the Gram matrix; gradients written and added."""
    matrices = factors(ranks, lengths, dtypes, 0.1)
    wide = [[m.double() for m in some] for some in matrices]
    for add in (False, True):
        ours, same = (regularised(module, *matrices, squared, add) for module in (backend, orthogonality))
        exact = regularised(orthogonality, *wide, squared, add)
        # The same-dtype error of a single number may be nothing by luck, so it is no measure of ours: 16 roundings are.
        torch.testing.assert_close(ours[0].double(), exact[0], rtol=16 * 2**-24, atol=0)
        for i, (got, theirs, truth) in enumerate(zip(ours[1:], same[1:], exact[1:], strict=True)):
            assert_within_budget(f"gradient {i}", got, theirs, truth)


def test_orthonormal_matrices_have_no_slope() -> None:
    lora_A, lora_B = [torch.eye(4, 20, device=DEVICE)], [torch.eye(20, 4, device=DEVICE)]
    value, slopes = backend.orthogonality(lora_A, lora_B, 0.5, False)
    assert value.item() == 0 and not slopes.any()


def test_orthogonality_refuses() -> None:
    a, b = torch.ones(2, 3, device=DEVICE), torch.ones(3, 2, device=DEVICE)
    for lora_A, lora_B, error, message in (
        ([], [], ValueError, "at least one matrix"),
        ([a, a[0]], [b, b], ValueError, r"2-d matrices, got .*\[3\]"),
        ([a.double()], [b], TypeError, r"lora_A, lora_B\[0\].*float64"),
        ([a], [b.to("meta")], ValueError, "on meta"),
        ([torch.ones(129, 3, device=DEVICE)], [b], ValueError, "ranks up to 128, got 129"),
    ):
        with pytest.raises(error, match=message):
            backend.orthogonality(lora_A, lora_B, 0.1, False)
    _, slopes = backend.orthogonality([a], [b], 0.1, False)
    scale = torch.ones((), device=DEVICE)
    with pytest.raises(ValueError, match="grads: expected contiguous"):
        backend.orthogonality_gradients([a], [b], slopes, scale, [a.clone(), a.t()], True)
    with pytest.raises(ValueError, match="slopes: expected 8"):
        backend.orthogonality_gradients([a], [b], slopes[1:], scale, [a.clone(), b.clone()], True)
    with pytest.raises(ValueError, match="scale: expected one element"):
        backend.orthogonality_gradients([a], [b], slopes, slopes, [a.clone(), b.clone()], True)


RANKS = (3, 0, 5, 12, 1)
TOTAL = sum(RANKS)


def singular_values(ranks: tuple[int, ...] = RANKS, strided: bool = False) -> list[Tensor]:
    """[R, 1] in each dtype."""
    wide = random_like([(r, 2) for r in ranks], (FLOAT32, BFLOAT16, FLOAT16), 0)
    return [w[:, :1] if strided else w[:, :1].contiguous() for w in wide]


def assert_same_masks(scores: Tensor, budget: int, live: Tensor, enabled: Tensor | None, ours: list[Tensor]) -> None:
    theirs, live_theirs = [e.clone() for e in ours], live.clone()
    versions = [e._version for e in ours]
    threshold = backend.mask_to_budget(scores, ours, budget, live, enabled)
    expected = allocation.mask_to_budget(scores, theirs, budget, live_theirs, enabled)
    assert threshold.shape == () and torch.equal(threshold, expected) and torch.equal(live, live_theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert all(e._version > before for e, before in zip(ours, versions, strict=True)), "autograd must see the write"


@pytest.mark.parametrize("budget", [0, 1, 10, TOTAL - 1, TOTAL, TOTAL + 5])
@pytest.mark.parametrize("kind", ["distinct", "signed", "ties", "zeros"])
def test_budgets(kind: str, budget: int) -> None:
    """Exactly the specification's threshold, pattern and values; ties at the threshold all die."""
    generator = torch.Generator().manual_seed(1)
    scores = {
        "distinct": torch.rand(TOTAL, generator=generator) * 1e-9,
        "signed": torch.randn(TOTAL, generator=generator) * 1e20,
        "ties": torch.arange(TOTAL).remainder(3).float(),
        "zeros": torch.zeros(TOTAL),
    }[kind].to(DEVICE)
    live = torch.ones(TOTAL, dtype=torch.bool, device=DEVICE)
    assert_same_masks(scores, budget, live, None, singular_values(strided=budget == 10))
    assert live.sum() <= budget and (kind != "distinct" or live.sum() == min(budget, TOTAL))


@pytest.mark.parametrize("enabled", [True, False])
def test_enabled(enabled: bool) -> None:
    live = torch.arange(TOTAL, device=DEVICE) % 3 > 0
    before, ours = live.clone(), singular_values()
    kept = [e.clone() for e in ours]
    assert_same_masks(torch.rand(TOTAL).to(DEVICE), 4, live, torch.tensor([enabled], device=DEVICE), ours)
    if not enabled:
        assert torch.equal(live, before) and all(torch.equal(a, b) for a, b in zip(ours, kept, strict=True))


def test_a_thousand_layers() -> None:
    """More triplets than are read at a time, nearly equal scores: all rounds of the selection decide."""
    ranks = (33,) * 1000
    scores = 1.0 + torch.randperm(33_000, generator=torch.Generator().manual_seed(0)).to(DEVICE).float() * 2**-20
    live = torch.zeros(33_000, dtype=torch.bool, device=DEVICE)
    assert_same_masks(scores, 12_345, live, None, singular_values(ranks))
    assert live.sum() == 12_345


def test_zero_pruned() -> None:
    live = torch.arange(TOTAL, device=DEVICE) % 4 == 1
    ours, theirs = singular_values(strided=True), singular_values(strided=True)
    backend.zero_pruned(live, ours)
    allocation.zero_pruned(live, theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_no_triplets() -> None:
    live = torch.zeros(0, dtype=torch.bool, device=DEVICE)
    assert backend.mask_to_budget(torch.zeros(0, device=DEVICE), [], 0, live).item() == -torch.inf
    backend.zero_pruned(live, [])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"scores": torch.zeros(TOTAL, dtype=torch.float64)}, TypeError, "scores"),
        ({"scores": torch.zeros(TOTAL - 1)}, ValueError, "scores"),
        ({"live": torch.ones(TOTAL)}, TypeError, "live"),
        ({"enabled": torch.ones(2, dtype=torch.bool)}, ValueError, "enabled"),
        ({"lora_E": [torch.ones(TOTAL - 1, 1)]}, ValueError, "lora_E: expected 21 values"),
        ({"lora_E": [torch.ones(1, TOTAL)]}, ValueError, r"lora_E\[0\]"),
        ({"lora_E": [torch.ones(TOTAL, 1, dtype=torch.int32)]}, TypeError, r"lora_E\[0\]"),
        ({"lora_E": [torch.ones(TOTAL, 1, device="meta")]}, ValueError, r"lora_E\[0\].* on meta"),
    ],
)
def test_allocation_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    live = torch.ones(TOTAL, dtype=torch.bool, device=DEVICE)
    ours = singular_values()
    arguments = {"scores": torch.zeros(TOTAL, device=DEVICE), "lora_E": ours, "budget": 3, "live": live, **change}
    for name, value in change.items():
        if isinstance(value, Tensor):
            arguments[name] = value.to(DEVICE)
    with pytest.raises(error, match=message):
        backend.mask_to_budget(**arguments)
    assert live.all() and all(torch.equal(a, b) for a, b in zip(ours, singular_values(), strict=True))
