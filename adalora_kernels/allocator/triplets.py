"""Finding a model's singular triplets by the names of its parameters, whoever built the layers."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter, getitem
from typing import Any

from torch import Tensor, nn

from adalora_kernels.reference.importance import TripletLayout

Slot = tuple[dict[str, Any], str]
"""Where a module keeps a parameter: its registry, and the name in it."""


@dataclass(frozen=True)
class Triplet:
    """The adapter of one layer.

    It holds the places of its parameters rather than the parameters, which PEFT, ``load_state_dict(assign=True)`` and
    others replace.

    Attributes:
        name: path of the layer in the model, such as "encoder.layer.0.query".
        parameter_names: the full names of A, E and B in ``model.named_parameters()``.
        slots: where A, E and B are kept.
    """

    name: str
    parameter_names: tuple[str, str, str]
    slots: tuple[Slot, Slot, Slot]

    @property
    def parameters(self) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
        """A, E, B as they are now."""
        (a, i), (e, j), (b, k) = self.slots
        return a[i], e[j], b[k]

    @property
    def lora_A(self) -> nn.Parameter:
        """Q [R, K]."""
        return self.parameters[0]

    @property
    def lora_E(self) -> nn.Parameter:
        """Λ [R, 1]."""
        return self.parameters[1]

    @property
    def lora_B(self) -> nn.Parameter:
        """P [N, R]."""
        return self.parameters[2]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(R, K, N)."""
        # ZeRO-3 leaves parameters empty, and notes their shape.
        a, b = (getattr(p, "ds_shape", p.shape) for p in (self.lora_A, self.lora_B))
        return a[0], a[1], b[0]


class Lookup:
    """Some parameters by where they are kept, as they are at each call.

    A step comes to them when its activations have emptied the caches. Looked up by one loop of the interpreter's own,
    they are waited for side by side.
    """

    def __init__(self, slots: Sequence[Slot]) -> None:
        self._registries = [registry for registry, _ in slots]
        self._keys = [key for _, key in slots]

    def __call__(self) -> list[nn.Parameter]:
        """The parameters, in the order of their slots."""
        return list(map(getitem, self._registries, self._keys))


def find_triplets(model: nn.Module, adapter: str | None = None) -> list[Triplet]:
    """Every layer of ``model`` that holds lora_A, lora_E and lora_B, in the order of its parameters.

    Both the original's names (``path.lora_A``) and PEFT's (``path.lora_A.adapter``) are read.

    Args:
        model: any module.
        adapter: with PEFT's names, the adapter to take, matched exactly; None takes those that train or have no rank
            left, or all where none trains.

    Raises:
        TypeError: not a module, or ``adapter`` is no name.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a module, got {type(model).__name__}")
    if not isinstance(adapter, str | None):
        raise TypeError(f"adapter: expected a name or None, got {type(adapter).__name__}")
    slots: dict[str, Slot] = {
        f"{path}.{key}" if path else key: (module._parameters, key)
        for path, module in model.named_modules(remove_duplicate=False)
        for key, parameter in module._parameters.items()
        if parameter is not None
    }
    found: list[Triplet] = []
    seen: set[int] = set()
    for name, slot in slots.items():
        parts = name.split(".")
        if "lora_A" not in parts:
            continue
        at = len(parts) - 1 - parts[::-1].index("lora_A")
        suffix = parts[at + 1 :]
        if adapter is not None and suffix and suffix != adapter.split("."):
            continue
        name_E, name_B = (".".join([*parts[:at], kind, *suffix]) for kind in ("lora_E", "lora_B"))
        if name_E not in slots or name_B not in slots:
            continue
        triplet = Triplet(".".join(parts[:at]), (name, name_E, name_B), (slot, slots[name_E], slots[name_B]))
        if id(triplet.lora_E) not in seen:  # a tied layer counts once
            seen.add(id(triplet.lora_E))
            found.append(triplet)
    trained = {t.name for t in found if any(p.requires_grad for p in t.parameters)}
    if adapter is not None or not trained:
        return found
    # A layer that has lost all its rank doesn't train, but it still counts among those that do.
    return [t for t in found if t.name in trained or not t.lora_E.numel()]


def no_triplets(model: nn.Module, adapter: str | None = None) -> ValueError:
    """What to raise where ``find_triplets`` finds none."""
    wanted = "" if adapter is None else f" for adapter {adapter!r}"
    return ValueError(
        f"model: expected layers with lora_A, lora_E and lora_B{wanted}, found none in {type(model).__name__}; build "
        "it of adalora_kernels.SVDLinear, or by get_peft_model(model, AdaLoraConfig(...))"
    )


def layout_of(triplets: Sequence[Triplet]) -> TripletLayout:
    """Where these triplets lie in flat averages and scores."""
    return TripletLayout(tuple(t.shape for t in triplets))


place_of: Callable[[Tensor], Hashable] = attrgetter("device")
"""Of a layer's E: layers of one place have their averages together, and one launch updates them."""


def places_of(lora_E: Iterable[Tensor]) -> list[Hashable]:
    """The place of each layer."""
    return list(map(place_of, lora_E))


def refuse_several_devices(what: str, triplets: Sequence[Triplet]) -> None:
    """Hold the layers to one device, which ``what`` needs.

    Raises:
        ValueError: they lie on several.
    """
    places = sorted(set(map(str, places_of(t.lora_E for t in triplets))))
    if len(places) > 1:
        raise ValueError(f"model: expected its adapters on one device for {what}, found them on {', '.join(places)}")


__all__ = [
    "Lookup",
    "Triplet",
    "find_triplets",
    "layout_of",
    "no_triplets",
    "place_of",
    "places_of",
    "refuse_several_devices",
]
