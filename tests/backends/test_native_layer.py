"""The layer on the CPU in fp32: the kernels of the low-rank term, and which calls reach them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from adalora_kernels.backends import native, native_lowrank
from adalora_kernels.reference import svd_linear as reference
from adalora_kernels.reference.svd_linear import Adapter
from adalora_kernels.testing.inputs import LayerInputs, layer_inputs
from adalora_kernels.testing.tolerances import assert_within_budget

C = 0.37
NAMES = ("y", "u", "dx", "dA", "dE", "dB")
ALL = (True, True, True, True)
# Every number of ranks that a register tile takes (1 to 12), and several tiles of unlike size.
RANKS = (*range(1, 14), 16, 33, 64)
SHAPES = ((1, 1, 1), (3, 15, 17), (66, 64, 33), (135, 81, 48), (300, 16, 5))

Results = list[Tensor | None]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the fp32 kernels in the order of their calls."""
    seen: list[str] = []

    def spy(name: str) -> None:
        launch = getattr(native_lowrank, name)

        def recorded(*args: object) -> object:
            seen.append(name)
            return launch(*args)

        monkeypatch.setattr(native_lowrank, name, recorded)

    spy("forward")
    spy("backward")
    yield seen


def run(
    module: object,
    i: LayerInputs,
    mask: Tensor | None = None,
    seed: Tensor | None = None,
    p: float = 0.0,
    needs: tuple[bool, ...] = ALL,
    base: Tensor | None = None,
) -> Results:
    """y, u, dx, dA, dE, dB of one call of each direction."""
    ours = module is native
    forward = native.svd_linear_forward if ours else reference.forward
    backward = native.svd_linear_backward if ours else reference.backward
    weight, bias = (i.weight, i.bias) if base is None else (None, None)
    adapter = Adapter(i.lora_A, i.lora_E, i.lora_B, mask, seed, C, p, i.x.dtype)
    y, u = forward(i.x, weight, bias, base, adapter)
    return [y, u, *backward(i.grad_y, i.x, u, weight, adapter, needs)]


def hold(draws: list[LayerInputs], mask: Tensor | None = None, seed: Tensor | None = None, p: float = 0.0) -> None:
    """The budget over several draws at once: where a result is one number, its error in one draw may be anything."""
    ours = [run(native, i, mask, seed, p) for i in draws]
    same = [run(reference, i, mask, seed, p) for i in draws]
    exact = [run(reference, i.to(torch.float64), mask, seed, p) for i in draws]
    for n, name in enumerate(NAMES):
        stacked = [torch.stack([r[n] for r in runs if r[n] is not None]) for runs in (ours, same, exact)]
        assert_within_budget(name, *stacked)


@pytest.mark.parametrize("rank", RANKS)
def test_error_budget(rank: int, calls: list[str]) -> None:
    for m, k, n in SHAPES:
        hold([layer_inputs(m, k, n, rank, seed=seed) for seed in range(6)])
    assert calls == ["forward", "backward"] * 6 * len(SHAPES)


def test_long_rows_and_many_slabs(calls: list[str]) -> None:
    hold([layer_inputs(1100, 8200, 40, 12, bias=False)])
    hold([layer_inputs(70, 40, 30000, 5, bias=False)])
    hold([layer_inputs(5000, 33, 18, 12, bias=False)])
    hold([layer_inputs(20000, 9, 18, 3, bias=False)])
    assert calls == ["forward", "backward"] * 4


@pytest.mark.parametrize("dtype", (torch.float32, torch.bool))
def test_mask(dtype: torch.dtype, calls: list[str]) -> None:
    i, mask = layer_inputs(40, 50, 60, 5), torch.tensor([[1], [0], [1], [1], [0]], dtype=dtype)
    hold([i], mask)
    pruned = mask.reshape(-1) == 0
    *_, dA, dE, dB = run(native, i, mask)
    assert dA is not None and dE is not None and dB is not None
    assert not dA[pruned].any() and not dE[pruned].any() and not dB[:, pruned].any()
    assert dA[~pruned].all() and dE[~pruned].all() and dB[:, ~pruned].all()
    assert len(calls) == 4


def test_dropout(calls: list[str]) -> None:
    hold([layer_inputs(70, 65, 33, 12, seed=seed) for seed in range(3)], seed=torch.tensor([7]), p=0.3)
    assert len(calls) == 6


