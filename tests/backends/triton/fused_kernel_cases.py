"""Importance in the last stage of a backward, and the launch that takes it over: run by ``test_kernels.py``.

To debug one: ``TRITON_INTERPRET=1 pytest tests/backends/triton/fused_kernel_cases.py -k <case>``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from adalora_kernels.backends import triton as backend
from adalora_kernels.backends.triton import rank_padding
from adalora_kernels.backends.triton.backward import blas, one_gemm, slab_sums, split
from adalora_kernels.reference import importance, orthogonality
from adalora_kernels.reference.handover import (
    POSITIONS,
    Handover,
    LayerImportance,
    new_handover,
    probes_of,
    slots_of,
    sum_offsets,
)
from adalora_kernels.reference.importance import OrthogonalityShare, TripletLayout
from adalora_kernels.reference.svd_linear import Adapter
from adalora_kernels.testing.tolerances import assert_within_budget
from tests.backends.triton.backward_plan_cases import INTERPRETED, one_tile, run
from tests.backends.triton.kernel_cases import DEVICE, make_case, poisoned

__all__ = ["one_tile", "poisoned"]  # apply to every case here, too

FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16
BETAS = (0.85, 0.75)
ALL = (True,) * 4
BESIDE = (2, 5, 3)  # a layer before the one under test


class State:
    """The averages of some layers with what their backwards leave; what is to be written holds NaN."""

    def __init__(self, shapes: tuple[tuple[int, int, int], ...], half: int = 1) -> None:
        self.layout = TripletLayout(shapes)
        generator = torch.Generator().manual_seed(5)
        self.averages = torch.rand(2, 2, self.layout.total_elements, generator=generator).to(DEVICE)
        self.averages[1 - half] = torch.nan
        self.half = torch.tensor([half], dtype=torch.int32, device=DEVICE)
        self.scores = torch.full((self.layout.total_rank,), -1.0, device=DEVICE)
        self.left = new_handover(self.layout, self.averages.device)
        self.left.sums.fill_(torch.nan)
        self.left.probes.fill_(torch.nan)

    def layer(self, i: int, before: Any = (None,) * 3, term: OrthogonalityShare | None = None) -> LayerImportance:
        """What the last stage of layer i gets."""
        at, slots = sum_offsets(self.layout), slots_of(self.layout)[i]
        sums = self.left.sums[at[i] : at[i + 1]].view(slots, -1)
        probes = self.left.probes[3 * i : 3 * i + 3]
        first = self.layout.offsets[3 * i]
        return LayerImportance(self.averages, self.half, first, before, term, sums, probes, *BETAS)

    def taken_over(self, params: list[Tensor], grads: list[Any], known: list[bool]) -> bool:
        """The launch before the step."""
        state = self.layout, params, grads, self.averages, self.half, self.scores, *BETAS
        return bool(backend.importance_update(*state, (self.left, known)).item())

    def twin(self) -> State:
        """The same before anything was taken, for the launch alone."""
        other = State(self.layout.shapes)
        other.averages.copy_(self.averages)
        return other

    def launched(self, params: list[Tensor], grads: list[Any]) -> bool:
        """Without a handover."""
        state = self.layout, params, grads, self.averages, self.half, self.scores, *BETAS
        return bool(backend.importance_update(*state).item())


def assert_as_launched(ours: State, theirs: State) -> None:
    """The same averages, to the bit where nothing is compiled, and scores to rounding."""
    assert torch.equal(ours.half, theirs.half)
    now, then = (s.averages[int(s.half)] for s in (ours, theirs))
    torch.testing.assert_close(now, then, rtol=0 if INTERPRETED else 1e-6, atol=0)
    torch.testing.assert_close(ours.scores, theirs.scores, rtol=1e-5, atol=0)


def check_left(state: State, i: int, params: list[Tensor], totals: list[Tensor]) -> None:
    """Averages, sums and probes of layer i, from what its gradients came to; nothing else has changed."""
    layout = state.layout
    (r, k, n), (first, last) = layout.shapes[i], (layout.offsets[3 * i], layout.offsets[3 * i + 3])
    old = state.averages[int(state.half)]
    ours = state.averages[1 - int(state.half)]
    outside = torch.ones(layout.total_elements, dtype=torch.bool, device=DEVICE)
    outside[first:last] = False
    assert ours[:, outside].isnan().all() and not ours[:, ~outside].isnan().any()
    expected = []
    for dtype in (FLOAT32, torch.float64):
        pair = old[None].expand(2, -1, -1)[:, :, first:last].to(dtype).clone()
        own = TripletLayout(((r, k, n),))
        half, scores = torch.zeros(1, dtype=torch.int32, device=DEVICE), torch.zeros(r, dtype=dtype, device=DEVICE)
        wide = [[t.to(dtype) for t in some] for some in (params, totals)]
        importance.importance_update(own, wide[0], wide[1], pair, half, scores, *BETAS)
        expected.append(pair[1])
    assert_within_budget("averages", ours[:, first:last], *expected)
    s = ours[:, first:last].double().prod(0)
    a, e, b = s[: r * k].view(r, k).t(), s[r * k : r * k + r].view(1, r), s[r * (k + 1) :].view(n, r)
    sums = torch.cat([torch.stack([piece.sum(0) for piece in part.split(POSITIONS)]) for part in (a, e, b)])
    torch.testing.assert_close(state.layer(i).sums.double(), sums, rtol=1e-5, atol=0)
    torch.testing.assert_close(state.layer(i).probes, probes_of(totals), rtol=0, atol=0, equal_nan=True)


def adapted(case: Any, dtype: torch.dtype) -> list[Tensor]:
    """A, E and B of a case in ``dtype``."""
    case.inputs = replace(case.inputs, **{f"lora_{p}": getattr(case.inputs, f"lora_{p}").to(dtype) for p in "AEB"})
    return [case.inputs.lora_A, case.inputs.lora_E, case.inputs.lora_B]


def earlier(params: list[Tensor]) -> list[Tensor]:
    """Gradients that are there already."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(p.shape, generator=generator).to(DEVICE, p.dtype) for p in params]


