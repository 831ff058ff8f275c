"""What ``published``, ``shrink_tail`` and ``blas`` must compute: run by ``test_kernels.py`` in a process of its own.

To debug one: ``TRITON_INTERPRET=1 pytest tests/backends/triton/forward_plan_cases.py -k <case>``. The interpreter runs
programs one after another and draws no line between pointers and tensor descriptors that a test can't move, so both the
order of tickets and the path through descriptors are tried there.
"""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import pytest
import torch
import triton
from torch import Tensor

from adalora_kernels.backends.triton import configurations, rank_padding, tickets
from adalora_kernels.backends.triton.forward import blas, gemm, published, shrink, shrink_tail
from adalora_kernels.backends.triton.tiles import Tile
from adalora_kernels.reference import svd_linear as reference
from adalora_kernels.testing.inputs import LayerInputs
from adalora_kernels.testing.tolerances import assert_within_budget
from tests.backends.triton import kernel_cases
from tests.backends.triton.kernel_cases import DEVICE, DTYPES, Case, inside_nan, poisoned

__all__ = ["poisoned"]  # applies to every case here, too

INTERPRETED = triton.knobs.runtime.interpret
PLANS = {"published": published, "shrink_tail": shrink_tail, "blas": blas}
ON_GEMM = {"published": published, "shrink_tail": shrink_tail}
RANKS = (0, 1, 8, 16, 33, 64, 128)
M, K, N = 70, 42, 74  # two tiles of 64 and an end in each; none a multiple of 8
TILE = Tile(64, 64, 32, 8, 2)
NARROW = Tile(32, 16, 64, 8, 2)  # three row blocks of five tiles each

plans = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
on_gemm = pytest.mark.parametrize("plan", ON_GEMM.values(), ids=ON_GEMM.keys())
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
interpreted = pytest.mark.skipif(not INTERPRETED, reason="compiled, the device decides")


@pytest.fixture(autouse=True)
def few_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted, where time goes by the step, kernels run with tiles for these shapes, whatever their tables say."""
    lookup = configurations.lookup
    if INTERPRETED:
        monkeypatch.setattr(configurations, "lookup", lambda *args: lookup(*args) and TILE)


def make_case(r: int, dtype: torch.dtype, *, full: bool, m: int = M, k: int = K, n: int = N) -> Case:
    """A layer of rank r with fp32 adapters; ``full`` adds bias, mask and dropout."""
    return kernel_cases.make_case(r, dtype, full=full, m=m, k=k, n=n)


def check(case: Case, plan: ModuleType) -> tuple[Tensor, Tensor]:
    """Hold y and u to their budgets, and the workspace to zero; returns y and u."""
    y, u = case.forward(plan.forward)
    same_y, same_u = case.forward(reference.forward)
    exact_y, exact_u = case.exact().forward(reference.forward)
    r = case.inputs.lora_A.shape[0]
    assert u.shape == (case.inputs.x.shape[0], rank_padding(r))
    assert (u[:, r:] == 0).all(), "u: its padding is not zero"
    assert_within_budget("y", y, same_y, exact_y)
    assert_within_budget("u", u[:, :r], same_u, exact_u)
    assert not tickets.workspace(y.device, 1).any(), "workspace: not left at zero"
    return y, u


def half_adapters(case: Case) -> Case:
    """The case with its adapters in the dtype of the products, and nothing dropped: u is made beside the product."""
    i = case.inputs
    adapter = {name: getattr(i, name).to(case.compute) for name in ("lora_A", "lora_E", "lora_B")}
    return replace(case, inputs=replace(i, **adapter), seed=None, dropout_p=0.0)


@plans
@dtypes
@pytest.mark.parametrize("r", RANKS)
def test_layer(r: int, dtype: torch.dtype, plan: ModuleType) -> None:
    """Bias, mask and dropout; adapters in fp32; nothing a multiple of 8."""
    check(make_case(r, dtype, full=True), plan)


@plans
@dtypes
@pytest.mark.parametrize("r", [0, 16])
def test_bare_layer(r: int, dtype: torch.dtype, plan: ModuleType) -> None:
    """Without bias, mask and dropout."""
    check(make_case(r, dtype, full=False), plan)


@on_gemm
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(("r", "dropout"), [(0, False), (12, False), (33, False), (12, True)])
@pytest.mark.parametrize("transposed", [False, True], ids=["w_n_k", "w_k_n"])
def test_descriptors(
    transposed: bool, r: int, dropout: bool, dtype: torch.dtype, plan: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles through descriptors, ragged in every dimension, W in either layout; u beside the product or ahead of it."""
    if INTERPRETED:
        monkeypatch.setattr(gemm, "has_descriptors", lambda device: True)
    case = make_case(r, dtype, full=True, k=40, n=72)
    if not dropout:
        case = half_adapters(case)
    if transposed:
        case.inputs = replace(case.inputs, weight=case.inputs.weight.t().contiguous().t())
    launched = record_options(monkeypatch)
    check(case, plan)
    options = launched[-1]
    assert options["DESCRIPTORS"] or not INTERPRETED
    if options["DESCRIPTORS"]:
        assert options["K_CONTIGUOUS"] is not transposed
    made_here = "ahead" if dropout or r > 32 else "beside"
    assert options["U"] == (made_here if plan is published and r else "given")


