"""What ``one_gemm``, ``split`` and ``blas`` must compute: run by ``test_kernels.py`` in a process of its own.

To debug one: ``TRITON_INTERPRET=1 pytest tests/backends/triton/backward_plan_cases.py -k <case>``. The interpreter runs
programs one after another, so it can't show a race, but it takes tickets in any number of programs and moves tiles
through descriptors as through pointers. There all products take one tile, for the sake of time.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

from adalora_kernels.backends.triton import configurations, rank_padding, tickets
from adalora_kernels.backends.triton.backward import (
    blas,
    g_pass,
    gemm,
    one_gemm,
    slab_sums,
    split,
    x_pass,
)
from adalora_kernels.backends.triton.tiles import Tile
from adalora_kernels.reference import svd_linear as reference
from adalora_kernels.testing.inputs import LayerInputs
from adalora_kernels.testing.tolerances import assert_within_budget
from tests.backends.triton.kernel_cases import DEVICE, DTYPES, Case, inside_nan, make_case, poisoned

__all__ = ["poisoned"]  # applies to every case here, too

INTERPRETED = triton.knobs.runtime.interpret
PLANS = {"one_gemm": one_gemm, "split": split, "blas": blas}
SHAPE = {"m": 100, "k": 70, "n": 140}  # nothing a multiple of 8; two row blocks and two columns of tiles
SMALL = Tile(64, 64, 64, 8, 2)
NAMES = ("dx", "dA", "dE", "dB")

plans = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
# All kernels run under these two: what ``blas`` launches, ``split`` does too.
both = pytest.mark.parametrize("plan", [one_gemm, split], ids=["one_gemm", "split"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@pytest.fixture(autouse=True)
def one_tile(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if INTERPRETED:
        lookup = configurations.lookup
        monkeypatch.setattr(configurations, "lookup", lambda *args: lookup(*args) and SMALL)
    yield


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Name and options of each launch from here on."""
    found: list[tuple[str, dict[str, Any]]] = []
    for module in (gemm, slab_sums, g_pass, x_pass):
        launch = module.launch

        def recording(kernel: Any, grid: Any, *args: Any, launch: Any = launch, **options: Any) -> None:
            name = kernel.__name__.removeprefix("_svd_linear_backward_").removesuffix("_kernel")
            found.append((name, options))
            launch(kernel, grid, *args, **options)

        monkeypatch.setattr(module, "launch", recording)
    return found


def run(case: Case, plan: ModuleType, needs: tuple[bool, ...] = (True,) * 4) -> tuple[Tensor | None, ...]:
    """The plan's gradients from the reference's u, in a buffer with zero columns past R."""
    _, u = case.forward(reference.forward)
    padded = torch.zeros((u.shape[0], rank_padding(u.shape[1])), dtype=u.dtype, device=u.device)
    padded[:, : u.shape[1]] = u
    gradients = case.backward(plan.backward, padded, needs)
    assert not tickets.workspace(u.device, 0).any(), "workspace: not left at zero"
    return gradients


def check(case: Case, plan: ModuleType) -> tuple[Tensor | None, ...]:
    """Hold dx, dA, dE and dB to their budgets."""
    actual = run(case, plan)
    exact_case = case.exact()
    same = case.backward(reference.backward, case.forward(reference.forward)[1])
    exact = exact_case.backward(reference.backward, exact_case.forward(reference.forward)[1])
    for name, *results in zip(NAMES, actual, same, exact, strict=True):
        assert_within_budget(name, *results)
    return actual


@both
@pytest.mark.parametrize(
    ("r", "dtype"),
    [*itertools.product((1, 16, 33, 64), (torch.float32, torch.bfloat16)), (8, torch.float16), (128, torch.bfloat16)],
    ids=str,
)
def test_gradients(r: int, dtype: torch.dtype, plan: ModuleType) -> None:
    """Mask and dropout; adapters in fp32."""
    case = make_case(r, dtype, full=True, **SHAPE)
    if plan is one_gemm and r > configurations.largest_rank("one_gemm"):
        with pytest.raises(ValueError, match="lora_A: expected a rank of at most 64, got 128"):
            run(case, plan)
    else:
        check(case, plan)


