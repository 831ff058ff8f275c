"""Layers that read the same x as one call: what the single calls give, in one node, and nothing for unused outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from adalora_kernels import svd_linear
from adalora_kernels.ops.importance import listen
from adalora_kernels.ops.svd_linear_group import GroupedLayer, svd_linear_group
from adalora_kernels.testing.inputs import layer_inputs
from adalora_kernels.testing.tolerances import assert_within_budget

CPU_BACKENDS = ("reference", "native")
NAMES = ("lora_A", "lora_E", "lora_B")


def group_inputs(
    dtype: torch.dtype = torch.float64,
    adapter_dtype: torch.dtype | None = None,
    leading: tuple[int, ...] = (20,),
    ranks: tuple[int, ...] = (12, 0, 5),
) -> tuple[Tensor, list[GroupedLayer], list[Tensor]]:
    """x, layers with N and R of their own, the second without bias and the last with a mask, and their gradients."""
    x = torch.randn(*leading, 33, dtype=torch.float64).to(dtype).requires_grad_()
    layers, grads = [], []
    for i, rank in enumerate(ranks):
        inputs = layer_inputs(1, 33, 16 + 7 * i, rank, dtype, adapter_dtype, bias=i != 1, seed=i)
        factors = (getattr(inputs, name).requires_grad_() for name in NAMES)
        mask = torch.arange(rank) % 3 != 1 if i == 2 else None
        layers.append(GroupedLayer(inputs.weight, *factors, inputs.bias, mask, 0.5 + i))
        grads.append(torch.randn(*leading, 16 + 7 * i, dtype=torch.float64).to(dtype))
    return x, layers, grads


def leaves_of(x: Tensor, layers: list[GroupedLayer]) -> list[Tensor]:
    return [x, *(getattr(layer, name) for layer in layers for name in NAMES)]


def singles(x: Tensor, layers: list[GroupedLayer], **options: Any) -> tuple[Tensor, ...]:
    return tuple(
        svd_linear(x, w, a, e, b, bias=bias, mask=mask, scaling=c, **options) for w, a, e, b, bias, mask, c in layers
    )


def results(call: Any, x: Tensor, layers: list[GroupedLayer], grads: list[Tensor], **options: Any) -> list[Tensor]:
    """Outputs, and the gradients of x and of every factor."""
    ys = call(x, layers, **options)
    return [*ys, *torch.autograd.grad(ys, leaves_of(x, layers), grads)]


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("leading", ((20,), (), (2, 3), (0,), (2, 0, 3)), ids=str)
def test_equals_the_single_calls(leading: tuple[int, ...], backend: str) -> None:
    inputs = group_inputs(leading=leading)
    found, expected = (results(call, *inputs, backend=backend) for call in (svd_linear_group, singles))
    for got, want in zip(found, expected, strict=True):
        assert got.shape == want.shape
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"),
    [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, torch.float32), (torch.float16, torch.float32)],
    ids=str,
)
def test_error_budget(dtype: torch.dtype, adapter_dtype: torch.dtype | None, backend: str) -> None:
    """Against fp64; what may be allowed is what the single layers of the reference do in the same dtype."""
    torch.manual_seed(0)
    x, layers, grads = group_inputs(dtype, adapter_dtype, leading=(64,), ranks=(12, 8, 16))
    found = results(svd_linear_group, x, layers, grads, backend=backend)
    same = results(singles, x, layers, grads, backend="reference")
    wide = [GroupedLayer(*(t.detach().double().requires_grad_() for t in layer[:4]), *_wide(layer)) for layer in layers]
    exact = results(singles, x.detach().double().requires_grad_(), wide, [g.double() for g in grads])
    for i, tensors in enumerate(zip(found, same, exact, strict=True)):
        assert_within_budget(str(i), *tensors)


def _wide(layer: GroupedLayer) -> tuple[Tensor | None, Tensor | None, float]:
    return None if layer.bias is None else layer.bias.double(), layer.mask, layer.scaling


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_one_node_that_saves_x_once(backend: str) -> None:
    x, layers, _ = group_inputs()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ys = svd_linear_group(x, layers, backend=backend)
    assert len({y.grad_fn for y in ys}) == 1
    assert sum(t.data_ptr() == x.data_ptr() for t in saved) == 1
    own = {t.data_ptr() for t in (x, *(t for layer in layers for t in layer[:6] if t is not None))}
    assert [tuple(t.shape) for t in saved if t.data_ptr() not in own and t.numel()] == [(20, 12), (20, 5)]


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_unused_outputs_get_no_gradient(backend: str) -> None:
    x, layers, grads = group_inputs()
    ys = svd_linear_group(x, layers, backend=backend)
    leaves = leaves_of(x, layers)
    found = torch.autograd.grad(ys[2], leaves, grads[2], allow_unused=True)
    expected = torch.autograd.grad(singles(x, layers)[2], leaves, grads[2], allow_unused=True)
    for got, want in zip(found, expected, strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_only_what_is_asked_for(backend: str) -> None:
    x, layers, grads = group_inputs()
    want = dict(zip(range(10), results(singles, x, layers, grads)[3:], strict=True))
    for i, leaf in enumerate(leaves_of(x, layers)):
        for other in leaves_of(x, layers):
            other.requires_grad_(other is leaf)
        ys = svd_linear_group(x, layers, backend=backend)
        of = [(y, g) for y, g in zip(ys, grads, strict=True) if y.requires_grad]
        (grad,) = torch.autograd.grad([y for y, _ in of], [leaf], [g for _, g in of])
        torch.testing.assert_close(grad, want[i], rtol=1e-12, atol=1e-12)


def test_bases_that_train() -> None:
    x, layers, grads = group_inputs()
    leaves = [t.requires_grad_() for layer in layers for t in (layer.weight, layer.bias) if t is not None]
    found, expected = (torch.autograd.grad(call(x, layers), leaves, grads) for call in (svd_linear_group, singles))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_gradcheck(backend: str) -> None:
    x, layers, _ = group_inputs(leading=(2, 2), ranks=(2, 0))
    leaves = [t for t in leaves_of(x, layers) if t.numel()]

    def call(x: Tensor, a: Tensor, e: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return svd_linear_group(x, [layers[0]._replace(lora_A=a, lora_E=e, lora_B=b), layers[1]], backend=backend)

    assert torch.autograd.gradcheck(call, leaves[:4])


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_dropout_draws_what_the_single_calls_draw(backend: str) -> None:
    inputs = group_inputs()
    runs = []
    for call in (svd_linear_group, singles):
        torch.manual_seed(5)
        runs.append(results(call, *inputs, backend=backend, dropout_p=0.4))
    torch.testing.assert_close(*runs, rtol=1e-12, atol=1e-12)
    evaluated = svd_linear_group(*inputs[:2], dropout_p=0.4, training=False)
    torch.testing.assert_close(evaluated, singles(*inputs[:2]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_autocast(dtype: torch.dtype) -> None:
    """Products in autocast's dtype, gradients in the parameters', wherever backward is called."""
    x, layers, grads = group_inputs(torch.float32)
    grads = [g.to(dtype) for g in grads]
    with torch.autocast("cpu", dtype=dtype):
        ys, want = svd_linear_group(x, layers), singles(x, layers)
        inside = torch.autograd.grad(ys, leaves_of(x, layers), grads, retain_graph=True)
    outside = torch.autograd.grad(ys, leaves_of(x, layers), grads)
    expected = torch.autograd.grad(want, leaves_of(x, layers), grads)
    assert all(torch.equal(a, b) and a.dtype == dtype for a, b in zip(ys, want, strict=True))
    for a, b, c in zip(inside, outside, expected, strict=True):
        assert torch.equal(a, b) and a.dtype == c.dtype == torch.float32
        torch.testing.assert_close(a, c, rtol=2e-2, atol=2e-2)


def test_graph_that_is_retained_and_checkpointed() -> None:
    x, layers, grads = group_inputs()
    ys = svd_linear_group(x, layers)
    leaves = leaves_of(x, layers)
    first = torch.autograd.grad(ys, leaves, grads, retain_graph=True)
    second = torch.autograd.grad(ys, leaves, grads)
    again = checkpoint(lambda x: svd_linear_group(x, layers), x, use_reentrant=False)
    for other in (second, torch.autograd.grad(again, leaves, grads)):
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    for y in svd_linear_group(x, layers):
        y += 1  # what a Function returns must allow it


def test_fullgraph_equals_eager() -> None:
    inputs = group_inputs(torch.float32)
    compiled = torch.compile(svd_linear_group, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(results(compiled, *inputs), results(svd_linear_group, *inputs))


def test_bad_input_names_the_layer() -> None:
    x, layers, _ = group_inputs()
    with pytest.raises(ValueError, match="layers: expected at least one layer, got none"):
        svd_linear_group(x, [])
    with pytest.raises(TypeError, match=r"layers\[1\]\.scaling: expected a number, got 'x'"):
        svd_linear_group(x, [layers[0], layers[1]._replace(scaling="x")])  # type: ignore[arg-type]
    for strange in (3, [3], layers[0]):  # the last is a layer, not a list of them
        with pytest.raises(TypeError, match=r"layers: expected \('weight', 'lora_A', .* of each layer, got"):
            svd_linear_group(x, strange)
    wrong = layers[1]._replace(lora_A=torch.zeros(0, 7, dtype=torch.float64))
    with pytest.raises(
        ValueError, match=r"layers\[1\]\.lora_A: expected \[R, 33\] \(x has 33 features\), got \[0, 7\]"
    ):
        svd_linear_group(x, [layers[0], wrong])
    with pytest.raises(TypeError, match=r"layers\[0\]\.weight: expected a tensor, got NoneType"):
        svd_linear_group(x, [layers[0]._replace(weight=None)])
    with pytest.raises(ValueError, match=r"^dropout_p: expected a probability"):
        svd_linear_group(x, layers, dropout_p=2.0)
    with pytest.raises(TypeError, match=r"^x: expected a 16-, 32- or 64-bit floating-point tensor"):
        svd_linear_group(torch.zeros(2, 33, dtype=torch.int64), layers)


def test_gradients_are_handed_to_the_layers_sinks() -> None:
    """As the single layer's backward does; a layer whose output isn't used has none to hand over."""

    class Recording:
        def __init__(self) -> None:
            self.taken: list[tuple[Tensor, ...]] = []

        def take_layer(self, *tensors: Tensor) -> None:
            self.taken.append(tensors)

    x, layers, grads = group_inputs()
    recorded = Recording()
    for layer in layers:
        listen(layer.lora_A, recorded)
    ys = svd_linear_group(x, layers)
    torch.autograd.backward([ys[0], ys[2]], [grads[0], grads[2]])
    assert [id(lora_A) for lora_A, *_ in recorded.taken] == [id(layers[0].lora_A), id(layers[2].lora_A)]
    for lora_A, *handed, begun in recorded.taken:
        assert begun is None  # nobody takes it over within the kernel
        layer = next(layer for layer in layers if layer.lora_A is lora_A)
        for gradient, factor in zip(handed, layer[1:4], strict=True):
            torch.testing.assert_close(gradient, factor.grad)