def record_options(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """The options of what ``gemm`` launches from here on."""
    found: list[dict[str, object]] = []
    launch = gemm.launch

    def recording(kernel: object, grid: tuple[int, ...], *args: object, **options: object) -> None:
        found.append(options)
        launch(kernel, grid, *args, **options)

    monkeypatch.setattr(gemm, "launch", recording)
    return found


@pytest.mark.parametrize("source", ["beside", "ahead"])
@pytest.mark.parametrize("count", [1, 4, 7, 20])
def test_any_number_of_programs(count: int, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tickets hand out every tile once, whoever comes; launches in a row find the workspace as they need it."""
    monkeypatch.setattr(configurations, "lookup", lambda *_: NARROW)
    monkeypatch.setattr(gemm, "programs", lambda device: count)
    case = make_case(12, torch.float16, full=True, k=72, n=72)
    if source == "beside":
        case = half_adapters(case)
    launched = record_options(monkeypatch)
    results = [check(case, published) for _ in range(3)]
    assert [options["U"] for options in launched] == 3 * [source]
    for y, u in results[1:]:
        assert torch.equal(y, results[0][0]) and torch.equal(u, results[0][1])


def test_launches_of_different_sizes_share_a_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configurations, "lookup", lambda *_: NARROW)
    for m, n in ((200, 40), (20, 12), (70, 50)):
        check(make_case(12, torch.float32, full=True, m=m, k=40, n=n), published)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("m", [20, 50])
def test_slices_of_k(m: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """With few row blocks K is cut, and the sum of its slices is the same in every run."""
    monkeypatch.setattr(configurations, "lookup", lambda *_: NARROW)
    monkeypatch.setattr(shrink, "programs", lambda device: 4)
    blocks = triton.cdiv(m, NARROW.block_m)
    assert shrink.slices_of(2100, NARROW.block_k, blocks, torch.device(DEVICE))[0] == 4 // blocks
    case = make_case(33, dtype, full=True, m=m, k=2100, n=1)
    u, again = (shrink.shrink(case.inputs.x, case.adapter, lets_next_begin=False) for _ in range(2))
    (_, same), (_, exact) = case.forward(reference.forward), case.exact().forward(reference.forward)
    assert (u[:, 33:] == 0).all(), "u: its padding is not zero"
    assert_within_budget("u", u[:, :33], same, exact)
    assert torch.equal(u, again)
    assert not tickets.workspace(u.device, 1).any(), "workspace: not left at zero"


@pytest.mark.parametrize("K", [0, 1, 64, 100, 768, 4096, 14336])
@pytest.mark.parametrize("row_blocks", [1, 3, 4, 1000])
def test_slices_cover_k_and_none_is_empty(row_blocks: int, K: int) -> None:
    count, columns = shrink.slices_of(K, 64, row_blocks, torch.device("cpu"))
    assert count >= 1 and columns % 64 == 0 and columns > 0
    assert count * columns >= K
    assert count == 1 or (count - 1) * columns < K


@plans
@pytest.mark.parametrize("r", [1, 33])
@pytest.mark.parametrize("shape", [(1, 8, 16), (5, 100, 7), (40, 13, 150)], ids=str)
def test_small_shapes(shape: tuple[int, int, int], r: int, plan: ModuleType) -> None:
    m, k, n = shape
    check(make_case(r, torch.float32, full=True, m=m, k=k, n=n), plan)


@plans
@pytest.mark.parametrize("layout", ["strided", "transposed", "expanded"])
def test_layouts(layout: str, plan: ModuleType) -> None:
    """Every argument with other strides than a fresh tensor's; a read out of bounds finds NaN."""
    case = make_case(12, torch.float32, full=True)
    i = case.inputs
    if layout == "strided":
        case.inputs = LayerInputs(*(None if t is None else inside_nan(t) for t in vars(i).values()))
        case.mask = inside_nan(case.mask.float())
    elif layout == "transposed":
        case.inputs = LayerInputs(*(t if t.dim() == 1 else t.t().contiguous().t() for t in vars(i).values()))
    else:
        case.inputs = replace(i, x=i.x[:1].expand(i.x.shape))
    check(case, plan)


@plans
@pytest.mark.parametrize("operands", ["x", "weight", "both", "neither"])
def test_autocast(operands: str, plan: ModuleType) -> None:
    """16-bit products of wider operands, or of operands in the other 16-bit dtype."""
    case = make_case(12, torch.bfloat16, full=True)
    i = case.inputs
    if operands == "neither":
        case.inputs = replace(i, x=i.x.half(), weight=i.weight.half(), bias=i.bias.float())
    else:
        x = i.x if operands == "weight" else i.x.float()
        case.inputs = replace(i, x=x, weight=i.weight if operands == "x" else i.weight.float())
    check(case, plan)


@plans
def test_fp64_parameters_under_fp32_products(plan: ModuleType) -> None:
    case = make_case(12, torch.float32, full=False)
    i = case.inputs
    wide = {name: getattr(i, name).double() for name in ("weight", "lora_A", "lora_B")}
    y, u = replace(case, inputs=replace(i, **wide)).forward(plan.forward)
    exact_y, exact_u = case.exact().forward(reference.forward)
    same_y, same_u = case.forward(reference.forward)
    assert_within_budget("y", y, same_y, exact_y)
    assert_within_budget("u", u[:, :12], same_u, exact_u)


@plans
@dtypes
def test_no_tokens(dtype: torch.dtype, plan: ModuleType) -> None:
    case = make_case(12, dtype, full=True, m=0)
    y, u = case.forward(plan.forward)
    assert y.shape == (0, case.inputs.weight.shape[0]) and y.dtype == dtype
    assert u.shape == (0, 16) and u.dtype == dtype


@plans
@dtypes
def test_two_runs_agree_bit_for_bit(dtype: torch.dtype, plan: ModuleType) -> None:
    case = make_case(33, dtype, full=True)
    (y, u), (again_y, again_u) = case.forward(plan.forward), case.forward(plan.forward)
    assert torch.equal(y, again_y) and torch.equal(u, again_u)


@plans
@pytest.mark.parametrize("p", [1e-11, 0.5, 1.0])
def test_dropout_probabilities(p: float, plan: ModuleType) -> None:
    case = make_case(12, torch.float32, full=True, m=20)
    case.dropout_p = p
    _, u = check(case, plan)
    assert bool((u == 0).all()) == (p == 1.0)


@plans
def test_rank_too_large(plan: ModuleType) -> None:
    with pytest.raises(ValueError, match="lora_A: expected a rank of at most 128, got 129"):
        make_case(129, torch.float32, full=False, m=1, k=8, n=8).forward(plan.forward)


@plans
def test_products_in_fp64(plan: ModuleType) -> None:
    case = replace(make_case(8, torch.float32, full=False), compute=torch.float64)
    with pytest.raises(TypeError, match=r"compute_dtype: expected float32, float16 or bfloat16, got torch\.float64"):
        case.forward(plan.forward)
