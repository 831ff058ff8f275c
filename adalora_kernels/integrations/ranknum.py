"""``ranknum``, the initial rank of a layer, which PEFT keeps as a parameter: a constant, and so it stays frozen here.

From PEFT 0.21 on each cast of an adapter, to the dtype of a 16-bit or fp64 base or back to fp32, leaves it trainable:
it drifts with the optimizer's steps, and since it isn't saved, a loaded adapter has another increment.
"""

from __future__ import annotations

from typing import Any

from peft.tuners.adalora.layer import AdaLoraLayer
from torch import nn


class FrozenParameterDict(nn.ParameterDict):
    """What the dict that holds ``ranknum`` by adapter is exchanged for: what is put into it doesn't train."""

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        self[key].requires_grad_(False)


def is_frozen(layer: AdaLoraLayer) -> bool:
    """Whether ``freeze_ranknum`` was here."""
    return type(layer.ranknum) is FrozenParameterDict


def freeze_ranknum(layer: AdaLoraLayer) -> None:
    """Freeze the layer's ``ranknum`` now and whenever PEFT casts it."""
    if not is_frozen(layer):
        layer.ranknum.__class__ = FrozenParameterDict
        layer._thawed_ranknums = [name for name, ranknum in layer.ranknum.items() if ranknum.requires_grad]
        layer.ranknum.requires_grad_(False)


def release_ranknum(layer: AdaLoraLayer) -> None:
    """Undo ``freeze_ranknum``."""
    if is_frozen(layer):
        layer.ranknum.__class__ = nn.ParameterDict
        for name in layer.__dict__.pop("_thawed_ranknums"):
            if name in layer.ranknum:
                layer.ranknum[name].requires_grad_(True)


__all__ = ["FrozenParameterDict", "freeze_ranknum", "is_frozen", "release_ranknum"]
