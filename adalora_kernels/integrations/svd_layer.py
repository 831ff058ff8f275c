"""PEFT's AdaLoRA linear layer with its forward fused into one call (AdaLoRA, arXiv 2303.10512, equation 3).

PEFT: base(x) + (drop(x) @ (A ⊙ E)ᵀ @ Bᵀ) · scaling / (ranknum + 1e-5), for each active adapter. Here the first adapter
and the frozen product are one call where the base's weight may be read directly; otherwise the base runs as it is and
the increment is added into its output in place.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft.tuners.adalora.layer import SVDLinear
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.pytorch_utils import Conv1D

from adalora_kernels.backends.select import Backend
from adalora_kernels.integrations.increment import (
    DROPOUTS,
    FACTORS,
    PLAIN,
    FusedIncrement,
    is_readable,
    may_keep_output,
    probability,
)
from adalora_kernels.ops.svd_linear import svd_linear
from adalora_kernels.ops.svd_linear_group import GroupedLayer

_READABLE_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


class GroupCall(NamedTuple):
    """What one layer's forward is made of.

    Attributes:
        layer: arguments of ``svd_linear_group``.
        dropout_p: 0 in evaluation.
        backend: as asked for.
        adapter: name of the one that is active.
        base: the layer's base, and its weight and bias.
    """

    layer: GroupedLayer
    dropout_p: float
    backend: str | Backend | None
    adapter: str
    base: tuple[nn.Module, Tensor, Tensor | None]


class FusedSVDLinear(FusedIncrement, SVDLinear):
    """What ``patch_model`` exchanges PEFT's ``SVDLinear`` for: the same state, other methods."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's: the base where adapters are disabled or merged, else also each active adapter's increment.

        Args:
            x: [..., K].
            args, kwargs: handed to the base layer, which is then called.

        Returns:
            [..., N] in the dtype that the base answers in.

        Raises:
            RuntimeError: this is a replica that ``nn.DataParallel`` made.
        """
        siblings = self.__dict__.get("_siblings")
        if siblings is not None and not args and not kwargs and not torch.compiler.is_compiling():
            output: Tensor | None = siblings.output(self, x)
            if output is not None:
                return output
        adapters = self._adapters_in_use()
        modules = self._modules
        base = modules["base_layer"]
        assert base is not None
        ours = adapters and is_readable(x) and self._foreign_part(adapters) is None
        if not ours or may_keep_output(base):
            # PEFT's addition into an output that somebody keeps is one that autograd follows.
            return super().forward(x, *args, **kwargs)
        weight = None
        if not args and not kwargs and base_obstacle(base) is None:
            weight = _readable_weight(base, x)
        if weight is None:
            return self._add_increments(base(x, *args, **kwargs), x, adapters)
        first, *others = adapters
        adapter = (modules[name]._parameters[first] for name in FACTORS)
        result = svd_linear(x, weight, *adapter, bias=base.bias, **self._increment_settings(first))
        return self._add_increments(result, x, others) if others else result

    def group_call(self, x: Tensor) -> GroupCall | None:
        """This layer's forward as a part of ``svd_linear_group``; None where it is anything else than one call."""
        modules = self._modules
        lora_A, lora_E, lora_B = (modules[name]._parameters for name in FACTORS)
        active = [name for name in self.active_adapters if name in lora_A]
        base = modules["base_layer"]
        if len(active) != 1 or self.disable_adapters or self.merged_adapters or base_obstacle(base) is not None:
            return None
        name = active[0]
        A, E, B, bias = lora_A[name], lora_E[name], lora_B[name], base._parameters.get("bias")
        dropout = modules["lora_dropout"]._modules[name]
        weight = _readable_weight(base, x)
        if weight is None or type(A) not in PLAIN or type(dropout) not in DROPOUTS:
            return None
        # Sharded or offloaded parameters are what they should be only within the layer's own call.
        here = all(t is None or t.device == x.device for t in (weight, bias, A, E, B))
        if not here or weight.shape != (B.shape[0], x.shape[-1]) or A.shape != (B.shape[1], x.shape[-1]):
            return None
        layer = GroupedLayer(weight, A, E, B, bias, None, self._increment_factor(name))
        return GroupCall(
            layer, probability(dropout), self.fused_backend, name, (base, base._parameters["weight"], bias)
        )

    def still_makes(self, call: GroupCall) -> bool:
        """Whether ``group_call`` would still give this, as it did for the x that the layer is now called with."""
        modules, name = self._modules, call.adapter
        base, weight, bias = call.base
        _, *factors = call.layer[:4]
        return (
            modules["base_layer"] is base
            and base._parameters["weight"] is weight
            and base._parameters.get("bias") is bias
            and all(modules[f]._parameters.get(name) is t for f, t in zip(FACTORS, factors, strict=True))
            and self.active_adapters == [name]
            and not (self.disable_adapters or self.merged_adapters)
            and self._increment_factor(name) == call.layer.scaling
            and probability(modules["lora_dropout"]._modules[name]) == call.dropout_p
            and base_obstacle(base) is None
        )

    def _weight_to_read(self) -> tuple[Tensor | None, str]:
        base = self._modules["base_layer"]
        assert base is not None
        obstacle = base_obstacle(base)
        return (_weight_as_n_k(base), "") if obstacle is None else (None, obstacle)

    def _left_to_peft(self) -> str | None:
        if may_keep_output(self._modules["base_layer"]):
            return "the base has forward hooks, which may keep its output"
        return super()._left_to_peft()


def base_obstacle(base: nn.Module) -> str | None:
    """Why the base must be called rather than its weight read; None where the weight says all that the base does."""
    if type(base) is not nn.Linear and type(base) is not Conv1D:
        return f"the base is a {type(base).__name__}"
    weight, bias = base._parameters.get("weight"), base._parameters.get("bias", base)
    if type(weight) is not nn.Parameter:
        return f"the base's weight is a {type(weight).__name__}"
    if bias is not None and type(bias) is not nn.Parameter:
        return "the base's bias is no plain parameter"
    if weight.is_meta or weight.dtype not in _READABLE_DTYPES or weight.layout is not torch.strided:
        return f"the base's weight is {weight.dtype}, {weight.layout}, on {weight.device}"
    if "forward" in base.__dict__ and getattr(base.__dict__["forward"], "__func__", None) is not type(base).forward:
        return "the base's forward was replaced on the instance"
    if base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks:
        return "the base has hooks"
    if _has_any_global_hook():
        return "hooks for all modules are registered"
    return None


def _readable_weight(base: nn.Module, x: Tensor) -> Tensor | None:
    """W [N, K]; None where the frozen product doesn't take x: then the base is called, so that its own error comes."""
    weight = _weight_as_n_k(base)
    if x.dtype != weight.dtype:
        autocast = torch.is_autocast_enabled(x.device.type)
        if not autocast or torch.float64 in (x.dtype, weight.dtype):
            return None
    return weight


def _weight_as_n_k(base: nn.Module) -> Tensor:
    weight = base._parameters["weight"]
    assert weight is not None
    return weight.t() if type(base) is Conv1D else weight


__all__ = ["FusedSVDLinear", "GroupCall", "base_obstacle"]
