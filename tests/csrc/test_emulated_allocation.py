"""Masking in CUDA C++, run on the CPU, against the specification, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adalora_kernels.backends import native, native_cuda
from adalora_kernels.reference import allocation
from tests.backends.test_native_allocation import DTYPES, TOTAL, values
from tests.csrc.emulation import Emulation


def assert_same(
    kernels: Any,
    scores: Tensor,
    budget: int | Tensor,
    ours: list[Tensor],
    enabled: Tensor | None = None,
) -> Tensor:
    """Compare everything; the pattern that results."""
    live = torch.arange(len(scores)) % 3 > 0
    theirs, live_theirs = [e.clone() for e in ours], live.clone()
    threshold = kernels.mask_to_budget(scores, ours, budget, live, enabled)
    expected = allocation.mask_to_budget(scores, theirs, budget, live_theirs, enabled)
    assert threshold.shape == () and threshold.dtype == scores.dtype and torch.equal(threshold, expected)
    assert torch.equal(live, live_theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    return live


@pytest.mark.parametrize("score_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("budget", [0, 1, 10, TOTAL - 1, TOTAL, TOTAL + 5])
@pytest.mark.parametrize("on_device", [False, True])
def test_budgets(emulation: Emulation, score_dtype: torch.dtype, budget: int, on_device: bool) -> None:
    emulation.draw_orders(1)
    scores = torch.rand(TOTAL, dtype=score_dtype, generator=torch.Generator().manual_seed(1))
    given = torch.tensor([budget]) if on_device else budget
    live = assert_same(emulation, scores, given, values(DTYPES[budget % 4], strided=True))
    assert live.sum() == min(budget, TOTAL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_many_scores(emulation: Emulation, dtype: torch.dtype) -> None:
    """Of both signs and all sizes, more than threads; some are equal."""
    emulation.draw_orders(2)
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(3000, dtype=dtype, generator=generator) * 10.0 ** torch.randint(-30, 30, (3000,), dtype=dtype)
    scores[::7] = scores[3]
    scores[5], scores[6] = 0.0, -0.0
    for budget in (1, 1300, 1500, 2999):
        assert_same(emulation, scores, budget, [torch.ones(3000, 1)])


def test_ties_all_die(emulation: Emulation) -> None:
    scores = torch.tensor([1.0, 2.0] * (TOTAL // 2) + [3.0])
    assert assert_same(emulation, scores, TOTAL // 2, values(torch.float32)).sum() == 1
    assert not assert_same(emulation, torch.zeros(TOTAL), TOTAL - 1, values(torch.float32)).any()


@pytest.mark.parametrize("enabled", [True, False])
def test_more_layers_than_a_launch_holds(emulation: Emulation, enabled: bool) -> None:
    emulation.draw_orders(3)
    ranks = [1 + i % 3 for i in range(1030)]
    scores = torch.rand(sum(ranks), generator=torch.Generator().manual_seed(2))
    assert_same(emulation, scores, 700, [torch.ones(r, 1) for r in ranks], torch.tensor([enabled]))


def test_ops(emulated_ops: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launchers and the host's code."""
    torch.ops.load_library(str(emulated_ops))
    monkeypatch.setattr(torch.ops, "adalora_native", torch.ops.adalora_emulated)
    monkeypatch.setattr(native, "_ops", lambda device_type: torch.ops.adalora_emulated)
    scores = torch.rand(TOTAL, generator=torch.Generator().manual_seed(1))
    for budget in (4, torch.tensor([5]), torch.tensor([6], dtype=torch.int32)):
        for enabled in (None, torch.tensor([True]), torch.tensor([False])):
            assert_same(native_cuda, scores, budget, values(torch.bfloat16, strided=True), enabled)
    assert_same(native_cuda, scores.double(), 7, values(torch.float64))
    ours, theirs, live = values(torch.float16), values(torch.float16), torch.arange(TOTAL) % 4 == 1
    native.zero_pruned(live, ours)
    allocation.zero_pruned(live, theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    empty = torch.zeros(0, dtype=torch.bool)
    assert native_cuda.mask_to_budget(torch.zeros(0), [], 0, empty, None).item() == -torch.inf
    wrong: list[tuple[str, Any]] = [
        ("scores", (scores[1:], values(torch.float32), 3, live, None)),
        ("scores", (scores.half(), values(torch.float32), 3, live, None)),
        ("lora_E", (scores, values(torch.float32)[1:], 3, live, None)),
        ("lora_E", (scores, [*values(torch.float32), torch.ones(1, 1)], 3, live, None)),
        ("lora_E", (scores, [torch.ones(1, TOTAL)], 3, live, None)),
        ("enabled", (scores, values(torch.float32), 3, live, torch.ones(1))),
        ("budget", (scores, values(torch.float32), torch.ones(1), live, None)),
    ]
    for name, arguments in wrong:
        with pytest.raises(RuntimeError, match=name if name != "scores" else "scores|live"):
            native_cuda.mask_to_budget(*arguments)


def test_bits_do_not_depend_on_the_order_of_execution(emulation: Emulation) -> None:
    scores = torch.rand(1500, generator=torch.Generator().manual_seed(3))
    results = []
    for seed in (0, 4, 5):
        emulation.draw_orders(seed)
        results.append(assert_same(emulation, scores, 333, [torch.ones(1500, 1)]))
    assert all(torch.equal(result, results[0]) for result in results)


FAULTS = {
    "no barrier before counting": ("counts[threadIdx.x] = 0;\n    __syncthreads();", "counts[threadIdx.x] = 0;"),
    "no barrier before the counts are read": (
        "1);\n    }\n    __syncthreads();\n    if (threadIdx.x < 32)",
        "1);\n    }\n    if (threadIdx.x < 32)",
    ),
    "no barrier before the place is read": ("counts, k, &place);\n    __syncthreads();", "counts, k, &place);"),
    "the next one": ("before < k && k <= before + count", "before <= k && k < before + count"),
    "negative scores in the order of positive ones": ("bits & sign ? ~bits : bits | sign", "bits | sign"),
    "what equals the threshold stays": (
        "return !(budget.scores[triplet] > threshold)",
        "return budget.scores[triplet] < threshold",
    ),
    "the second list begins anew": (
        "stream, lists[i], budget.live, budget.enabled",
        "stream, lists[0], budget.live, budget.enabled",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_show(emulation: Emulation, fault: str, tmp_path: Path) -> None:
    faulty = emulation.with_fault(tmp_path, *FAULTS[fault])
    for test in (
        lambda: test_many_scores(faulty, torch.float32),
        lambda: test_ties_all_die(faulty),
        lambda: test_more_layers_than_a_launch_holds(faulty, True),
    ):
        try:
            test()
        except AssertionError:
            return
    pytest.fail("nobody noticed")
