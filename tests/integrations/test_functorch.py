"""torch.func's transforms of the layer and of the orthogonality term: right, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

from adalora_kernels import SVDLinear, compute_orth_regu, patch_model, svd_linear, svd_linear_group
from tests.integrations.small_models import batch, build


def _network(**options: Any) -> nn.Module:
    model = nn.Sequential(SVDLinear(8, 9, r=4, **options), nn.Tanh(), SVDLinear(9, 5, r=3, **options)).double()
    for layer in (model[0], model[2]):
        nn.init.normal_(layer.lora_E)
    return model


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def _loss(model: nn.Module) -> Callable[..., Tensor]:
    return lambda params, x: functional_call(model, params, (x,)).square().sum()


def test_gradients_of_each_sample() -> None:
    model, x = _network(), torch.randn(6, 3, 8, dtype=torch.float64)
    each = vmap(grad(_loss(model)), in_dims=(None, 0))(_parameters(model), x)
    for i, sample in enumerate(x):
        model.zero_grad()
        model(sample).square().sum().backward()
        for name, p in model.named_parameters():
            if name in each:
                torch.testing.assert_close(each[name][i], p.grad)


def test_jvp_and_vmap_of_layers_that_share_x() -> None:
    model, x = _network(), torch.randn(4, 3, 8, dtype=torch.float64)
    tangent = torch.randn_like(x)
    _, along = jvp(model, (x,), (tangent,))
    step = 1e-6
    torch.testing.assert_close(along, (model(x + step * tangent) - model(x - step * tangent)) / (2 * step))
    layer = model[0]
    one = (layer.weight, layer.lora_A, layer.lora_E, layer.lora_B, layer.bias)
    for y in vmap(lambda x: svd_linear_group(x, [one, one]))(x):
        torch.testing.assert_close(y, svd_linear(x, *one[:4], bias=layer.bias))


def test_a_patched_model_with_its_term() -> None:
    """Over bases that are called and bases that are read; the loss holds the orthogonality term."""
    model = patch_model(build("perceptron"))
    model.base_model.model.second.base_layer.register_forward_pre_hook(lambda *_: None)  # so it is called
    inputs = batch(model)
    model.base_model(**inputs).loss.backward()
    inner = model.base_model.model
    params = {name: p.detach().clone() for name, p in inner.named_parameters() if p.requires_grad}
    found = grad(lambda params: functional_call(inner, params, (), inputs).loss)(params)
    for name, p in inner.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(found[name], p.grad, rtol=1e-4, atol=1e-6)


def test_the_term_alone() -> None:
    model = _network()
    compute_orth_regu(model, 0.3).backward()
    found = grad(lambda params: functional_call(_Term(model), params, ()))(
        {f"model.{name}": p for name, p in _parameters(model).items()}
    )
    for name, p in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            torch.testing.assert_close(found[f"model.{name}"], p.grad)


class _Term(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self) -> Tensor:
        return compute_orth_regu(self.model, 0.3)


def test_a_backend_by_name_is_refused() -> None:
    model, x = _network(backend="native"), torch.randn(3, 8, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"backend: expected None or 'reference' under torch.func.*, got 'native'"):
        grad(_loss(model))(_parameters(model), x)
    model = _network(backend="reference")
    assert grad(_loss(model))(_parameters(model), x)["0.lora_A"].shape == (4, 8)


def test_a_second_derivative_is_refused() -> None:
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(_network()(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no kernel has second derivatives"):
        first.square().sum().backward()
