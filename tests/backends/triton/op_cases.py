"""The Triton backend through the public call, case by case: run by ``test_kernels.py`` in a process of its own.

What the kernels compute is held by ``kernel_cases.py``; here are autograd, shapes, autocast, dropout's seed and the
registered op. To debug one: ``TRITON_INTERPRET=1 pytest tests/backends/triton/op_cases.py -k <case>``.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from adalora_kernels import SVDLinear, explain, svd_linear
from adalora_kernels.backends.triton import plans
from adalora_kernels.ops.svd_linear import svd_linear_into
from adalora_kernels.testing.inputs import layer_inputs

DEVICE = "cpu" if triton.knobs.runtime.interpret else "cuda"
C = 0.37


def call_both(x: Tensor, adapter: list[Tensor], *others: Tensor | None, **options: object) -> None:
    """Output and gradients on triton against the reference; ``others`` are weight and bias."""
    leaves = [x, *adapter]
    results = []
    for backend in ("triton", "reference"):
        torch.manual_seed(7)
        y = svd_linear(x, others[0], *adapter, bias=others[1], scaling=C, backend=backend, **options)
        results.append([y, *torch.autograd.grad(y.float().square().sum(), leaves)])
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if results[0][0].dtype == torch.float32 else {"rtol": 4e-2, "atol": 4e-2}
    for got, want in zip(*results, strict=True):
        assert got.dtype == want.dtype and got.shape == want.shape
        scale = max(1.0, want.abs().max().item()) if want.numel() else 1.0
        torch.testing.assert_close(got / scale, want / scale, **tolerance)


@pytest.mark.parametrize("shape", [(33,), (5, 33), (2, 3, 33), (2, 1, 3, 33), (0, 33)], ids=str)
def test_leading_shapes(shape: tuple[int, ...]) -> None:
    i = layer_inputs(1, 33, 40, 12, device=DEVICE)
    x = torch.randn(shape, device=DEVICE).requires_grad_()
    call_both(x, [t.requires_grad_() for t in (i.lora_A, i.lora_E, i.lora_B)], i.weight, i.bias)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("base_dtype", [torch.float32, None], ids=["fp32 base", "16-bit base"])
def test_autocast(dtype: torch.dtype, base_dtype: torch.dtype | None) -> None:
    i = layer_inputs(20, 33, 40, 12, base_dtype or dtype, adapter_dtype=torch.float32, device=DEVICE)
    with torch.autocast(DEVICE, dtype=dtype):
        call_both(i.x.requires_grad_(), [t.requires_grad_() for t in (i.lora_A, i.lora_E, i.lora_B)], i.weight, i.bias)


def test_dropout_draws_the_mask_of_the_reference() -> None:
    i = layer_inputs(20, 33, 40, 12, device=DEVICE)
    adapter = [t.requires_grad_() for t in (i.lora_A, i.lora_E, i.lora_B)]
    call_both(i.x.requires_grad_(), adapter, i.weight, i.bias, dropout_p=0.4)


def test_gradients_of_a_base_that_trains() -> None:
    i = layer_inputs(20, 33, 40, 12, device=DEVICE)
    weight, bias = i.weight.requires_grad_(), i.bias.requires_grad_()
    y = svd_linear(i.x, weight, i.lora_A, i.lora_E, i.lora_B, bias=bias, backend="triton")
    dw, db = torch.autograd.grad(y, [weight, bias], i.grad_y)
    torch.testing.assert_close(dw, i.grad_y.t() @ i.x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(db, i.grad_y.sum(0), rtol=1e-4, atol=1e-4)


def test_into_the_output_of_a_base() -> None:
    i = layer_inputs(20, 33, 40, 12, device=DEVICE)
    x = i.x.view(4, 5, 33).requires_grad_()
    base = F.linear(x, i.weight, i.bias)
    y = svd_linear_into(base, x, i.lora_A, i.lora_E, i.lora_B, scaling=C, backend="triton")
    assert y.data_ptr() == base.data_ptr()
    want = svd_linear(x, i.weight, i.lora_A, i.lora_E, i.lora_B, bias=i.bias, scaling=C, backend="reference")
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)
    (got,), (wanted,) = (torch.autograd.grad(t.square().sum(), [x]) for t in (y, want))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_opcheck() -> None:
    i = layer_inputs(20, 33, 40, 12, device=DEVICE)
    x, a, e, b = (t.requires_grad_() for t in (i.x, i.lora_A, i.lora_E, i.lora_B))
    op = torch.ops.adalora.svd_linear_forward.default
    rest = (0.5, 0.0, torch.float32, "triton")
    torch.library.opcheck(op, (x, i.weight, i.bias, None, a, e, b, None, None, *rest))
    base = torch.randn(20, 40, device=DEVICE, requires_grad=True)
    seed = torch.tensor([5], device=DEVICE)
    torch.library.opcheck(op, (x, None, None, base, a, e, b, None, seed, 0.5, 0.3, torch.float32, "triton"))


def test_fullgraph_equals_eager() -> None:
    i = layer_inputs(20, 33, 40, 12, device=DEVICE)
    leaves = [t.requires_grad_() for t in (i.x, i.lora_A, i.lora_E, i.lora_B)]

    def call(x: Tensor, a: Tensor, e: Tensor, b: Tensor) -> Tensor:
        return svd_linear(x, i.weight, a, e, b, bias=i.bias, scaling=C, backend="triton").relu()

    eager, compiled = call(*leaves), torch.compile(call, fullgraph=True)(*leaves)
    assert torch.equal(eager, compiled)
    for a, b in zip(torch.autograd.grad(eager.sum(), leaves), torch.autograd.grad(compiled.sum(), leaves), strict=True):
        assert torch.equal(a, b)


def test_saves_u_alone() -> None:
    """Beyond x and the parameters: 2 M Rpad bytes in 16 bits."""
    i = layer_inputs(20, 33, 40, 12, torch.bfloat16, adapter_dtype=torch.float32, device=DEVICE)
    x, a = i.x.requires_grad_(), i.lora_A.requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        svd_linear(x, i.weight, a, i.lora_E, i.lora_B, bias=i.bias, backend="triton")
    own = {t.data_ptr() for t in (x, i.weight, i.bias, a, i.lora_E, i.lora_B) if t is not None}
    assert [t.nbytes for t in saved if t.data_ptr() not in own] == [2 * 20 * 16]


def test_module_and_explain() -> None:
    layer = SVDLinear(33, 40, r=12, backend="triton", device=DEVICE)
    (line,) = explain(layer)
    assert line.backend == "triton" and line.reason.startswith("asked for by name; forward ")
    assert "warps" in line.configuration
    layer(torch.randn(3, 33, device=DEVICE)).sum().backward()
    assert layer.lora_E.grad is not None and layer.lora_E.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "backend", ["triton:one_pass/split", "triton:published/one_gemm", "triton:shrink_tail", "triton:/blas"]
)
def test_plan_asked_for_by_name(backend: str) -> None:
    """Eager and compiled calls go where explain says; which code becomes of the graph is of no account here."""
    i = layer_inputs(20, 33, 40, 12, device=DEVICE)
    leaves = [t.requires_grad_() for t in (i.x, i.lora_A, i.lora_E, i.lora_B)]
    (line,) = explain(i.x, i.weight, *leaves[1:], bias=i.bias, backend=backend)
    forward, backward = line.plan.split("/")
    for part, given in zip((forward, backward), backend.removeprefix("triton:").partition("/")[::2], strict=True):
        assert part == (given or part) and (not given or f"{given} asked for by name" in line.reason)
    called: list[str] = []

    def call(x: Tensor, a: Tensor, e: Tensor, b: Tensor) -> Tensor:
        return svd_linear(x, i.weight, a, e, b, bias=i.bias, scaling=C, backend=backend)

    def spied(direction: str, name: str) -> Callable[..., object]:
        called.append(f"{direction} {name}")
        return launcher(direction, name)

    with pytest.MonkeyPatch.context() as patch:
        launcher = plans.launcher
        patch.setattr(plans, "launcher", spied)
        results = []
        for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
            y = function(*leaves)
            results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    assert called == [f"forward {forward}", f"backward {backward}"] * 2
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_plan_that_cannot_run_raises() -> None:
    i = layer_inputs(3, 8, 8, 4, device=DEVICE)
    adapter = (i.lora_A, i.lora_E, i.lora_B)
    with pytest.raises(RuntimeError, match=r"forward plan 'delta' can't run this call: .*a weight was given"):
        svd_linear(i.x, i.weight, *adapter, backend="triton:delta")
    with pytest.raises(RuntimeError, match="forward plan 'one_pass' can't run this call: a base's output was given"):
        svd_linear_into(i.x.clone(), i.x, *adapter, backend="triton:one_pass")
    with pytest.raises(RuntimeError, match="forward plan 'delta' can't run this call"):
        explain(i.x, i.weight, *adapter, backend="triton:delta")


def test_what_it_cannot_compute_raises() -> None:
    i = layer_inputs(3, 8, 8, 4, torch.float64, device=DEVICE)
    with pytest.raises(RuntimeError, match=r"backend 'triton' can't run svd_linear on .*float64"):
        svd_linear(i.x, i.weight, i.lora_A, i.lora_E, i.lora_B, backend="triton")