@pytest.mark.parametrize("r", [12, 33])
def test_gradients_with_the_blas(r: int) -> None:
    check(make_case(r, torch.bfloat16, full=True, **SHAPE), blas)


@plans
@dtypes
def test_without_a_rank(dtype: torch.dtype, plan: ModuleType) -> None:
    check(make_case(0, dtype, full=True, **SHAPE), plan)


@both
@dtypes
def test_without_mask_and_dropout(dtype: torch.dtype, plan: ModuleType) -> None:
    check(make_case(12, dtype, full=False, **SHAPE), plan)


@pytest.mark.parametrize("r", [0, 12, 64])
def test_without_a_weight(r: int) -> None:
    check(make_case(r, torch.bfloat16, full=True, m=70, k=40, n=30, into=True), split)


@pytest.mark.parametrize(("plan", "r"), [(one_gemm, 8), (split, 8), (split, 33), (blas, 33)], ids=str)
def test_only_what_is_asked_for(plan: ModuleType, r: int, launched: list[tuple[str, dict[str, Any]]]) -> None:
    """Each gradient alone is bit for bit what it is among all four, and no kernel runs for nothing."""
    case = make_case(r, torch.float32, full=True, m=40, k=30, n=30)
    all_four = run(case, plan)
    for asked in (0, 1, 2, 3, None):
        needs = tuple(number == asked or (number == 0 and plan is not split) for number in range(4))
        launched.clear()
        alone = run(case, plan, needs)
        for name, need, a, b in zip(NAMES, needs, alone, all_four, strict=True):
            if not need:
                assert a is None
            elif r <= configurations.largest_rank("g") and plan is not one_gemm:
                # v is summed over blocks of columns, or, without T, in one go.
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=name)
            else:
                assert torch.equal(a, b), name
        need_x, need_A, need_E, need_B = needs
        names = {name for name, _ in launched}
        assert ("finish" in names) == (need_A or need_E or need_B)
        assert ("gemm" in names) == (need_x and plan is not blas)
        if plan is not one_gemm:
            assert bool(names & {"v", "sum_v"}) == (need_x or need_A)
            assert ("t" in names) == (need_E or need_B)
            assert ("x" in names) == (need_A or (need_x and plan is blas))


@both
@pytest.mark.parametrize("r", [12, 33])
def test_two_runs_agree_bit_for_bit(r: int, plan: ModuleType) -> None:
    case = make_case(r, torch.bfloat16, full=True, **SHAPE)
    assert all(torch.equal(a, b) for a, b in zip(run(case, plan), run(case, plan), strict=True))


