"""The CPU sweep against the specification: values, no trace of an overflow step, and bits that never change."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from adalora_kernels.backends import native
from adalora_kernels.reference.importance import TripletLayout, importance_update
from adalora_kernels.testing.tolerances import assert_within_budget

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Case:
    """Parameters of a layout, gradients for some steps, and the state they act on."""

    def __init__(
        self, shapes: tuple[tuple[int, int, int], ...], dtypes: list[torch.dtype], steps: int = 3, seed: int = 0
    ):
        generator = torch.Generator().manual_seed(seed)
        choice = random.Random(seed)
        self.layout = TripletLayout(shapes)
        self.state_dtype = torch.float64 if torch.float64 in dtypes else torch.float32
        sizes = [size for r, k, n in shapes for size in ((r, k), (r, 1), (n, r))]
        self.params = [torch.randn(s, generator=generator).to(choice.choice(dtypes)) for s in sizes]
        self.grads = [
            [torch.randn(p.shape, generator=generator).to(p.dtype) for p in self.params] for _ in range(steps)
        ]

    def fresh(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """state, half, scores."""
        dtype = dtype or self.state_dtype
        return (
            torch.zeros(2, 2, self.layout.total_elements, dtype=dtype),
            torch.zeros(1, dtype=torch.int32),
            torch.zeros(self.layout.total_rank, dtype=dtype),
        )


def run(update, case: Case, params, steps, tensors):  # type: ignore[no-untyped-def]
    for grads in steps:
        finite = update(case.layout, params, grads, *tensors, 0.85, 0.75)
        assert finite.dtype == torch.bool and finite.shape == (1,) and finite.item()
    return tensors


def assert_matches_reference(case: Case) -> None:
    ours = run(native.importance_update, case, case.params, case.grads, case.fresh())
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(6))
def test_random_layouts(dtype: torch.dtype, seed: int) -> None:
    choice = random.Random(seed)
    shapes = tuple(
        (
            choice.choice([0, 1, 3, 8, 12, 16, 33, 64]),
            choice.choice([1, 5, 64, 768, 5000]),
            choice.choice([1, 7, 130, 3001]),
        )
        for _ in range(choice.randint(1, 6))
    )
    case = Case(shapes, [dtype], seed=seed)
    for grads in case.grads:
        for i in range(len(grads)):
            if choice.random() < 0.15:
                grads[i] = None  # type: ignore[call-overload]
    assert_matches_reference(case)


@pytest.mark.parametrize("dtypes", [[torch.float32, torch.bfloat16, torch.float16], DTYPES])
def test_mixed_dtypes(dtypes: list[torch.dtype]) -> None:
    case = Case(((12, 300, 200), (4, 64, 1000), (16, 31, 17)), dtypes)
    for grads in case.grads:
        grads[:] = [g.to(dtypes[i % len(dtypes)]) for i, g in enumerate(grads)]
    assert_matches_reference(case)


def test_rank_beyond_the_period_and_rows_beyond_an_item() -> None:
    assert_matches_reference(Case(((1001, 33, 40), (2, 40000, 9)), [torch.float32], steps=2))


def test_strided_tensors() -> None:
    case = Case(((12, 100, 70), (8, 64, 64)), [torch.float32])
    expected = run(native.importance_update, case, case.params, case.grads, case.fresh())

    def strided(tensor: Tensor) -> Tensor:
        wide = torch.full((tensor.shape[0], 2 * tensor.shape[1]), torch.nan)
        wide[:, ::2] = tensor
        return wide[:, ::2]

    steps = [[strided(g) for g in grads] for grads in case.grads]
    actual = run(native.importance_update, case, [strided(p) for p in case.params], steps, case.fresh())
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_overflow_step_leaves_no_trace(poison: float, dtype: torch.dtype) -> None:
    case = Case(((12, 768, 200), (0, 5, 5), (7, 33, 900)), [dtype], steps=2)
    state, half, scores = run(native.importance_update, case, case.params, case.grads[:1], case.fresh())
    for tensor in (0, 1, 2, 6, 7, 8):
        for place in (0, -1):
            grads = [g.clone() for g in case.grads[1]]
            grads[tensor].view(-1)[place] = poison
            before, current = state[half.item()].clone(), int(half)
            kept = scores.clone()
            finite = native.importance_update(case.layout, case.params, grads, state, half, scores, 0.85, 0.75)
            assert not finite.item() and int(half) == current
            assert torch.equal(state[current], before) and torch.equal(scores, kept)
    resumed = run(native.importance_update, case, case.params, case.grads[1:], (state, half, scores))
    straight = run(native.importance_update, case, case.params, case.grads, case.fresh())
    assert torch.equal(resumed[0][int(half)], straight[0][int(straight[1])]) and torch.equal(scores, straight[2])


def test_bits_do_not_depend_on_threads_or_run(threads: None) -> None:
    case = Case(((12, 768, 768), (12, 768, 3072), (33, 3072, 768)) * 2, [torch.float32])
    results = []
    for count in (1, 2, 2, 3):
        torch.set_num_threads(count)
        results.append(run(native.importance_update, case, case.params, case.grads, case.fresh()))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


FINGERPRINT = """
import sys, torch
from adalora_kernels.backends import native
sys.path.insert(0, sys.argv[1])
from test_native_importance import Case, run
case = Case(((12, 768, 200), (33, 100, 70)), [torch.float32, torch.bfloat16, torch.float16])
state, half, scores = run(native.importance_update, case, case.params, case.grads, case.fresh())
dropped = [native.dropout(torch.ones(37, 41, dtype=d), 0.3, torch.tensor([7])).double().sum().item()
           for d in (torch.float32, torch.bfloat16, torch.float16, torch.float64)]
