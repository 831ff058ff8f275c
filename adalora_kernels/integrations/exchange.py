"""The exchange of classes in place: which of PEFT's AdaLoRA layers have a fused class, and the way there and back."""

from __future__ import annotations

from types import MethodType
from typing import TypeGuard

from peft.tuners.adalora.layer import AdaLoraLayer, SVDLinear
from torch import nn

from adalora_kernels.backends.select import Backend
from adalora_kernels.integrations.increment import FusedIncrement
from adalora_kernels.integrations.quantized import QUANTIZED
from adalora_kernels.integrations.ranknum import freeze_ranknum, release_ranknum
from adalora_kernels.integrations.svd_layer import FusedSVDLinear

FUSED: dict[type, type[FusedIncrement]] = {SVDLinear: FusedSVDLinear, **QUANTIZED}
_PEFTS = {fused: peft for peft, fused in FUSED.items()}
_FORWARD_ATTRIBUTES = ("forward", "_old_forward")


def is_fused(module: nn.Module) -> TypeGuard[FusedIncrement]:
    """Whether the module is a layer whose class was exchanged for ours."""
    return type(module) in _PEFTS


def can_be_fused(module: nn.Module) -> bool:
    """Whether the module is a layer of PEFT's for which there is a fused class."""
    return type(module) in FUSED


def fuse_layer(layer: AdaLoraLayer, backend: str | Backend | None) -> None:
    """Exchange the class of one layer in place, also where accelerate froze PEFT's forward on the instance.

    A layer without a fused class keeps its own; its ``ranknum`` is frozen in any case. A layer that is fused already
    takes the backend.
    """
    freeze_ranknum(layer)
    if can_be_fused(layer):
        peft = type(layer)
        layer.__class__ = FUSED[peft]
        _rebind(layer, peft, FUSED[peft])
        for name, ranknum in layer.ranknum.items():
            if not ranknum.is_meta:
                layer._rank_constant(name)
    if is_fused(layer):
        layer.fused_backend = backend


def restore_layer(layer: AdaLoraLayer) -> None:
    """Undo ``fuse_layer``, and what links the layer to its siblings."""
    release_ranknum(layer)
    if not is_fused(layer):
        return
    if (siblings := layer.__dict__.get("_siblings")) is not None:
        siblings.unlink()
    for attribute in ("fused_backend", "_rank_constants"):
        layer.__dict__.pop(attribute, None)
    fused = type(layer)
    layer.__class__ = _PEFTS[fused]
    _rebind(layer, fused, _PEFTS[fused])


def _rebind(layer: nn.Module, old: type[nn.Module], new: type[nn.Module]) -> None:
    for attribute in _FORWARD_ATTRIBUTES:
        frozen = layer.__dict__.get(attribute)
        if isinstance(frozen, MethodType) and frozen.__func__ is old.forward:
            setattr(layer, attribute, MethodType(new.forward, layer))


__all__ = ["FUSED", "can_be_fused", "fuse_layer", "is_fused", "restore_layer"]
