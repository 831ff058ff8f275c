"""The optimizer's sweep on the CPU against the specification, the specification against torch's own AdamW."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from adalora_kernels.backends import native
from adalora_kernels.reference import adamw as reference
from adalora_kernels.reference.importance import TripletLayout
from adalora_kernels.testing.tolerances import assert_within_budget

GROUPS = [[3e-3, 0.02, 0.9, 0.999, 1e-8], [1e-2, 0.0, 0.8, 0.98, 1e-6]]


class Run:
    """Parameters and all state of one optimizer, stepped by one implementation."""

    def __init__(self, layout: TripletLayout, params: list[Tensor], dtype: torch.dtype, pre_step: bool = False) -> None:
        count, elements = len(params), layout.total_elements
        self.layout = layout
        self.params = [p.clone() for p in params]
        self.moments = torch.zeros(2, elements, dtype=dtype)
        self.steps = torch.zeros(count)
        self.groups = torch.arange(count) % len(GROUPS)
        self.importance = reference.Importance(
            torch.zeros(2, 2, elements, dtype=dtype),
            torch.zeros(1, dtype=torch.int32),
            torch.zeros(layout.total_rank, dtype=dtype),
            0.85,
            0.75,
            pre_step,
        )

    def step(self, module: Any, grads: list[Tensor | None], scale: float = 1.0, importance: bool = True) -> bool:
        settings = torch.tensor(GROUPS, dtype=torch.float64)
        finite = module.adamw_update(
            self.layout, self.params, grads, self.moments, self.steps, self.groups, settings,
            torch.tensor([scale], dtype=torch.float64), self.importance if importance else None,
        )  # fmt: skip
        return bool(finite.item())

    def tensors(self) -> dict[str, Tensor]:
        state, half, scores, *_ = self.importance
        named = {"moments": self.moments, "averages": state[int(half)], "scores": scores}
        return named | {f"param {i}": p for i, p in enumerate(self.params)}


def inputs(seed: int, dtype: torch.dtype, steps: int = 4) -> tuple[TripletLayout, list[Tensor], list[list[Any]]]:
    choice, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    shapes = tuple(
        (choice.choice([0, 1, 3, 12, 16, 33]), choice.choice([1, 64, 768, 5000]), choice.choice([7, 130, 3001]))
        for _ in range(choice.randint(1, 4))
    )
    sizes = [size for r, k, n in shapes for size in ((r, k), (r, 1), (n, r))]
    params = [torch.randn(s, generator=generator).to(dtype) for s in sizes]
    grads = [[torch.randn(s, generator=generator).to(dtype) for s in sizes] for _ in range(steps)]
    for row in grads[1:]:
        row[choice.randrange(len(row))] = None  # type: ignore[call-overload]
    return TripletLayout(shapes), params, grads


@pytest.mark.parametrize("pre_step", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("seed", range(4))
def test_sweep_is_the_specifications(seed: int, dtype: torch.dtype, pre_step: bool) -> None:
    layout, params, grads = inputs(seed, dtype)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    ours, same = Run(layout, params, wide, pre_step), Run(layout, params, wide, pre_step)
    exact = Run(layout, [p.double() for p in params], torch.float64, pre_step)
    for i, row in enumerate(grads):
        exact_row = [None if g is None else g.double() for g in row]
        for run, module, gs in ((ours, native, row), (same, reference, row), (exact, reference, exact_row)):
            assert run.step(module, gs, scale=0.7 if i == 2 else 1.0, importance=i != 1)
        if dtype in (torch.bfloat16, torch.float16):
            # Rounded parameters are what the next step starts from, on all sides.
            for p, q in zip(exact.params, same.params, strict=True):
                p.copy_(q)
            for p, q in zip(ours.params, same.params, strict=True):
                torch.testing.assert_close(p, q)
                p.copy_(q)
    assert torch.equal(ours.steps, same.steps)
    for name, got in ours.tensors().items():
        want, truth = same.tensors()[name], exact.tensors()[name]
        if dtype is torch.float64:
            torch.testing.assert_close(got, truth, rtol=1e-11, atol=1e-14)
        elif got.dtype is torch.float32:
            assert_within_budget(name, got, want, truth)


@pytest.mark.parametrize("module", [reference, native])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parameters_are_torchs(module: Any, dtype: torch.dtype) -> None:
    """Ten steps of torch.optim.AdamW with the same groups, a missing gradient among them."""
    layout, params, grads = inputs(1, dtype, steps=10)
    ours = Run(layout, params, dtype)
    theirs = [torch.nn.Parameter(p.clone()) for p in params]
    rows = [
        {"params": theirs[i :: len(GROUPS)], "lr": lr, "weight_decay": wd, "betas": (b1, b2), "eps": eps}
        for i, (lr, wd, b1, b2, eps) in enumerate(GROUPS)
    ]
    optimizer = torch.optim.AdamW(rows, foreach=False)
    for row in grads:
        ours.step(module, row)
        for p, g in zip(theirs, row, strict=True):
            p.grad = None if g is None else g.clone()
        optimizer.step()
    tolerance = {"rtol": 1e-12, "atol": 1e-14} if dtype is torch.float64 else {"rtol": 2e-6, "atol": 2e-7}
    for a, b in zip(ours.params, theirs, strict=True):
        torch.testing.assert_close(a, b.detach(), **tolerance)


def test_importance_in_the_sweep_has_the_bits_of_its_own_launch() -> None:
    """Fused into the optimizer's sweep or launched after it: no contraction, so no bit differs."""
    layout, params, grads = inputs(2, torch.float32)
    fused, apart = Run(layout, params, torch.float32), Run(layout, params, torch.float32)
    for row in grads:
        assert fused.step(native, row)
        apart.step(native, row, importance=False)
        i = apart.importance
        native.importance_update(layout, apart.params, row, i.state, i.half, i.scores, i.beta1, i.beta2)
    for name, value in fused.tensors().items():
        assert torch.equal(value, apart.tensors()[name]), name


