"""The increment of PEFT's AdaLoRA layers, added into the output of a base that runs as it is.

PEFT: result + (drop(x) @ (A ⊙ E)ᵀ @ Bᵀ) · scaling / (ranknum + 1e-5), for each active adapter. Here each is one call
that adds in place, in the dtype that the base answered in and without a copy of its output.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.adalora.layer import AdaLoraLayer
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from adalora_kernels.backends.select import Backend, Selection
from adalora_kernels.ops.explain import described, explain_layer
from adalora_kernels.ops.svd_linear import svd_linear_into

_Module: Any = nn.Module  # PEFT's classes, of which it is one base, are Any to the type checker
PLAIN = (Tensor, nn.Parameter)
DROPOUTS = (nn.Identity, nn.Dropout)
_INTO_OUTPUT = "increment added into the base's output"
FACTORS = ("lora_A", "lora_E", "lora_B")


class FusedIncrement(_Module, AdaLoraLayer):
    """What the fused layers share, whatever their base: PEFT's state, and the increment in one call.

    Its bases are those of PEFT's layers, in their order, or classes could not be exchanged in place.

    Attributes:
        fused_backend: as given to ``patch_model``.
    """

    fused_backend: str | Backend | None = None

    def _increment_settings(self, adapter: str) -> dict[str, Any]:
        """The keyword arguments of ``svd_linear`` for one adapter."""
        return {
            "scaling": self._increment_factor(adapter),
            "dropout_p": probability(self._modules["lora_dropout"]._modules[adapter]),
            "backend": self.fused_backend,
        }

    def _add_increments(self, result: Tensor, x: Tensor, adapters: list[str]) -> Tensor:
        """``result`` [..., N] with the increments of ``adapters`` for x [..., K], in its memory and dtype."""
        lora_A, lora_E, lora_B = (self._modules[name]._parameters for name in FACTORS)
        for name in adapters:
            adapter = (lora_A[name], lora_E[name], lora_B[name])
            result = svd_linear_into(result, x, *adapter, **self._increment_settings(name))
        return result

    def _adapters_in_use(self) -> list[str]:
        """Names of the adapters whose increments belong to the output.

        Raises:
            RuntimeError: this is a replica that ``nn.DataParallel`` made.
        """
        # Straight from the registries: look-ups of module attributes would cost as much as the launch.
        lora_A = self._modules["lora_A"]._parameters
        active = [name for name in self.active_adapters if name in lora_A]
        if not active and "_is_replica" in self.__dict__:
            raise RuntimeError(
                "nn.DataParallel: expected a model of one process, got a replica, whose parameters the rank budget "
                "can't follow. Run one process for each device: torchrun or accelerate launch, which use "
                "DistributedDataParallel. Or show the process one device: CUDA_VISIBLE_DEVICES=0"
            )
        return [] if self.disable_adapters or self.merged_adapters else active

    def _foreign_part(self, adapters: list[str]) -> str | None:
        """What of these adapters our kernels can't read (DTensors, foreign dropouts); None where they read all."""
        modules = self._modules
        lora_A, dropouts = modules["lora_A"]._parameters, modules["lora_dropout"]._modules
        for name in adapters:
            factor, dropout = lora_A[name], dropouts[name]
            if type(factor) not in PLAIN or factor.is_meta:
                return f"lora_A is a {type(factor).__name__} on {factor.device}"
            if type(dropout) not in DROPOUTS:
                return f"lora_dropout is a {type(dropout).__name__}"
        return None

    def _increment_factor(self, adapter: str) -> float:
        """c = scaling / (ranknum + 1e-5)."""
        return float(self.scaling[adapter] / (self._rank_constant(adapter) + 1e-5))

    def _rank_constant(self, adapter: str) -> float:
        """The initial rank of the layer, read from the device once for each value that ``ranknum`` is given."""
        ranknum = self._modules["ranknum"]._parameters[adapter]
        known: dict[str, tuple[Tensor, int, float]] | None = self.__dict__.get("_rank_constants")
        if known is None:  # torch.compile of torch 2.11 can't trace setdefault
            known = {}
            self._rank_constants = known
        entry = known.get(adapter)
        if entry is not None and torch.compiler.is_compiling():
            return float(entry[2])
        version = 0 if ranknum.is_inference() else ranknum._version
        if entry is None or entry[0] is not ranknum or entry[1] != version:
            entry = known[adapter] = (ranknum, version, float(ranknum.detach()))
        return float(entry[2])

    def _weight_to_read(self) -> tuple[Tensor | None, str]:
        """The frozen weight [N, K] that is read in the same call as the increment, or None and why it isn't."""
        return None, f"the base is a {type(self._modules['base_layer']).__name__}"

    def _left_to_peft(self) -> str | None:
        """Why PEFT's own forward runs in place of ours, whatever x is; None where ours does."""
        if is_replaced(self):
            return "its forward was replaced on the instance"
        return self._foreign_part([name for name in self.active_adapters if name in self.lora_A])

    def report(self) -> tuple[bool, str]:
        """Whether this layer's increment is ours, and why not, or how; for ``layer_report``."""
        if (reason := self._left_to_peft()) is not None:
            return False, reason
        weight, obstacle = self._weight_to_read()
        how = "base and increment in one call" if weight is not None else f"{_INTO_OUTPUT}: {obstacle}"
        together, _ = self._described_siblings()
        return True, f"{how}; {together}" if together else how

    def _described_siblings(self) -> tuple[str, Selection | None]:
        """With which siblings it is computed, or why alone; and what they run on, where they are one group."""
        siblings = self.__dict__.get("_siblings")
        found: tuple[str, Selection | None] = ("", None) if siblings is None else siblings.described(self)
        return found

    def explain_layer(self) -> tuple[str, str, str, str]:
        """Backend, plan, reason and configuration, for ``adalora_kernels.explain``."""
        if self.merged_adapters:
            return "torch", "base", "adapters are merged", ""
        adapters = self._adapters_in_use()
        if not adapters:
            return "torch", "base", "no adapter is active", ""
        if (reason := self._left_to_peft()) is not None:
            return "none", "PEFT's own", reason, ""
        adapter = [factors[adapters[0]] for factors in (self.lora_A, self.lora_E, self.lora_B)]
        weight, obstacle = self._weight_to_read()
        settings = self._increment_settings(adapters[0])
        together, of_group = self._described_siblings()
        selection = of_group or explain_layer(
            weight, *adapter, dropout_p=settings["dropout_p"], backend=settings["backend"]
        )
        plan, reasons = selection.plan, [selection.reason]
        if weight is None:
            plan = f"base, then {plan} into its output"
            reasons.insert(0, obstacle)
        if len(adapters) > 1:
            reasons.append(f"{len(adapters)} adapters are active, one call each")
        if together:
            reasons.append(together)
        return described(selection._replace(plan=plan, reason="; ".join(reasons)))


def probability(dropout: nn.Module) -> float:
    """That an element is dropped now: 0 in evaluation."""
    return dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0


def may_keep_output(base: nn.Module | None) -> bool:
    """Whether hooks see the base's output and may keep it."""
    return base is not None and bool(base._forward_hooks or _has_any_global_hook())


def is_readable(x: Tensor) -> bool:
    """Whether our kernels can read x: it is no DTensor, FakeTensor or meta tensor."""
    return type(x) in PLAIN and not x.is_meta


def is_replaced(layer: nn.Module) -> bool:
    """Whether a call of the layer runs another forward than its class's; accelerate's hooks keep it and call it."""
    own = layer.__dict__.get("_old_forward", layer.__dict__.get("forward"))
    return own is not None and getattr(own, "__func__", None) is not type(layer).forward


__all__ = [
    "DROPOUTS",
    "FACTORS",
    "PLAIN",
    "FusedIncrement",
    "is_readable",
    "is_replaced",
    "may_keep_output",
    "probability",
]
