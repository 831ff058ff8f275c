"""The CUDA sweep, run on the CPU, against the specification: values, order of execution, and faults that show."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from adalora_kernels.reference.importance import importance_update
from adalora_kernels.testing.tolerances import assert_within_budget
from tests.backends.test_native_importance import DTYPES, Case, run
from tests.csrc.emulation import Emulation

# Every kind of item: a row of A in several pieces, a slab of B that isn't the last, more triplets than threads.
LAYOUTS = {
    "ranks": ((0, 5, 7), (1, 1, 1), (8, 64, 33), (12, 100, 70), (33, 31, 17), (64, 40, 9)),
    "ragged": ((12, 2049, 1400), (3, 4097, 5462), (8, 2048, 2048), (1, 1, 16385)),
    "more triplets than threads": ((300, 33, 120), (257, 9, 1)),
}


def assert_matches_reference(emulation: Emulation, case: Case) -> None:
    ours = run(emulation.importance_update, case, case.params, case.grads, poisoned(case))
    same = run(importance_update, case, case.params, case.grads, case.fresh())
    steps = [[None if g is None else g.double() for g in grads] for grads in case.grads]
    exact = run(importance_update, case, [p.double() for p in case.params], steps, case.fresh(torch.float64))
    assert torch.equal(ours[1], same[1])
    current = int(ours[1])
    if case.state_dtype == torch.float64:
        torch.testing.assert_close(ours[0][current], exact[0][current], rtol=1e-13, atol=1e-15)
        torch.testing.assert_close(ours[2], exact[2], rtol=1e-12, atol=0)
        return
    assert_within_budget("averages", ours[0][current], same[0][current], exact[0][current])
    assert_within_budget("scores", ours[2], same[2], exact[2])


def poisoned(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The state at the start, NaN wherever something must be written before it is read."""
    state, half, scores = case.fresh()
    state[1] = torch.nan
    return state, half, scores.fill_(torch.nan)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_matches_the_specification(emulation: Emulation, layout: str, dtype: torch.dtype) -> None:
    emulation.draw_orders(1)
    assert_matches_reference(emulation, Case(LAYOUTS[layout], [dtype], steps=2))


@pytest.mark.parametrize("dtypes", [DTYPES[:3], DTYPES])
def test_mixed_dtypes_and_missing_gradients(emulation: Emulation, dtypes: list[torch.dtype]) -> None:
    emulation.draw_orders(2)
    case, choice = Case(((12, 300, 200), (4, 64, 1000), (0, 3, 3), (16, 31, 17)), dtypes), random.Random(0)
    for grads in case.grads:
        grads[:] = [g.to(dtypes[i % len(dtypes)]) for i, g in enumerate(grads)]
        for i in choice.sample(range(len(grads)), 4):
            grads[i] = None  # type: ignore[call-overload]
    assert_matches_reference(emulation, case)


def test_more_layers_than_a_launch_holds(emulation: Emulation) -> None:
    emulation.draw_orders(3)
    many = [(1 + i % 3, 1 + i % 7, 1 + i % 5) for i in range(480)]
    case = Case(((2, 3, 5), (0, 2, 2), *many), [torch.float32], steps=1)
    assert_matches_reference(emulation, case)
    assert emulation.launches == 3


def test_empty_model(emulation: Emulation) -> None:
    case = Case(((0, 5, 7),), [torch.float32], steps=1)
    _, half, _ = run(emulation.importance_update, case, case.params, case.grads, case.fresh())
    assert int(half) == 1


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 3e38])
def test_overflow_step_leaves_no_trace(emulation: Emulation, poison: float) -> None:
    emulation.draw_orders(4)
    case = Case(((12, 2100, 200), (0, 5, 5), (7, 33, 2500)), [torch.float32], steps=2)
    state, half, scores = run(emulation.importance_update, case, case.params, case.grads[:1], case.fresh())
    for tensor in (0, 1, 2, 6, 7, 8):
        for place in (0, -1):
            grads = [g.clone() for g in case.grads[1]]
            grads[tensor].view(-1)[place] = poison
            before, current, kept = state[half.item()].clone(), int(half), scores.clone()
            taken = emulation.importance_update(case.layout, case.params, grads, state, half, scores, 0.85, 0.75)
            assert not taken.item() and int(half) == current
            assert torch.equal(state[current], before) and torch.equal(scores, kept)
    resumed = run(emulation.importance_update, case, case.params, case.grads[1:], (state, half, scores))
    straight = run(emulation.importance_update, case, case.params, case.grads, case.fresh())
    assert torch.equal(resumed[0][int(half)], straight[0][int(straight[1])]) and torch.equal(scores, straight[2])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bits_do_not_depend_on_the_order_of_execution(emulation: Emulation, layout: str) -> None:
    case = Case(LAYOUTS[layout], [torch.float32], steps=1)
    results = []
    for seed in (0, 0, 5, 6):
        emulation.draw_orders(seed)
        results.append(run(emulation.importance_update, case, case.params, case.grads, case.fresh()))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


FAULTS = {
    "no barrier before the columns are read": ("    __syncthreads();\n    if (group == 0) {", "    if (group == 0) {"),
    "a piece ends early": ("begin + kPieceElements)", "begin + kPieceElements - 1)"),
    "a slab begins early": ("begin = item * slab_rows(layer),", "begin = max(0, item * slab_rows(layer) - 1),"),
    "half of the lanes are left out": ("offset = 16; offset > 0", "offset = 8; offset > 0"),
    "not all threads are asked": ("all = __syncthreads_and(finite)", "all = finite"),
    "a barrier that not all come to": (
        "  if (lane == 0) update",
        "  if (lane == 0) __syncthreads();\n  if (lane == 0) update",
    ),
    "a shuffle that not all come to": ("  for (int offset = 16;", "  if (lane < 31) for (int offset = 16;"),
    "the second launch starts over": ("    first += layers.blocks;\n", ""),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_show(emulation: Emulation, fault: str, tmp_path: Path) -> None:
    faulty = emulation.with_fault(tmp_path, *FAULTS[fault])
    for test in (
        lambda: test_matches_the_specification(faulty, "ragged", torch.float32),
        lambda: test_matches_the_specification(faulty, "more triplets than threads", torch.float32),
        lambda: test_overflow_step_leaves_no_trace(faulty, float("nan")),
        lambda: test_more_layers_than_a_launch_holds(faulty),
    ):
        try:
            test()
        except AssertionError:
            return
    pytest.fail("nobody noticed")
