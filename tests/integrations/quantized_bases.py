"""Frozen bases that aren't a plain weight: GPTQ's interface on a CPU, and a float8 weight with a scale for each row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.adalora import model as peft_model_module
from torch import Tensor, nn

from tests.integrations.one_layer import adapted

_FLOAT8 = torch.float8_e4m3fn


class PackedLinear(nn.Module):
    """A base with the interface of GPTQ's layers: packed 4-bit columns in ``qweight``, ``scales``, no ``weight``.

    The real ones (gptqmodel) need a CUDA build of torch to be imported.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().float().t()  # [K, N], as GPTQ packs it along K
        scales = weight.abs().amax(0) / 7
        levels = (weight / scales).round().clamp(-8, 7).to(torch.int32) + 8
        shifts = torch.arange(0, 32, 4, dtype=torch.int32)
        packed = (levels.view(-1, 8, self.out_features) << shifts[None, :, None]).sum(1, dtype=torch.int32)
        self.register_buffer("qweight", packed)
        self.register_buffer("scales", scales.to(linear.weight.dtype))
        self.register_buffer("shifts", shifts)
        self.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        levels = (self.qweight[:, None, :] >> self.shifts[None, :, None]) & 15
        weight = (levels.reshape(self.in_features, self.out_features) - 8).to(x.dtype) * self.scales.to(x.dtype)
        return x @ weight + self.bias


def adapted_packed(linear: nn.Linear, **settings: Any) -> PeftModel:
    """As PEFT does over GPTQ: it asks gptqmodel, or AutoGPTQ before, for the class of the base."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("get_gptqmodel_quant_linear", "get_auto_gptq_quant_linear"):
            patch.setattr(peft_model_module, name, lambda *_, **__: PackedLinear, raising=False)
        return adapted(PackedLinear(linear), **settings)


class _ScaledMM(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scales)
        x_scales = x.abs().amax(1, keepdim=True).float().clamp(min=1e-12) / torch.finfo(_FLOAT8).max
        x_float8 = (x.float() / x_scales).to(_FLOAT8)
        return torch._scaled_mm(x_float8, weight.t(), x_scales, scales.t(), out_dtype=torch.bfloat16)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None, None]:
        weight, scales = ctx.saved_tensors
        return (grad_y.float() @ (weight.float() * scales)).to(grad_y.dtype), None, None


class Float8Linear(nn.Linear):
    """W [N, K] in float8 with a scale for each row; x is rounded to float8, with a scale for each token."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().float()
        scales = weight.abs().amax(1, keepdim=True) / torch.finfo(_FLOAT8).max
        self.weight = nn.Parameter((weight / scales).to(_FLOAT8), requires_grad=False)
        self.register_buffer("scales", scales)
        self.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y = _ScaledMM.apply(x.reshape(-1, self.in_features), self.weight, self.scales)
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features) + self.bias