a, b = torch.ones(3, 40), torch.ones(50, 3)
value, slopes = native.orthogonality([a], [b], 1.0, True)
print(native.instruction_set(), state.double().sum().item().hex(), scores.double().sum().item().hex(), dropped,
      round(value.item(), 1), round(slopes.double().sum().item(), 1))
"""


def test_narrower_instruction_sets_give_the_same_bits() -> None:
    widest = native.instruction_set()
    names = ["baseline", "avx2", "avx512"]
    outputs = []
    for name in names[: names.index(widest) + 1]:
        command = [sys.executable, "-c", FINGERPRINT, os.path.dirname(__file__)]
        environment = {**os.environ, "ADALORA_CPU_ISA": name}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        used, _, rest = done.stdout.partition(" ")
        assert used == name
        outputs.append(rest)
    assert len(set(outputs)) == 1, outputs


def test_empty_model() -> None:
    case = Case(((0, 5, 7),), [torch.float32], steps=1)
    _, half, scores = run(native.importance_update, case, case.params, case.grads, case.fresh())
    assert int(half) == 1 and scores.numel() == 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda a: a["params"].__setitem__(0, torch.randn(100, 12)), ValueError, r"params\[0\].*\[12, 100\]"),
        (lambda a: a["grads"].__setitem__(2, torch.randn(70, 11)), ValueError, r"grads\[2\].*\[70, 12\]"),
        (lambda a: a["grads"].__setitem__(0, torch.zeros(12, 100, dtype=torch.int32)), TypeError, "grads.*int32"),
        (lambda a: a["grads"].__setitem__(0, torch.zeros(12, 100, device="meta")), ValueError, r"grads\[0\].*meta"),
        (lambda a: a["grads"].pop(), ValueError, "grads.*expected 3 tensors, got 2"),
        (lambda a: a.update(state=torch.zeros(2, 2, 5)), ValueError, "state"),
        (lambda a: a.update(state=a["state"].half()), TypeError, "state"),
        (lambda a: a.update(half=torch.zeros(1, dtype=torch.int64)), TypeError, "half"),
        (lambda a: a.update(scores=torch.zeros(12, dtype=torch.float64)), TypeError, "scores"),
        (lambda a: a.update(scores=torch.zeros(13)), ValueError, "scores"),
    ],
)
def test_bad_arguments_change_nothing(change, error, message) -> None:  # type: ignore[no-untyped-def]
    case = Case(((12, 100, 70),), [torch.float32], steps=1)
    state, half, scores = case.fresh()
    arguments = {"params": list(case.params), "grads": case.grads[0], "state": state, "half": half, "scores": scores}
    change(arguments)
    with pytest.raises(error, match=message):
        native.importance_update(case.layout, **arguments, beta1=0.85, beta2=0.85)
    assert not state.any() and not half.any() and not scores.any()
