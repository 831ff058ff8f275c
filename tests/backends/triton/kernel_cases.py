"""What ``one_pass``, ``delta`` and ``split`` must compute, case by case: run by ``test_kernels.py`` in its own process.

Triton decides when it decorates a kernel whether it will be interpreted, so these cases can't share a process with the
tests that compile kernels. To debug one: ``TRITON_INTERPRET=1 pytest tests/backends/triton/kernel_cases.py -k <case>``;
on a machine with a GPU, without the variable, the same cases run compiled.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from adalora_kernels.backends.triton import rank_padding
from adalora_kernels.backends.triton.backward import split
from adalora_kernels.backends.triton.dropout import dropout_arguments, keep_mask
from adalora_kernels.backends.triton.forward import delta, one_pass
from adalora_kernels.reference import svd_linear as reference
from adalora_kernels.reference.svd_linear import Adapter
from adalora_kernels.testing.inputs import RANKS, LayerInputs, layer_inputs
from adalora_kernels.testing.tolerances import assert_within_budget

DEVICE = "cpu" if triton.knobs.runtime.interpret else "cuda"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
M, K, N = 150, 70, 140  # no dimension a multiple of 8; two tiles and an end in each
ALL = (True, True, True, True)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever a launcher allocates holds NaN until a kernel writes it."""
    allocate = torch.empty

    def empty(*args: object, **kwargs: object) -> Tensor:
        tensor = allocate(*args, **kwargs)
        return tensor.fill_(torch.nan) if tensor.dtype.is_floating_point else tensor

    monkeypatch.setattr(torch, "empty", empty)
    yield


