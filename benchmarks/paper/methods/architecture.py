"""Where each architecture keeps what the methods change: adapted matrices, sub-layers, norms, and the task's head."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn


class Architecture(NamedTuple):
    """Paths of an architecture's modules, as regular expressions that match the whole path.

    Attributes:
        matrices: what LoRA and AdaLoRA adapt: all of attention and of the feed-forward part.
        projections: the last linear layer of each sub-layer, behind which Houlsby's adapters stand.
        norms: the LayerNorm behind each feed-forward part, where Pfeiffer's adapters stand.
    """

    matrices: str
    projections: str
    norms: str


ARCHITECTURES = {
    "deberta-v2": Architecture(
        r".*\.(query_proj|key_proj|value_proj|attention\.output\.dense|intermediate\.dense|\d+\.output\.dense)",
        r".*\.(attention\.output\.dense|\d+\.output\.dense)",
        r".*\.\d+\.output\.LayerNorm",
    ),
    "bart": Architecture(
        r".*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)",
        r".*\.(self_attn\.out_proj|fc2)",
        r".*\.final_layer_norm",
    ),
}


def architecture_of(model: nn.Module) -> Architecture:
    """That of a transformers model.

    Raises:
        ValueError: an architecture that is not in the table.
    """
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if kind not in ARCHITECTURES:
        raise ValueError(f"model: expected one of {', '.join(ARCHITECTURES)}, got {kind}")
    return ARCHITECTURES[kind]


def heads(model: nn.Module) -> list[str]:
    """The children that belong to the task and not to the pretrained model, and that share nothing with it."""
    prefix: Any = model.base_model_prefix
    base = getattr(model, prefix)
    pretrained = set(map(id, base.parameters()))
    return [
        name
        for name, child in model.named_children()
        if child is not base and any(id(p) not in pretrained for p in child.parameters())
    ]


__all__ = ["ARCHITECTURES", "Architecture", "architecture_of", "heads"]
