"""PEFT's AdaLoRA linear layer with its forward fused into one call (AdaLoRA, arXiv 2303.10512, equation 3).

PEFT: base(x) + (drop(x) @ (A ⊙ E)ᵀ @ Bᵀ) · scaling / (ranknum + 1e-5), for each active adapter. Here the first adapter
and the frozen product are one call where the base's weight may be read directly; otherwise the base runs as it is and
the increment is added into its output in place.
"""

from __future__ import annotations

from types import MethodType
from typing import Any, NamedTuple

import torch
from peft.tuners.adalora.layer import SVDLinear
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.pytorch_utils import Conv1D

from adalora_kernels.backends.select import Backend
from adalora_kernels.ops.explain import described, explain_layer
from adalora_kernels.ops.svd_linear import svd_linear, svd_linear_into
from adalora_kernels.ops.svd_linear_group import GroupedLayer

_READABLE_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
_PLAIN = (Tensor, nn.Parameter)
_DROPOUTS = (nn.Identity, nn.Dropout)
_FACTORS = ("lora_A", "lora_E", "lora_B")
_FORWARD_ATTRIBUTES = ("forward", "_old_forward")


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


class FusedSVDLinear(SVDLinear):
    """What ``patch_model`` exchanges PEFT's ``SVDLinear`` for: the same state, other methods."""

    fused_backend: str | Backend | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's: the base where adapters are disabled or merged, else also each active adapter's increment.

        Args:
            x: [..., K].
            args, kwargs: handed to the base layer, which is then called.

        Returns:
            [..., N] in the dtype that the base answers in.
        """
        siblings = self.__dict__.get("_siblings")
        if siblings is not None and not args and not kwargs and not torch.compiler.is_compiling():
            output: Tensor | None = siblings.output(self, x)
            if output is not None:
                return output
        # Straight from the registries: twenty look-ups of module attributes would cost as much as the launch.
        modules = self._modules
        lora_A, lora_E, lora_B = (modules[name]._parameters for name in _FACTORS)
        dropouts = modules["lora_dropout"]._modules
        active = [name for name in self.active_adapters if name in lora_A]
        readable = type(x) in _PLAIN and not x.is_meta
        for name in active:
            readable = readable and type(lora_A[name]) in _PLAIN and type(dropouts[name]) in _DROPOUTS
        if not active or not readable or self.disable_adapters or self.merged_adapters:
            # What our kernels can't read (DTensors, FakeTensors, meta tensors, foreign dropouts) is left to PEFT.
            return super().forward(x, *args, **kwargs)
        base = modules["base_layer"]
        if base is not None and (base._forward_hooks or _has_any_global_hook()):
            # A hook may keep the base's output, and PEFT's own addition into it is one that autograd follows.
            return super().forward(x, *args, **kwargs)
        weight = None
        if not args and not kwargs and base_obstacle(base) is None:
            weight = _readable_weight(base, x)
        result: Tensor | None = None
        for name in active:
            adapter = (lora_A[name], lora_E[name], lora_B[name])
            dropout = dropouts[name]
            settings: dict[str, Any] = {
                "scaling": self._increment_factor(name),
                "dropout_p": _probability(dropout),
                "backend": self.fused_backend,
            }
            if result is None and weight is not None:
                result = svd_linear(x, weight, *adapter, bias=base.bias, **settings)
            else:
                base_output = base(x, *args, **kwargs) if result is None else result
                result = svd_linear_into(base_output, x, *adapter, **settings)
        assert result is not None
        return result

    def group_call(self, x: Tensor) -> GroupCall | None:
        """This layer's forward as a part of ``svd_linear_group``; None where it is anything else than one call."""
        modules = self._modules
        lora_A, lora_E, lora_B = (modules[name]._parameters for name in _FACTORS)
        active = [name for name in self.active_adapters if name in lora_A]
        base = modules["base_layer"]
        if len(active) != 1 or self.disable_adapters or self.merged_adapters or base_obstacle(base) is not None:
            return None
        name = active[0]
        A, E, B, bias = lora_A[name], lora_E[name], lora_B[name], base._parameters.get("bias")
        dropout = modules["lora_dropout"]._modules[name]
        weight = _readable_weight(base, x)
        if weight is None or type(A) not in _PLAIN or type(dropout) not in _DROPOUTS:
            return None
        # Sharded or offloaded parameters are what they should be only within the layer's own call.
        here = all(t is None or t.device == x.device for t in (weight, bias, A, E, B))
        if not here or weight.shape != (B.shape[0], x.shape[-1]) or A.shape != (B.shape[1], x.shape[-1]):
            return None
        layer = GroupedLayer(weight, A, E, B, bias, None, self._increment_factor(name))
        return GroupCall(
            layer, _probability(dropout), self.fused_backend, name, (base, base._parameters["weight"], bias)
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
            and all(modules[f]._parameters.get(name) is t for f, t in zip(_FACTORS, factors, strict=True))
            and self.active_adapters == [name]
            and not (self.disable_adapters or self.merged_adapters)
            and self._increment_factor(name) == call.layer.scaling
            and _probability(modules["lora_dropout"]._modules[name]) == call.dropout_p
            and base_obstacle(base) is None
        )

    def _increment_factor(self, adapter: str) -> float:
        return float(self.scaling[adapter] / (self._rank_constant(adapter) + 1e-5))

    def explain_layer(self) -> tuple[str, str, str, str]:
        """Backend, plan, reason and configuration, for ``adalora_kernels.explain``."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if not active or self.disable_adapters or self.merged_adapters:
            return "torch", "base", "adapters are merged" if self.merged_adapters else "no adapter is active", ""
        adapter = [factors[active[0]] for factors in (self.lora_A, self.lora_E, self.lora_B)]
        if self._modules["base_layer"]._forward_hooks or _has_any_global_hook():
            return "none", "PEFT's own", "the base has forward hooks, which may keep its output", ""
        base = self._modules["base_layer"]
        assert base is not None
        obstacle = base_obstacle(base)
        weight = None if obstacle else _weight_as_n_k(base)
        dropout = self.lora_dropout[active[0]]
        selection = explain_layer(weight, *adapter, dropout_p=_probability(dropout), backend=self.fused_backend)
        if obstacle is not None:
            plan = f"base, then {selection.plan} into its output"
            selection = selection._replace(plan=plan, reason=f"{obstacle}; {selection.reason}")
        return described(selection)

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As PEFT's, with ``ranknum`` frozen: PEFT ≥ 0.21 makes it trainable over a 16-bit base."""
        super().update_layer(adapter_name, *args, **kwargs)
        self.ranknum[adapter_name].requires_grad_(False)

    def _rank_constant(self, adapter: str) -> float:
        """The initial rank of the layer, read from the device once for each value that ``ranknum`` is given."""
        ranknum = self._modules["ranknum"]._parameters[adapter]
        known = self.__dict__.setdefault("_rank_constants", {})
        entry = known.get(adapter)
        if entry is not None and torch.compiler.is_compiling():
            return float(entry[2])
        version = 0 if ranknum.is_inference() else ranknum._version
        if entry is None or entry[0] is not ranknum or entry[1] != version:
            entry = known[adapter] = (ranknum, version, float(ranknum.detach()))
        return float(entry[2])