@pytest.mark.parametrize(
    ("plan", "r", "dtype", "accumulating"),
    [
        pytest.param(one_gemm, 12, FLOAT32, False, id="one_gemm-r12"),
        pytest.param(one_gemm, 33, BFLOAT16, True, id="one_gemm-r33-bf16-accumulating"),
        pytest.param(split, 1, FLOAT32, True, id="split-r1-accumulating"),
        pytest.param(split, 128, FLOAT32, False, id="split-r128"),
        pytest.param(blas, 12, FLOAT16, True, id="blas-r12-fp16-accumulating"),
    ],
)
def test_last_stage(plan: ModuleType, r: int, dtype: torch.dtype, accumulating: bool) -> None:
    """Mask and dropout. The gradients are those without importance."""
    case = make_case(r, BFLOAT16, full=True, m=40, k=70, n=60)
    params = adapted(case, dtype)
    state = State((BESIDE, (r, 70, 60)))
    before = earlier(params) if accumulating else [None] * 3
    update = state.layer(1, before)
    gradients = run(case, module_with(plan, update))
    assert update.done
    for ours, plain in zip(gradients, run(case, plan), strict=True):
        assert ours is not None and plain is not None
        torch.testing.assert_close(ours, plain, rtol=0 if INTERPRETED else 1e-6, atol=0)
    totals = [g if b is None else b + g for g, b in zip(gradients[1:], before, strict=True)]
    check_left(state, 1, params, totals)


class module_with:
    """A plan with importance."""

    def __init__(self, plan: ModuleType, update: LayerImportance) -> None:
        self.plan, self.update = plan, update

    def backward(self, *args: Any) -> Any:
        return self.plan.backward(*args, self.update)


@pytest.mark.parametrize(("r", "dtype"), [(1, FLOAT32), (12, FLOAT32), (33, BFLOAT16), (128, FLOAT32)], ids=str)
def test_with_the_orthogonality_term(r: int, dtype: torch.dtype) -> None:
    """Its share is in the gradients that autograd gets, as the launch at the backward's end would add it."""
    case = make_case(r, FLOAT32, full=True, m=40, k=70, n=60)
    params = adapted(case, dtype)
    scale = torch.tensor(0.7, device=DEVICE)
    _, slopes = orthogonality.orthogonality(params[:1], params[2:], 0.3, True)
    slopes = torch.cat([torch.full((7,), torch.nan, device=DEVICE), slopes])
    state = State((BESIDE, (r, 70, 60)))
    gradients = run(case, module_with(split, state.layer(1, term=OrthogonalityShare(slopes, 7, 7 + r * r, scale))))
    expected = [g.clone() for g in run(case, split)[1:] if g is not None]
    backend.orthogonality_gradients(params[:1], params[2:], slopes[7:].clone(), scale, expected[::2], True)
    ours = [g for g in gradients[1:] if g is not None]
    for name, got, want in zip("AEB", ours, expected, strict=True):
        torch.testing.assert_close(got, want, msg=lambda text, name=name: f"d{name}: {text}")
    assert not torch.equal(ours[0], run(case, split)[1])
    check_left(state, 1, params, ours)


SHAPES = ((3, 2100, 33), (0, 5, 7), (5, 31, 1100))  # several items of A, none, several of B


