"""The layer through its public call: error budget, gradients, shapes, dtypes, compilation, bad input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from adalora_kernels import reference, svd_linear
from adalora_kernels.ops.svd_linear import svd_linear_into
from adalora_kernels.testing.inputs import RANKS, LayerInputs, layer_inputs
from adalora_kernels.testing.tolerances import assert_within_budget

CPU_BACKENDS = ("reference", "native")
SHAPES = ((37, 67, 129), (5, 13, 3), (64, 96, 48))
C = 0.37


def plain(i: LayerInputs, mask: Tensor | None = None) -> dict[str, Tensor]:
    """Output and gradients of the plain PyTorch expression, in the dtypes of the inputs (the adapter read in x's)."""
    names = ("x", "lora_A", "lora_E", "lora_B")
    leaves = {n: getattr(i, n).detach().clone().requires_grad_() for n in names}
    a, e, b = (leaves[n].to(i.x.dtype) for n in names[1:])
    lam = e.view(-1) * C if mask is None else e.view(-1) * C * mask.view(-1).to(i.x.dtype)
    y = F.linear(leaves["x"], i.weight, i.bias) + ((leaves["x"] @ a.t()) * lam) @ b.t()
    grads = torch.autograd.grad(y, list(leaves.values()), i.grad_y)
    return {"y": y.detach(), **dict(zip(names, grads, strict=True))}


def ours(i: LayerInputs, backend: str, mask: Tensor | None = None) -> dict[str, Tensor]:
    names = ("x", "lora_A", "lora_E", "lora_B")
    leaves = {n: getattr(i, n).detach().clone().requires_grad_() for n in names}
    y = svd_linear(leaves["x"], i.weight, *(leaves[n] for n in names[1:]), bias=i.bias, mask=mask, scaling=C,
                   backend=backend)  # fmt: skip
    grads = torch.autograd.grad(y, list(leaves.values()), i.grad_y)
    return {"y": y.detach(), **dict(zip(names, grads, strict=True))}


def hold(draws: list[LayerInputs], backend: str, mask: Tensor | None = None) -> None:
    """The budget over several draws at once: at rank 1 dE is one number, whose error in one draw may be anything."""
    runs = [(ours(i, backend, mask), plain(i, mask), plain(i.to(torch.float64), mask)) for i in draws]
    for name in runs[0][0]:
        actual, same, exact = (torch.stack([run[which][name] for run in runs]) for which in range(3))
        assert_within_budget(f"{backend} {name}", actual, same, exact)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_error_budget(backend: str, rank: int, dtype: torch.dtype) -> None:
    for m, k, n in SHAPES:
        hold([layer_inputs(m, k, n, rank, dtype, bias=m != 5, seed=seed) for seed in range(4)], backend)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("rank", RANKS)
def test_fp32_adapter_over_low_precision_base(backend: str, dtype: torch.dtype, rank: int) -> None:
    draws = [layer_inputs(37, 67, 129, rank, dtype, adapter_dtype=torch.float32, seed=seed) for seed in range(4)]
    hold(draws, backend)
    grads = ours(draws[0], backend)
    assert grads["lora_A"].dtype == grads["lora_E"].dtype == grads["lora_B"].dtype == torch.float32
    assert grads["x"].dtype == grads["y"].dtype == dtype


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("mask_dtype", (torch.bool, torch.float32))
def test_mask_multiplies_lambda_and_its_gradient(backend: str, mask_dtype: torch.dtype) -> None:
    i = layer_inputs(20, 33, 17, 8)
    mask = (torch.arange(8) % 3 != 0).to(mask_dtype)
    hold([i], backend, mask)
    grads = ours(i, backend, mask)
    assert (grads["lora_E"].view(-1)[mask == 0] == 0).all()
    assert (grads["lora_A"][mask == 0] == 0).all()
    assert (grads["lora_B"][:, mask == 0] == 0).all()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("use_mask", (False, True))
def test_gradcheck(backend: str, use_mask: bool) -> None:
    i = layer_inputs(6, 9, 7, 3, torch.float64)
    leaves = [t.requires_grad_() for t in (i.x, i.weight, i.lora_A, i.lora_E, i.lora_B, i.bias) if t is not None]
    mask = torch.tensor([1.0, 0.0, 1.0]) if use_mask else None

    def call(x: Tensor, w: Tensor, a: Tensor, e: Tensor, b: Tensor, bias: Tensor) -> Tensor:
        return svd_linear(x.view(2, 3, 9), w, a, e, b, bias=bias, mask=mask, scaling=0.7, backend=backend)

    def call_into(x: Tensor, w: Tensor, a: Tensor, e: Tensor, b: Tensor, bias: Tensor) -> Tensor:
        base = F.linear(x.view(2, 3, 9), w, bias)
        return svd_linear_into(base, x.view(2, 3, 9), a, e, b, mask=mask, scaling=0.7, backend=backend)

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradcheck(call_into, leaves)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize(("k", "n"), ((0, 5), (5, 0)))
def test_no_features(backend: str, k: int, n: int) -> None:
    x, w = torch.randn(2, 3, k, requires_grad=True), torch.randn(n, k)
    a, e, b = torch.randn(2, k), torch.randn(2, 1), torch.randn(n, 2)
    y = svd_linear(x, w, a, e, b, backend=backend)
    assert y.shape == (2, 3, n) and not y.any()
    (grad,) = torch.autograd.grad(y.sum(), [x])
    assert grad.shape == x.shape and not grad.any()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_gradient_of_lambda_at_the_start(backend: str) -> None:
    """Λ is 0 at initialisation: its gradient must be there all the same, and A and B get none."""
    i = layer_inputs(20, 33, 17, 8, torch.float64)
    i.lora_E.zero_()
    grads, expected = ours(i, backend), plain(i)
    torch.testing.assert_close(grads["lora_E"], expected["lora_E"], rtol=1e-12, atol=1e-12)
    assert grads["lora_E"].abs().min() > 0 and not grads["lora_A"].any() and not grads["lora_B"].any()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("shape", ((13,), (4, 13), (2, 3, 13), (2, 1, 3, 13), (0, 13), (2, 0, 13)))
def test_leading_shapes(backend: str, shape: tuple[int, ...]) -> None:
    i = layer_inputs(1, 13, 5, 3, torch.float64)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    leaves = [t.requires_grad_() for t in (i.lora_A, i.lora_E, i.lora_B)]
    y = svd_linear(x, i.weight, *leaves, scaling=C, backend=backend)
    expected = F.linear(x, i.weight + C * i.lora_B @ (i.lora_A * i.lora_E))
    torch.testing.assert_close(y, expected)
    for got, want in zip(
        torch.autograd.grad(y.sum(), [x, *leaves]), torch.autograd.grad(expected.sum(), [x, *leaves]), strict=True
    ):
        torch.testing.assert_close(got, want)


def strided_views() -> list[tuple[str, Callable[[Tensor], Tensor]]]:
    return [
        ("transposed", lambda t: t.t().contiguous().t()),
        ("every other row", lambda t: t.repeat_interleave(2, 0)[::2]),
        ("every other column", lambda t: t.repeat_interleave(2, 1)[:, ::2]),
        ("offset", lambda t: F.pad(t, (3, 0))[:, 3:]),
    ]


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize(("name", "view"), strided_views(), ids=[n for n, _ in strided_views()])
def test_strides(backend: str, name: str, view: Callable[[Tensor], Tensor]) -> None:
    i = layer_inputs(12, 10, 14, 4, torch.float64)
    want = ours(i, backend)
    i.x, i.weight, i.grad_y, i.lora_A, i.lora_B = (view(t) for t in (i.x, i.weight, i.grad_y, i.lora_A, i.lora_B))
    for key, value in ours(i, backend).items():
        torch.testing.assert_close(value, want[key], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_expanded_gradient(backend: str) -> None:
    """sum() hands back a gradient of stride 0."""
    i = layer_inputs(12, 10, 14, 4, torch.float64)
    i.grad_y = torch.ones((), dtype=torch.float64).expand(12, 14)
    want = plain(i)
    for key, value in ours(i, backend).items():
        torch.testing.assert_close(value, want[key], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_only_what_is_asked_for(backend: str) -> None:
    i = layer_inputs(12, 10, 14, 4, torch.float64)
    want = plain(i)
    for name in ("x", "lora_A", "lora_E", "lora_B"):
        leaf = getattr(i, name).clone().requires_grad_()
        args: dict[str, Any] = {n: getattr(i, n) for n in ("x", "weight", "lora_A", "lora_E", "lora_B")} | {name: leaf}
        y = svd_linear(**args, bias=i.bias, scaling=C, backend=backend)
        (grad,) = torch.autograd.grad(y, [leaf], i.grad_y)
        torch.testing.assert_close(grad, want[name], rtol=1e-12, atol=1e-12)
    assert not svd_linear(i.x, i.weight, i.lora_A, i.lora_E, i.lora_B, backend=backend).requires_grad


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("base_dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_autocast(backend: str, dtype: torch.dtype, base_dtype: torch.dtype) -> None:
    """The products run in autocast's dtype, forward and backward, wherever backward is called."""
    i = layer_inputs(37, 67, 129, 12, base_dtype, adapter_dtype=torch.float32)
    low = LayerInputs(**{n: None if t is None else t.to(dtype).to(torch.float32) for n, t in vars(i).items()})
    exact = plain(low.to(torch.float64))
    same = plain(low.to(dtype))
    leaves = {n: getattr(i, n).clone().requires_grad_() for n in ("x", "lora_A", "lora_E", "lora_B")}
    with torch.autocast("cpu", dtype=dtype):
        y = svd_linear(leaves["x"], i.weight, *list(leaves.values())[1:], bias=i.bias, scaling=C, backend=backend)
        inside = torch.autograd.grad(y, list(leaves.values()), i.grad_y.to(dtype), retain_graph=True)
    outside = torch.autograd.grad(y, list(leaves.values()), i.grad_y.to(dtype))
    assert y.dtype == dtype
    assert_within_budget("y", y, same["y"], exact["y"])
    for name, a, b in zip(leaves, inside, outside, strict=True):
        assert a.dtype == leaves[name].dtype
        assert torch.equal(a, b)
        # Λ's gradient is a sum over N of T, which was rounded to 16 bits: its budget is that of the 16-bit expression.
        assert_within_budget(name, a.to(dtype), same[name], exact[name])


def test_autocast_leaves_fp64_alone() -> None:
    i = layer_inputs(4, 5, 6, 2, torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert svd_linear(i.x, i.weight, i.lora_A, i.lora_E, i.lora_B).dtype == torch.float64


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_two_runs_are_bitwise_equal(backend: str) -> None:
    i = layer_inputs(200, 96, 80, 12)
    first, second = ours(i, backend), ours(i, backend)
    assert all(torch.equal(first[n], second[n]) for n in first)


class TestDropout:
    def call(self, backend: str, i: LayerInputs, p: float, training: bool = True) -> tuple[Tensor, ...]:
        leaves = [t.clone().requires_grad_() for t in (i.x, i.lora_A, i.lora_E, i.lora_B)]
        y = svd_linear(leaves[0], i.weight, *leaves[1:], scaling=C, dropout_p=p, training=training, backend=backend)
        return (y, *torch.autograd.grad(y, leaves, i.grad_y))

    def test_same_seed_same_mask_on_every_backend(self) -> None:
        i = layer_inputs(30, 40, 20, 5, torch.float64)
        results = []
        for backend in CPU_BACKENDS:
            torch.manual_seed(3)
            results.append(self.call(backend, i, 0.3))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("backend", CPU_BACKENDS)
    def test_gradient_uses_the_mask_of_the_forward(self, backend: str) -> None:
        i = layer_inputs(6, 9, 7, 3, torch.float64)
        leaves = [t.requires_grad_() for t in (i.x, i.lora_A, i.lora_E, i.lora_B)]

        def call(x: Tensor, a: Tensor, e: Tensor, b: Tensor) -> Tensor:
            torch.manual_seed(5)
            return svd_linear(x, i.weight, a, e, b, dropout_p=0.4, backend=backend)

        assert torch.autograd.gradcheck(call, leaves)

    @pytest.mark.parametrize("backend", CPU_BACKENDS)
    def test_share_and_scale(self, backend: str) -> None:
        x, one = torch.ones(400, 500), torch.ones(1, 1)
        y = svd_linear(x, torch.zeros(1, 500), torch.ones(1, 500) / 500, one, one, dropout_p=0.25, backend=backend)
        assert abs(y.mean().item() - 1) < 5 * (0.25 / 0.75 / x.numel()) ** 0.5
        again = svd_linear(x, torch.zeros(1, 500), torch.ones(1, 500) / 500, one, one, dropout_p=0.25, backend=backend)
        assert not torch.equal(y, again)

    @pytest.mark.parametrize("backend", CPU_BACKENDS)
    def test_ends_of_the_range(self, backend: str) -> None:
        i = layer_inputs(6, 9, 7, 3, torch.float64)
        frozen = F.linear(i.x, i.weight)
        torch.testing.assert_close(self.call(backend, i, 1.0)[0], frozen)
        for p, training in ((0.0, True), (0.9, False)):
            assert torch.equal(self.call(backend, i, p, training)[0], self.call(backend, i, 0.0)[0])

    @pytest.mark.parametrize("backend", CPU_BACKENDS)
    def test_checkpointing_redraws_the_same_mask(self, backend: str) -> None:
        i = layer_inputs(6, 9, 7, 3, torch.float64)
        x = i.x.requires_grad_()

        def call(x: Tensor) -> Tensor:
            return svd_linear(x, i.weight, i.lora_A, i.lora_E, i.lora_B, dropout_p=0.5, backend=backend)

        torch.manual_seed(1)
        (want,) = torch.autograd.grad(call(x).square().sum(), [x])
        torch.manual_seed(1)
        (got,) = torch.autograd.grad(checkpoint(call, x, use_reentrant=False).square().sum(), [x])
        assert torch.equal(got, want)


class TestInto:
    @pytest.mark.parametrize("backend", CPU_BACKENDS)
    def test_adds_in_the_memory_of_the_base(self, backend: str) -> None:
        i = layer_inputs(6, 9, 7, 3)
        x, a = i.x.requires_grad_(), i.lora_A.requires_grad_()
        base = F.linear(x.view(2, 3, 9), i.weight, i.bias)
        y = svd_linear_into(base, x.view(2, 3, 9), a, i.lora_E, i.lora_B, scaling=C, backend=backend)
        assert y.data_ptr() == base.data_ptr()
        want = svd_linear(x.view(2, 3, 9), i.weight, a, i.lora_E, i.lora_B, bias=i.bias, scaling=C)
        torch.testing.assert_close(y, want)
        y += 1  # what a Function returns must allow it

    @pytest.mark.parametrize("backend", CPU_BACKENDS)
    def test_base_that_hands_back_its_input(self, backend: str) -> None:
        i = layer_inputs(6, 9, 9, 3)
        before = i.x.clone()
        y = svd_linear_into(i.x, i.x, i.lora_A, i.lora_E, i.lora_B, scaling=C, backend=backend)
        assert torch.equal(i.x, before)
        torch.testing.assert_close(y, before + C * (before @ i.lora_A.t() * i.lora_E.view(-1)) @ i.lora_B.t())

    @pytest.mark.parametrize("backend", CPU_BACKENDS)
    def test_base_that_needs_its_output(self, backend: str) -> None:
        """exp saves its output: adding into it must be told to autograd, never give a wrong gradient."""
        i = layer_inputs(6, 9, 9, 3)
        x = i.x.requires_grad_()
        y = svd_linear_into(x.exp(), x, i.lora_A, i.lora_E, i.lora_B, backend=backend)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()

    @pytest.mark.parametrize("backend", CPU_BACKENDS)
    def test_base_in_another_dtype(self, backend: str) -> None:
        i = layer_inputs(6, 9, 7, 3, torch.bfloat16, adapter_dtype=torch.float32)
        base = F.linear(i.x, i.weight).float()
        y = svd_linear_into(base.clone(), i.x, i.lora_A, i.lora_E, i.lora_B, scaling=C, backend=backend)
        assert y.dtype == torch.float32
        want = base + C * (i.x.float() @ i.lora_A.t() * i.lora_E.view(-1)) @ i.lora_B.t()
        torch.testing.assert_close(y, want, rtol=2e-2, atol=2e-2)


class TestCompiled:
    @pytest.mark.parametrize("backend", CPU_BACKENDS)
    def test_opcheck(self, backend: str) -> None:
        i = layer_inputs(6, 9, 7, 3, torch.float64)
        x, a, e, b = (t.requires_grad_() for t in (i.x, i.lora_A, i.lora_E, i.lora_B))
        op = torch.ops.adalora.svd_linear_forward.default
        rest = (0.5, 0.0, torch.float64, backend)
        torch.library.opcheck(op, (x, i.weight, i.bias, None, a, e, b, None, None, *rest))
        torch.library.opcheck(op, (x, i.weight, None, None, a, e, b, torch.tensor([1.0, 0.0, 1.0]), None, *rest))
        base = torch.randn(6, 7, dtype=torch.float64, requires_grad=True)
        seed = torch.tensor([5])
        torch.library.opcheck(op, (x, None, None, base, a, e, b, None, seed, 0.5, 0.3, torch.float64, backend))

    @pytest.mark.parametrize("backend", (*CPU_BACKENDS, None))
    def test_fullgraph_equals_eager(self, backend: str | None) -> None:
        i = layer_inputs(24, 33, 17, 12)
        leaves = [t.requires_grad_() for t in (i.x, i.lora_A, i.lora_E, i.lora_B)]

        def call(x: Tensor, a: Tensor, e: Tensor, b: Tensor) -> Tensor:
            return svd_linear(x, i.weight, a, e, b, bias=i.bias, scaling=C, backend=backend).relu()

        compiled = torch.compile(call, fullgraph=True)
        eager_y, compiled_y = call(*leaves), compiled(*leaves)
        assert torch.equal(eager_y, compiled_y)
        for a, b in zip(
            torch.autograd.grad(eager_y.sum(), leaves), torch.autograd.grad(compiled_y.sum(), leaves), strict=True
        ):
            assert torch.equal(a, b)

    def test_fullgraph_into_and_autocast(self) -> None:
        i = layer_inputs(24, 33, 17, 12)
        leaves = [t.requires_grad_() for t in (i.x, i.lora_A, i.lora_E, i.lora_B)]

        def call(x: Tensor, a: Tensor, e: Tensor, b: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = svd_linear(x, i.weight, a, e, b, bias=i.bias, scaling=C)
                return svd_linear_into(y + 1, x, a, e, b, scaling=C)

        compiled = torch.compile(call, fullgraph=True)
        eager_y, compiled_y = call(*leaves), compiled(*leaves)
        torch.testing.assert_close(eager_y, compiled_y)
        for a, b in zip(
            torch.autograd.grad(eager_y.sum(), leaves), torch.autograd.grad(compiled_y.sum(), leaves), strict=True
        ):
            torch.testing.assert_close(a, b)

    def test_changed_mask_and_tokens_recompile_nothing(self) -> None:
        i = layer_inputs(24, 33, 17, 12)
        counter = torch._dynamo.testing.CompileCounter()

        def call(x: Tensor, mask: Tensor) -> Tensor:
            return svd_linear(x, i.weight, i.lora_A, i.lora_E, i.lora_B, mask=mask, scaling=C)

        compiled = torch.compile(call, fullgraph=True, backend=counter, dynamic=True)
        for seed in range(3):
            mask = (torch.rand(12, generator=torch.Generator().manual_seed(seed)) > 0.5).float()
            x = torch.randn(24 + seed, 33)
            torch.testing.assert_close(compiled(x, mask), call(x, mask))
        assert counter.frame_count == 1


def test_saved_for_backward() -> None:
    """x itself, u [M, R] and the parameters: nothing of size M x N, and no copy of x."""
    i = layer_inputs(64, 96, 80, 12)
    x, a = i.x.requires_grad_(), i.lora_A.requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        svd_linear(x, i.weight, a, i.lora_E, i.lora_B, bias=i.bias)
    own = {t.data_ptr() for t in (x, i.weight, i.bias, a, i.lora_E, i.lora_B) if t is not None}
    assert x.data_ptr() in {t.data_ptr() for t in saved}
    extra = [t for t in saved if t.data_ptr() not in own]
    assert [tuple(t.shape) for t in extra] == [(64, 12)]


def test_reference_backward_is_autograd_of_its_forward() -> None:
    i = layer_inputs(7, 11, 5, 3, torch.float64)
    leaves = [t.requires_grad_() for t in (i.x, i.lora_A, i.lora_E, i.lora_B)]
    mask, seed = torch.tensor([1.0, 0.0, 1.0]), torch.tensor([1234567890123])
    adapter = reference.svd_linear.Adapter(*leaves[1:], mask, seed, 0.7, 0.3, torch.float64)
    y, u = reference.svd_linear.forward(i.x, i.weight, i.bias, None, adapter)
    want = torch.autograd.grad(y, leaves, i.grad_y)
    with torch.no_grad():
        got = reference.svd_linear.backward(i.grad_y, i.x, u, i.weight, adapter, (True,) * 4)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)
