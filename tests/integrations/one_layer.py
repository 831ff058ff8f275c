"""A model of one layer over any base under PEFT's AdaLoRA, and what is compared between its two copies."""

from __future__ import annotations

import copy
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from adalora_kernels.integrations import increment, svd_layer
from adalora_kernels.testing.tolerances import assert_within_budget

K, N = 64, 48


class OneLayer(nn.Module):
    """Calls ``q``, its only child."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.q = base

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.q(x, **kwargs)


def linear(dtype: torch.dtype = torch.float32) -> nn.Linear:
    """The same one at each call."""
    torch.manual_seed(0)
    return nn.Linear(K, N).to(dtype)


def adapted(
    base: nn.Module, *, autocast_adapter_dtype: bool = True, flag: str | None = None, **settings: Any
) -> PeftModel:
    """A model of that base under AdaLoRA, with an increment of the size of the base's output.

    Args:
        base: with K inputs.
        autocast_adapter_dtype: as in ``get_peft_model``.
        flag: what transformers sets on a quantised model, "is_loaded_in_8bit" for one.
        settings: of ``AdaLoraConfig``.
    """
    model = OneLayer(base)
    if flag is not None:
        setattr(model, flag, True)
    config = AdaLoraConfig(**{"target_modules": ["q"], "total_step": 9, "init_r": 4, "target_r": 2, **settings})
    peft_model = get_peft_model(model, config, autocast_adapter_dtype=autocast_adapter_dtype)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in peft_model.named_parameters():
        if parameter.dtype.itemsize == 1 and ("lora_" in name or "ranknum" in name):
            parameter.data = parameter.data.float()  # PEFT 0.18 takes over the dtype of a float8 base
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return peft_model.train()


def layer_of(model: PeftModel) -> nn.Module:
    return model.get_base_model().q


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 5, K, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()


def results(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output, and the gradients of x and the adapter."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = model(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.dtype))
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and "lora_" in name}
    return {"y": y.detach(), "x": x.grad, **grads}


def expression(model: PeftModel, x: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """As ``results``: PEFT's formula with its products in ``dtype``, upon what the base itself answers to x."""
    layer = layer_of(model)
    x = x.detach().clone().requires_grad_()
    answer = layer.base_layer(x)
    A, E, B = (p["default"].detach().double().requires_grad_() for p in (layer.lora_A, layer.lora_E, layer.lora_B))
    inner = x.detach().to(dtype).requires_grad_()
    c = layer.scaling["default"] / (layer.ranknum["default"].item() + 1e-5)
    y = answer.detach().to(dtype) + inner @ (A.to(dtype) * E.to(dtype)).T @ B.to(dtype).T * c
    grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(answer.dtype)
    answer.backward(grad_y)
    y.backward(grad_y.to(dtype))
    named = {f"base_model.model.q.lora_{n}.default": p.grad for n, p in (("A", A), ("E", E), ("B", B))}
    return {"y": y.detach(), "x": x.grad.to(dtype) + inner.grad, **named}


def assert_same_results(ours: PeftModel, theirs: PeftModel, x: Tensor) -> None:
    """Outputs in the dtype of the base's; each result within the error budget, of PEFT's and of its formula.

    In 16 bits PEFT's products over fp32 adapters are in fp32 and ours in the dtype of x, as over any base. There the
    budget counts from the formula in that dtype, and from PEFT's own results with the norm of the error.
    """
    exact, plain = (expression(copy.deepcopy(theirs), x, dtype) for dtype in (torch.float64, x.dtype))
    expected, actual = results(theirs, x), results(ours, x)
    assert actual.keys() == expected.keys() == exact.keys()
    assert actual["y"].dtype == actual["x"].dtype == x.dtype
    for name, value in actual.items():
        assert_within_budget(name, value, plain[name].to(value.dtype), exact[name])
        error, allowance = ((found.double() - exact[name]).norm() for found in (value, expected[name]))
        rounding = torch.finfo(x.dtype).eps * exact[name].norm()
        assert error <= 2 * allowance + rounding, f"{name}: error {error:.2e}, PEFT's {allowance:.2e}"


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the fused functions that layers call, in turn."""
    calls: list[str] = []

    def count(module: ModuleType, name: str) -> None:
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **kwargs: calls.append(name) or function(*args, **kwargs))

    count(svd_layer, "svd_linear")
    count(increment, "svd_linear_into")
    return calls
