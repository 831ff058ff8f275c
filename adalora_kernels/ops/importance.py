"""Importance of all layers at once: the averages of sensitivity and uncertainty, and the score of every triplet."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any, Protocol
from weakref import ref

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from adalora_kernels.backends.select import Backend, implementation, select
from adalora_kernels.reference.importance import OrthogonalityShare, TripletLayout, triplet_scores


def importance_update(
    layout: TripletLayout,
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    state: Tensor,
    half: Tensor,
    scores: Tensor,
    beta1: float,
    beta2: float,
    *,
    backend: str | Backend | None = None,
) -> Tensor:
    """One step of Ī, Ū and the triplet scores of all layers; see ``reference.importance.importance_update``.

    The arguments are checked by the backend, in the pass in which it collects their addresses.

    Raises:
        ValueError: a parameter, gradient, or the state does not fit the layout.
        RuntimeError: the backend asked for can't run.
    """
    chosen = select("importance", state.device.type, state.dtype, 0, backend).backend
    module = implementation("importance", chosen)
    result: Tensor = module.importance_update(layout, params, grads, state, half, scores, beta1, beta2)
    return result


def importance_layer(
    layout: TripletLayout,
    layer: int,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    term: OrthogonalityShare | None,
    state: Tensor,
    half: Tensor,
    scores: Tensor,
    finite: Tensor,
    beta1: float,
    beta2: float,
    *,
    backend: str | Backend | None = None,
) -> None:
    """One layer's share of ``importance_update``, for its backward; see ``reference.importance.importance_layer``.

    Raises:
        RuntimeError: the backend asked for can't run.
    """
    chosen = select("importance", state.device.type, state.dtype, 0, backend).backend
    module = implementation("importance", chosen)
    module.importance_layer(layout, layer, params, grads, term, state, half, scores, finite, beta1, beta2)


def offers_layer(backend: Backend, device_type: str) -> bool:
    """Whether ``importance_layer`` runs on this backend and device."""
    return hasattr(implementation("importance", backend), "importance_layer") and (
        backend is not Backend.NATIVE or device_type == "cpu"
    )


class Sink(Protocol):
    """Who takes gradients in the backward that makes them; ``allocator.fused`` has the one there is."""

    def take_layer(self, lora_A: Tensor, dA: Tensor, dE: Tensor, dB: Tensor) -> None:
        """A layer's backward has finished its adapter's gradients, which autograd gets next. They may be added to."""

    def take_term(self, term: Any, slopes: Tensor, scale: Tensor) -> bool:
        """The backward of an orthogonality term (``ops.orthogonality.Term``) has come; whether it is seen to."""


# By the A of each layer, and weakly, since a sink holds its layers. Empty but where importance is fused.
_sinks: MutableMapping[Tensor, ref[Sink]] = WeakIdKeyDictionary()


def listen(lora_A: Tensor, sink: Sink | None) -> None:
    """Make ``sink`` that of the layer with this A; None leaves it without one."""
    if sink is not None:
        _sinks[lora_A] = ref(sink)
    else:
        _sinks.pop(lora_A, None)


def sink_of(lora_A: Tensor) -> Sink | None:
    """The sink of the layer with this A, if it has one."""
    if not _sinks:
        return None
    found = _sinks.get(lora_A)
    return None if found is None else found()


__all__ = [
    "OrthogonalityShare",
    "Sink",
    "TripletLayout",
    "importance_layer",
    "importance_update",
    "listen",
    "offers_layer",
    "sink_of",
    "triplet_scores",
]