def test_overflow_leaves_the_averages() -> None:
    layout, params, grads = inputs(3, torch.float32)
    run = Run(layout, params, torch.float32)
    assert run.step(native, grads[0])
    before = run.tensors()["averages"].clone(), run.importance.scores.clone(), run.importance.half.clone()
    next(g for g in grads[1] if g is not None and g.numel()).view(-1)[-1] = torch.inf
    assert not run.step(native, grads[1])
    for was, now in zip(before, (run.tensors()["averages"], run.importance.scores, run.importance.half), strict=True):
        assert torch.equal(was, now)


def test_bits_do_not_depend_on_threads() -> None:
    layout, params, grads = inputs(0, torch.float32)
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        run = Run(layout, params, torch.float32)
        for row in grads:
            run.step(native, row)
        results.append((run.tensors(), native.total_norm([g for g in grads[0] if g is not None])))
    torch.set_num_threads(threads)
    for tensors, norm in results[1:]:
        assert torch.equal(norm, results[0][1])
        assert all(torch.equal(value, results[0][0][name]) for name, value in tensors.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_total_norm(dtype: torch.dtype) -> None:
    tensors = [torch.randn(s).to(dtype) for s in ((3, 5), (0, 4), (700, 33), (1, 1))]
    tensors.append(torch.randn(20, 30).to(dtype).t())
    exact = torch.cat([t.double().reshape(-1) for t in tensors]).norm()
    for module in (native, reference):
        torch.testing.assert_close(module.total_norm(tensors), exact.view(1), rtol=1e-6, atol=0)


def test_bad_arguments_change_nothing() -> None:
    layout, params, grads = inputs(1, torch.float32)
    run = Run(layout, params, torch.float32)
    wrong = [grads[0][0].t().contiguous() if params[0].shape[0] != params[0].shape[1] else None, *grads[0][1:]]
    with pytest.raises(ValueError, match=r"grads\[0\]: expected shape"):
        run.step(native, wrong)
    with pytest.raises(ValueError, match="grads: expected"):
        run.step(native, grads[0][:-1])
    assert not run.moments.any() and not run.steps.any()
    assert all(torch.equal(a, b) for a, b in zip(run.params, params, strict=True))
