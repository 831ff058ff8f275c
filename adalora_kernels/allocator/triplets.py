"""Finding a model's singular triplets by the names of its parameters, whoever built the layers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from adalora_kernels.reference.importance import TripletLayout


@dataclass(frozen=True)
class Triplet:
    """The adapter of one layer.

    Attributes:
        name: path of the layer in the model, such as "encoder.layer.0.query".
        parameter_names: the full names of A, E and B in ``model.named_parameters()``.
        lora_A, lora_E, lora_B: Q [R, K], Λ [R, 1], P [N, R].
    """

    name: str
    parameter_names: tuple[str, str, str]
    lora_A: nn.Parameter
    lora_E: nn.Parameter
    lora_B: nn.Parameter

    @property
    def parameters(self) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
        """A, E, B."""
        return self.lora_A, self.lora_E, self.lora_B

    @property
    def shape(self) -> tuple[int, int, int]:
        """(R, K, N)."""
        return self.lora_A.shape[0], self.lora_A.shape[1], self.lora_B.shape[0]


def find_triplets(model: nn.Module, adapter: str | None = None) -> list[Triplet]:
    """Every layer of ``model`` that holds lora_A, lora_E and lora_B, in the order of its parameters.

    Both the original's names (``path.lora_A``) and PEFT's (``path.lora_A.adapter``) are read.

    Args:
        model: any module.
        adapter: with PEFT's names, the adapter to take, matched exactly; None takes those that train, or all where
            none does.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found: list[Triplet] = []
    seen: set[int] = set()
    for name, lora_A in parameters.items():
        parts = name.split(".")
        if "lora_A" not in parts:
            continue
        at = len(parts) - 1 - parts[::-1].index("lora_A")
        suffix = parts[at + 1 :]
        if adapter is not None and suffix and suffix != adapter.split("."):
            continue
        name_E, name_B = (".".join([*parts[:at], kind, *suffix]) for kind in ("lora_E", "lora_B"))
        lora_E, lora_B = parameters.get(name_E), parameters.get(name_B)
        if lora_E is None or lora_B is None or id(lora_E) in seen:  # a tied layer counts once
            continue
        seen.add(id(lora_E))
        found.append(Triplet(".".join(parts[:at]), (name, name_E, name_B), lora_A, lora_E, lora_B))
    trained = [t for t in found if any(p.requires_grad for p in t.parameters)]
    return trained if adapter is None and trained else found


def layout_of(triplets: list[Triplet]) -> TripletLayout:
    """Where these triplets lie in flat averages and scores."""
    return TripletLayout(tuple(t.shape for t in triplets))


__all__ = ["Triplet", "find_triplets", "layout_of"]