@dataclass
class Case:
    """One layer call. ``frozen`` is the base's output where there is no weight."""

    inputs: LayerInputs
    compute: torch.dtype
    mask: Tensor | None = None
    seed: Tensor | None = None
    dropout_p: float = 0.0
    base: Tensor | None = None
    scaling: float = 1.7

    @property
    def plan(self) -> Callable[..., tuple[Tensor, Tensor]]:
        """The forward under test: the one that takes a weight, or a base."""
        return one_pass.forward if self.base is None else delta.forward

    def forward(self, function: Callable[..., tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        i = self.inputs
        weight = (None, None, self.base.clone()) if self.base is not None else (i.weight, i.bias, None)
        return function(i.x, *weight, self.adapter)

    def backward(
        self, function: Callable[..., tuple[Tensor | None, ...]], u: Tensor, needs: tuple[bool, ...] = ALL
    ) -> tuple[Tensor | None, ...]:
        i = self.inputs
        weight = None if self.base is not None else i.weight
        return function(i.grad_y, i.x, u, weight, self.adapter, needs)

    def exact(self) -> Case:
        """The same call in fp64."""
        base = None if self.base is None else self.base.double()
        return replace(self, inputs=self.inputs.to(torch.float64), compute=torch.float64, base=base)

    @property
    def adapter(self) -> Adapter:
        i = self.inputs
        return Adapter(i.lora_A, i.lora_E, i.lora_B, self.mask, self.seed, self.scaling, self.dropout_p, self.compute)


def make_case(
    r: int, dtype: torch.dtype, *, full: bool, m: int = M, k: int = K, n: int = N, into: bool = False
) -> Case:
    """A layer of rank r with fp32 adapters; ``full`` adds bias, mask and dropout."""
    inputs = layer_inputs(m, k, n, r, dtype, torch.float32, bias=full, device=DEVICE)
    case = Case(inputs, dtype)
    if into:
        case.base = layer_inputs(m, n, 1, 0, dtype, device=DEVICE, seed=1).x
    if full:
        case.mask = (torch.arange(r, device=DEVICE) % 3 != 1).view(-1, 1)
        case.seed = torch.tensor([-(2**61) + 12345], dtype=torch.int64, device=DEVICE)
        case.dropout_p = 0.3
    return case


def check(case: Case) -> tuple[Tensor, Tensor]:
    """Hold y, u, dx, dA, dE and dB to their budgets; returns y and u."""
    y, u = case.forward(case.plan)
    same_y, same_u = case.forward(reference.forward)
    exact_y, exact_u = case.exact().forward(reference.forward)
    r = case.inputs.lora_A.shape[0]
    assert u.shape == (case.inputs.x.shape[0], rank_padding(r))
    assert (u[:, r:] == 0).all(), "u: its padding is not zero"
    assert_within_budget("y", y, same_y, exact_y)
    assert_within_budget("u", u[:, :r], same_u, exact_u)
    actual = case.backward(split.backward, u)
    same = case.backward(reference.backward, same_u)
    exact = case.exact().backward(reference.backward, exact_u)
    for name, *results in zip(("dx", "dA", "dE", "dB"), actual, same, exact, strict=True):
        assert_within_budget(name, *results)
    return y, u


dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@dtypes
@pytest.mark.parametrize("r", [*RANKS, 128])
def test_layer(r: int, dtype: torch.dtype) -> None:
    check(make_case(r, dtype, full=True))


@dtypes
@pytest.mark.parametrize("r", [0, 12])
def test_bare_layer(r: int, dtype: torch.dtype) -> None:
    """Without bias, mask and dropout."""
    check(make_case(r, dtype, full=False))


@dtypes
@pytest.mark.parametrize("r", [0, 12, 64])
def test_into_a_base(r: int, dtype: torch.dtype) -> None:
    check(make_case(r, dtype, full=True, m=70, into=True))


def test_into_a_base_in_place() -> None:
    """A base that answers in fp32 under 16-bit products is updated where it lies, whatever its strides."""
    case = make_case(12, torch.bfloat16, full=False)
    base = layer_inputs(N, M, 1, 0, torch.float32, device=DEVICE).x.t()
    case.base = base.clone(memory_format=torch.preserve_format)
    exact, _ = case.exact().forward(reference.forward)
    same, _ = case.forward(reference.forward)
    y, _ = delta.forward(case.inputs.x, None, None, base, case.adapter)
    assert y is base
    assert_within_budget("y", y, same, exact)


@pytest.mark.parametrize("r", [1, 33])
@pytest.mark.parametrize("shape", [(1, 8, 16), (5, 200, 7), (70, 13, 300)], ids=str)
def test_small_shapes(shape: tuple[int, int, int], r: int) -> None:
    m, k, n = shape
    case = make_case(r, torch.float32, full=True, m=m, k=k, n=n)
    check(case)


def inside_nan(tensor: Tensor) -> Tensor:
    """The same values as a strided view into a buffer of NaN, so that a read out of bounds shows."""
    padded = torch.full([2 * size + 5 for size in tensor.shape], torch.nan, dtype=tensor.dtype, device=tensor.device)
    view = padded[tuple(slice(3, 3 + 2 * size, 2) for size in tensor.shape)]
    return view.copy_(tensor)


@pytest.mark.parametrize("layout", ["strided", "transposed", "expanded"])
def test_layouts(layout: str) -> None:
    """Every argument with other strides than a fresh tensor's; ``weight`` as a view of [K, N] for fan_in_fan_out."""
    case = make_case(12, torch.float32, full=True)
    i = case.inputs
    if layout == "strided":
        case.inputs = LayerInputs(*(None if t is None else inside_nan(t) for t in vars(i).values()))
        case.mask = inside_nan(case.mask.float())
    elif layout == "transposed":
        case.inputs = LayerInputs(*(t if t.dim() == 1 else t.t().contiguous().t() for t in vars(i).values()))
    else:
        case.inputs = replace(i, x=i.x[:1].expand(M, K), grad_y=torch.ones((), device=DEVICE).expand(M, N))
    check(case)


@pytest.mark.parametrize("operands", ["x", "weight", "both"])
def test_autocast(operands: str) -> None:
    """16-bit products of fp32 operands: dx comes back in x's dtype."""
    case = make_case(12, torch.bfloat16, full=True)
    i = case.inputs
    case.inputs = replace(
        i,
        x=i.x if operands == "weight" else i.x.float(),
        weight=i.weight if operands == "x" else i.weight.float(),
    )
    check(case)


def test_fp64_parameters_under_fp32_products() -> None:
    case = make_case(12, torch.float32, full=False)
    i = case.inputs
    adapter = {name: getattr(i, name).double() for name in ("weight", "lora_A", "lora_B")}
    case.inputs = replace(i, **adapter)
    y, u = case.forward(case.plan)
    same, exact = make_case(12, torch.float32, full=False), case.exact()
    assert_within_budget("y", y, same.forward(reference.forward)[0], exact.forward(reference.forward)[0])
    dx, dA, _, dB = case.backward(split.backward, u)
    assert (dx.dtype, dA.dtype, dB.dtype) == (torch.float32, torch.float64, torch.float64)


@dtypes
def test_no_tokens(dtype: torch.dtype) -> None:
    case = make_case(12, dtype, full=True, m=0)
    y, u = case.forward(case.plan)
    assert y.shape == (0, N) and u.shape == (0, 16)
    dx, *gradients = case.backward(split.backward, u)
    assert dx.shape == (0, K)
    assert all((gradient == 0).all() for gradient in gradients)


@dtypes
def test_two_runs_agree_bit_for_bit(dtype: torch.dtype) -> None:
    case = make_case(33, dtype, full=True)
    runs = []
    for _ in range(2):
        y, u = case.forward(case.plan)
        runs.append((y, u, *case.backward(split.backward, u)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_only_what_is_asked_for() -> None:
    case = make_case(8, torch.float32, full=True, m=40, n=30)
    _, u = case.forward(case.plan)
    together = case.backward(split.backward, u)
    for needs in itertools.product((False, True), repeat=4):
        alone = case.backward(split.backward, u, needs)
        for need, a, b in zip(needs, alone, together, strict=True):
            assert torch.equal(a, b) if need else a is None


@pytest.mark.parametrize("p", [1e-11, 0.5, 1.0])
def test_dropout_probabilities(p: float) -> None:
    case = make_case(12, torch.float32, full=True)
    case.dropout_p = p
    _, u = check(case)
    assert bool((u == 0).all()) == (p == 1.0)


@triton.jit
def _keep_kernel(m_ptr, out_ptr, K, seed_ptr, last_dropped, BLOCK: tl.constexpr):
    m = tl.load(m_ptr + tl.arange(0, BLOCK))
    k = tl.arange(0, BLOCK)
    keep = keep_mask(m, k, K, tl.load(seed_ptr), last_dropped)
    tl.store(out_ptr + k[:, None] * BLOCK + k[None, :], keep.to(tl.int32))


def philox_word(counter: int, seed: int) -> int:
    """The first output word of Philox 4x32-10, in plain integers."""
    word = 0xFFFFFFFF
    c, key = [counter & word, counter >> 32 & word, 0, 0], [seed & word, seed >> 32 & word]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ key[0], b & word, (a >> 32) ^ c[3] ^ key[1], a & word]
        key = [(key[0] + 0x9E3779B9) & word, (key[1] + 0xBB67AE85) & word]
    return c[0]


def test_mask_past_32_bits() -> None:
    """The counter of an element is a 64-bit number, and so is the seed."""
    k, p, seed = 2**31 - 7, 0.4, -(2**62) - 987654321
    rows = torch.tensor([0, 1, 2, 3, 5, 2**20, 2**31, 2**32 - 1], dtype=torch.int64, device=DEVICE)
    out = torch.zeros(8, 8, dtype=torch.int32, device=DEVICE)
    _keep_kernel[(1,)](rows, out, k, torch.tensor([seed], device=DEVICE), dropout_arguments(p)[0], BLOCK=8)
    expected = [[int(philox_word(m * k + j, seed) >= round(p * 2**32)) for j in range(8)] for m in rows.tolist()]
    assert out.tolist() == expected


def test_rank_too_large() -> None:
    with pytest.raises(ValueError, match="lora_A: expected a rank of at most 128, got 129"):
        make_case(129, torch.float32, full=False, m=1, k=8, n=8).forward(one_pass.forward)


def test_products_in_fp64() -> None:
    case = replace(make_case(8, torch.float32, full=False), compute=torch.float64)
    with pytest.raises(TypeError, match=r"compute_dtype: expected float32, float16 or bfloat16, got torch\.float64"):
        case.forward(one_pass.forward)