def test_any_number_of_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever takes which ticket, the gradients are the same, bit for bit."""
    case = make_case(12, torch.bfloat16, full=True, **SHAPE)
    results = []
    for programs in (1, 4, 7, 20):
        monkeypatch.setattr(tickets, "programs", lambda device, programs=programs: programs)
        results.append(run(case, one_gemm))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


@pytest.mark.parametrize(("blocks", "programs"), [(2, 1), (2, 3), (5, 3)])
def test_slabs_of_several_row_blocks(
    blocks: int, programs: int, monkeypatch: pytest.MonkeyPatch, launched: list[tuple[str, dict[str, Any]]]
) -> None:
    monkeypatch.setattr(gemm, "slab_blocks", lambda *_: blocks)
    monkeypatch.setattr(tickets, "programs", lambda device: programs)
    check(make_case(12, torch.float32, full=True, m=150, k=70, n=70), one_gemm)
    assert not dict(launched)["gemm"]["ONE_BLOCK_SLABS"]


@pytest.mark.parametrize("r", [12, 33])
@pytest.mark.parametrize("transposed", [False, True], ids=["w_n_k", "w_k_n"])
@both
def test_descriptors(
    plan: ModuleType,
    transposed: bool,
    r: int,
    monkeypatch: pytest.MonkeyPatch,
    launched: list[tuple[str, dict[str, Any]]],
) -> None:
    """Tiles through descriptors, ragged in every dimension, W in either layout."""
    if INTERPRETED:
        monkeypatch.setattr(gemm, "has_descriptors", lambda device: True)
    case = make_case(r, torch.bfloat16, full=True, m=150, k=72, n=136)
    if transposed:
        case.inputs = replace(case.inputs, weight=case.inputs.weight.t().contiguous().t())
    check(case, plan)
    options = dict(launched)["gemm"]
    assert options["DESCRIPTORS"] or not INTERPRETED
    assert options["K_CONTIGUOUS"] is not transposed


@both
@pytest.mark.parametrize("layout", ["strided", "transposed", "expanded"])
def test_layouts(layout: str, plan: ModuleType) -> None:
    """Every argument with other strides than a fresh tensor's; a read out of bounds finds NaN."""
    case = make_case(12, torch.float32, full=True, **SHAPE)
    i = case.inputs
    if layout == "strided":
        case.inputs = LayerInputs(*(None if t is None else inside_nan(t) for t in vars(i).values()))
        case.mask = inside_nan(case.mask.float())
    elif layout == "transposed":
        case.inputs = LayerInputs(*(t if t.dim() == 1 else t.t().contiguous().t() for t in vars(i).values()))
    else:
        ones = torch.ones((), device=DEVICE)
        case.inputs = replace(i, x=i.x[:1].expand(i.x.shape), grad_y=ones.expand(i.grad_y.shape))
    check(case, plan)


@both
@pytest.mark.parametrize("r", [1, 33])
@pytest.mark.parametrize("shape", [(1, 8, 16), (5, 100, 7), (70, 13, 150)], ids=str)
def test_small_shapes(shape: tuple[int, int, int], r: int, plan: ModuleType) -> None:
    m, k, n = shape
    check(make_case(r, torch.float32, full=True, m=m, k=k, n=n), plan)


@both
@pytest.mark.parametrize("operands", ["x", "weight", "both"])
def test_autocast(operands: str, plan: ModuleType) -> None:
    """16-bit products of fp32 operands: dx comes back in x's dtype."""
    case = make_case(12, torch.bfloat16, full=True, **SHAPE)
    i = case.inputs
    x = i.x if operands == "weight" else i.x.float()
    case.inputs = replace(i, x=x, weight=i.weight if operands == "x" else i.weight.float())
    check(case, plan)


@both
def test_fp64_parameters_under_fp32_products(plan: ModuleType) -> None:
    case = make_case(12, torch.float32, full=False, m=40, k=30, n=30)
    i = case.inputs
    case.inputs = replace(i, **{name: getattr(i, name).double() for name in ("weight", "lora_A", "lora_E", "lora_B")})
    gradients = check(case, plan)
    assert [t.dtype for t in gradients] == [torch.float32, torch.float64, torch.float64, torch.float64]


@plans
@pytest.mark.parametrize("empty", ["m", "k", "n"])
def test_empty_dimensions(empty: str, plan: ModuleType) -> None:
    case = make_case(12, torch.float32, full=False, m=5, k=6, n=7)
    m, k, n = (0 if dimension == empty else None for dimension in "mkn")
    i = case.inputs
    factors = {"lora_A": i.lora_A[:, :k], "lora_B": i.lora_B[:n]}
    case.inputs = replace(i, x=i.x[:m, :k], weight=i.weight[:n, :k], grad_y=i.grad_y[:m, :n], bias=None, **factors)
    gradients = run(case, plan)
    expected = case.backward(reference.backward, case.forward(reference.forward)[1])
    for name, a, b in zip(NAMES, gradients, expected, strict=True):
        assert torch.equal(a, b), name


@both
@pytest.mark.parametrize("p", [1e-11, 1.0])
def test_dropout_probabilities(p: float, plan: ModuleType) -> None:
    case = make_case(12, torch.float32, full=True, m=20, k=30, n=30)
    case.dropout_p = p
    _, dA, *_ = check(case, plan)
    assert bool((dA == 0).all()) == (p == 1.0)
