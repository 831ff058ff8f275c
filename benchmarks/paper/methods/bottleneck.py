"""Houlsby's and Pfeiffer's adapters: h + W_up σ(W_down h), a bottleneck beside the frozen layers.

Houlsby et al. (arXiv 1902.00751) put one behind each sub-layer's projection, ahead of the residual sum: two in a layer.
Pfeiffer et al. (arXiv 2005.00247) put one in a layer, behind the feed-forward part's LayerNorm. The AdaLoRA paper calls
them HAdapter and PAdapter; its parameter counts are those of adapters alone, with the LayerNorms frozen.
"""

from __future__ import annotations

import re

from torch import Tensor, nn

INITIAL_STD = 1e-3  # of the weights: the adapted model starts near the frozen one


class Bottleneck(nn.Module):
    """h + W_up · relu(W_down · h).

    Args:
        features: size of h.
        width: size of the bottleneck.
    """

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(features, width), nn.Linear(width, features)
        for linear in (self.down, self.up):
            nn.init.normal_(linear.weight, std=INITIAL_STD)
            nn.init.zeros_(linear.bias)

    def forward(self, h: Tensor) -> Tensor:
        """As the class says; h: [..., features]."""
        return h + self.up(self.down(h).relu())


def insert(model: nn.Module, places: str, width: int) -> None:
    """Put a bottleneck behind every module whose path matches ``places``, in place.

    Args:
        model: its modules there are ``nn.Linear`` or ``nn.LayerNorm``.
        places: regular expression that must match the whole path.
        width: of each bottleneck.

    Raises:
        ValueError: no path matches.
    """
    found = [(name, module) for name, module in model.named_modules() if re.fullmatch(places, name)]
    if not found:
        raise ValueError(f"model: expected modules at {places!r}, found none in {type(model).__name__}")
    for name, module in found:
        features = module.out_features if isinstance(module, nn.Linear) else module.normalized_shape[0]
        adapter = Bottleneck(features, width).to(module.weight.device, module.weight.dtype)
        model.set_submodule(name, nn.Sequential(module, adapter))


__all__ = ["Bottleneck", "insert"]