class Finished:
    """Layers whose last stages have run on random shares, and what autograd would hand the optimizer."""

    def __init__(self, shapes: tuple[tuple[int, int, int], ...] = SHAPES, poison: tuple[int, float] | None = None):
        generator = torch.Generator().manual_seed(1)
        self.state = State(shapes)
        self.params: list[Tensor] = []
        self.grads: list[Any] = []
        self.known: list[bool] = []
        for i, (r, k, n) in enumerate(shapes):
            drawn = [torch.randn(s, generator=generator).to(DEVICE) for s in ((r, k), (r, 1), (n, r))]
            self.params += drawn
            if r == 0:
                self.grads += [torch.zeros_like(p) for p in drawn]
                self.known += [False] * 3
                continue
            t, da = (torch.zeros(2, size, rank_padding(r), device=DEVICE) for size in (n, k))
            for shares in (t, da):
                shares[:, :, :r] = torch.randn(2, shares.shape[1], r, generator=generator).to(DEVICE)
            if poison is not None and poison[0] // 3 == i:
                (da if poison[0] % 3 == 0 else t)[-1, -1, r - 1] = poison[1]
            adapter = Adapter(drawn[0], drawn[1], drawn[2], None, None, 1.0, 0.0, FLOAT32)
            self.grads += slab_sums.finish(t, da, adapter, ALL, self.state.layer(i))
            self.known += [True] * 3

    @property
    def redone(self) -> list[int]:
        """Parameters of which the launch found other gradients than those that the host knew of."""
        return self.state.left.redone.nonzero().flatten().tolist()


@pytest.fixture(scope="module")
def finished() -> Iterator[Finished]:
    yield Finished()


def copied(finished: Finished) -> Finished:
    """A copy whose gradients may be written to."""
    twin = object.__new__(Finished)
    twin.params, twin.known = finished.params, list(finished.known)
    twin.grads = [g.clone() for g in finished.grads]
    twin.state = State(finished.state.layout.shapes)
    for mine, theirs in zip(
        (*twin.state.left, twin.state.averages), (*finished.state.left, finished.state.averages), strict=True
    ):
        mine.copy_(theirs)
    return twin


def test_taken_over(finished: Finished) -> None:
    """Nothing is done over: with θ gone, the averages are those of the last stages."""
    ours, launched = copied(finished), State(SHAPES)
    assert launched.launched(ours.params, ours.grads)
    ours.params = [torch.full_like(p, torch.nan) for p in ours.params]
    assert ours.state.taken_over(ours.params, ours.grads, ours.known) and ours.redone == []
    assert_as_launched(ours.state, launched)


def unknown(f: Finished) -> list[int]:
    f.grads[0] *= 0.5
    f.grads[8] *= 2.0
    f.known[0] = f.known[8] = False
    return []


def scaled_unseen(f: Finished) -> list[int]:
    for g in f.grads:
        g *= 0.5
    return [0, 1, 2, 6, 7, 8]


def one_parameter_unseen(f: Finished) -> list[int]:
    f.grads[6] += 1.0
    return [6]


def missing(f: Finished) -> list[int]:
    f.grads[1] = f.grads[6] = None
    f.known[1] = f.known[6] = False
    return []


@pytest.mark.parametrize("change", [unknown, scaled_unseen, one_parameter_unseen, missing])
def test_done_over(finished: Finished, change: Any) -> None:
    """What was written to is taken as it is now, parameter by parameter: the host knows of it, or a probe differs."""
    ours = copied(finished)
    redone = change(ours)
    launched = State(SHAPES)
    assert launched.launched(ours.params, ours.grads)
    assert ours.state.taken_over(ours.params, ours.grads, ours.known)
    assert ours.redone == redone
    assert_as_launched(ours.state, launched)


@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_overflow_leaves_no_trace(poison: float, part: int) -> None:
    """Found in the backward of either layer; 1e30 is finite, but its importance is not. The next step is as ever."""
    shapes = ((5, 33, 20), (3, 40, 9))
    f = Finished(shapes, (3 + part, poison))
    if part == 1:  # of dE alone
        f = Finished(shapes)
        f.state.layer(1).sums[-(-40 // POSITIONS), 0] = torch.nan
    left = f.state.layer(1).sums.isnan().any(1).nonzero().flatten().tolist()
    assert left == {0: [4], 1: [5], 2: [5, 7]}[part]  # of E the one between
    before = f.state.averages[1].clone()
    assert not f.state.taken_over(f.params, f.grads, f.known)
    assert int(f.state.half) == 1 and torch.equal(f.state.averages[1], before) and (f.state.scores == -1.0).all()
    next_step = Finished(shapes)
    next_step.state.averages.copy_(f.state.averages)
    assert f.state.launched(next_step.params, next_step.grads)


def test_probes_of_every_part() -> None:
    """Long and short: at most 64, of all triplets."""
    assert probes_of([torch.ones(0, 5), torch.ones(0, 1), torch.ones(3, 0)]).isnan().all()
    r, k = 3, 640
    dA = torch.arange(r * k).view(r, k).float()
    found = probes_of([dA, torch.arange(r).view(r, 1), torch.arange(7 * r).view(7, r)])
    assert found[0].tolist() == [(i % r) * k + 10 * i for i in range(64)]
    assert found[1, :r].tolist() == [0, 1, 2] and found[1, r:].isnan().all()
    assert found[2, :7].tolist() == [i * r + i % r for i in range(7)] and found[2, 7:].isnan().all()


def test_handover_is_what_the_layers_fill() -> None:
    left = new_handover(TripletLayout(((2, 9, 16), (0, 4, 4))), torch.device("cpu"))
    assert isinstance(left, Handover) and left.sums.numel() == 2 * (2 + 1 + 2)