def strided(t: Tensor) -> Tensor:
    """The values of t as rows that lie further apart, among numbers that must not be read."""
    wide = torch.full((t.shape[0], t.shape[1] + 7), float("nan"))
    wide[:, 3 : 3 + t.shape[1]] = t
    return wide[:, 3 : 3 + t.shape[1]]


def test_rows_further_apart(calls: list[str]) -> None:
    i = layer_inputs(70, 65, 33, 12)
    plain = run(native, i)
    i.x, i.grad_y = strided(i.x), strided(i.grad_y)
    for name, got, want in zip(NAMES, run(native, i), plain, strict=True):
        assert got is not None and want is not None
        assert torch.allclose(got, want, rtol=0, atol=1e-5), name
    assert len(calls) == 4


@pytest.mark.parametrize("far", (False, True))
def test_base_is_added_to_in_place(far: bool, calls: list[str]) -> None:
    i = layer_inputs(70, 65, 33, 12)
    start = torch.randn(70, 33)
    base = strided(start) if far else start.clone()
    version = base._version
    ours, theirs = run(native, i, base=base), run(reference, i, base=start.clone())
    assert ours[0] is base and base._version > version
    for name, got, want in zip(NAMES, ours, theirs, strict=True):
        assert got is not None and want is not None
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-4), name
    assert calls == ["forward", "backward"]


@pytest.mark.parametrize("needs", [tuple(bool(bits >> j & 1) for j in range(4)) for bits in range(16)])
@pytest.mark.parametrize("p", (0.0, 0.5))
def test_only_what_is_asked_for(needs: tuple[bool, ...], p: float) -> None:
    i = layer_inputs(70, 65, 33, 12)
    seed = torch.tensor([3]) if p else None
    whole, part = run(native, i, seed=seed, p=p), run(native, i, seed=seed, p=p, needs=needs)
    for name, need, got, want in zip(NAMES[2:], needs, part[2:], whole[2:], strict=True):
        assert got is None if not need else torch.equal(got, want), name  # type: ignore[arg-type]


@pytest.mark.parametrize("rank", (1, 12, 33))
def test_same_bits_whatever_the_threads(rank: int) -> None:
    x, g = torch.randn(1300, 130), torch.randn(1300, 97)
    a, e, b = torch.randn(rank, 130), torch.randn(rank, 1), torch.randn(97, rank)
    y, dx = torch.randn(1300, 97), torch.randn(1300, 130)

    def results() -> list[Tensor]:
        out, back = y.clone(), dx.clone()
        u = native_lowrank.forward(x, a, e, b, None, C, out)
        return [out, u, back, *native_lowrank.backward(g, x, u, a, e, b, None, C, back, True, True, True)]

    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            runs.append(results())
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        for got, want in zip(other, runs[0], strict=True):
            assert torch.equal(got, want)


def test_no_rows(calls: list[str]) -> None:
    y, u, dx, dA, dE, dB = run(native, layer_inputs(0, 65, 33, 12))
    assert y is not None and u is not None and dx is not None
    assert y.shape == (0, 33) and u.shape == (0, 12) and dx.shape == (0, 65)
    for grad, shape in ((dA, (12, 65)), (dE, (12, 1)), (dB, (33, 12))):
        assert grad is not None and torch.equal(grad, torch.zeros(shape))
    assert calls == ["forward", "backward"]


@pytest.mark.parametrize("case", ("float64", "bfloat16", "half adapter", "columns", "transposed factor", "rank"))
def test_what_the_kernels_do_not_read(case: str, calls: list[str]) -> None:
    dtype = {"float64": torch.float64, "bfloat16": torch.bfloat16}.get(case, torch.float32)
    adapter = torch.bfloat16 if case == "half adapter" else None
    i = layer_inputs(24, 30, 20, 70 if case == "rank" else 6, dtype, adapter)
    if case == "columns":
        i.x, i.grad_y = i.x.t().contiguous().t(), i.grad_y.t().contiguous().t()
    if case == "transposed factor":
        i.lora_A = i.lora_A.t().contiguous().t()
    for name, got, want in zip(NAMES, run(native, i), run(reference, i), strict=True):
        assert got is not None and want is not None
        assert got.dtype == want.dtype, name
        tolerance = 4 * torch.finfo(got.dtype).eps * want.abs().max()
        assert (got - want).abs().max() <= tolerance, name
    assert not calls