def _probability(dropout: nn.Module) -> float:
    """That an element is dropped now: 0 in evaluation."""
    return dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0


def base_obstacle(base: nn.Module) -> str | None:
    """Why the base must be called rather than its weight read; None where the weight says all that the base does."""
    if type(base) is not nn.Linear and type(base) is not Conv1D:
        return f"the base is a {type(base).__name__}"
    weight = base._parameters.get("weight")
    if type(weight) is not nn.Parameter:
        return f"the base's weight is a {type(weight).__name__}"
    if weight.is_meta or weight.dtype not in _READABLE_DTYPES or weight.layout is not torch.strided:
        return f"the base's weight is {weight.dtype}, {weight.layout}, on {weight.device}"
    if "forward" in base.__dict__:
        return "the base's forward was replaced on the instance"
    if base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks:
        return "the base has hooks"
    if _has_any_global_hook():
        return "hooks for all modules are registered"
    return None


def fuse_layer(layer: SVDLinear, backend: str | Backend | None) -> None:
    """Exchange the class of one layer in place, also where accelerate froze PEFT's forward on the instance."""
    if type(layer) is FusedSVDLinear:
        layer.fused_backend = backend
        return
    layer.__class__ = FusedSVDLinear
    layer.fused_backend = backend
    _rebind(layer, SVDLinear, FusedSVDLinear)
    thawed = [name for name, ranknum in layer.ranknum.items() if ranknum.requires_grad]
    layer._thawed_ranknums = thawed
    for name in layer.ranknum:
        layer.ranknum[name].requires_grad_(False)
        if not layer.ranknum[name].is_meta:
            layer._rank_constant(name)


def restore_layer(layer: FusedSVDLinear) -> None:
    """Undo ``fuse_layer``, and what links the layer to its siblings."""
    if (siblings := layer.__dict__.get("_siblings")) is not None:
        siblings.unlink()
    for name in layer.__dict__.pop("_thawed_ranknums", ()):
        if name in layer.ranknum:
            layer.ranknum[name].requires_grad_(True)
    for attribute in ("fused_backend", "_rank_constants"):
        layer.__dict__.pop(attribute, None)
    layer.__class__ = SVDLinear
    _rebind(layer, FusedSVDLinear, SVDLinear)


def _rebind(layer: nn.Module, old: type[nn.Module], new: type[nn.Module]) -> None:
    for attribute in _FORWARD_ATTRIBUTES:
        frozen = layer.__dict__.get(attribute)
        if isinstance(frozen, MethodType) and frozen.__func__ is old.forward:
            setattr(layer, attribute, MethodType(new.forward, layer))


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


__all__ = ["FusedSVDLinear", "GroupCall", "base_obstacle", "fuse_layer", "restore_layer"]
