"""Importance of all layers at once: the averages of sensitivity and uncertainty, and the score of every triplet."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any, Protocol
from weakref import ref

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from adalora_kernels.backends.select import Backend, implementation, select
from adalora_kernels.reference.handover import Finisher, Handover, LayerImportance
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


def importance_handed_over(
    layout: TripletLayout,
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    handover: Handover,
    known: list[bool],
    state: Tensor,
    half: Tensor,
    scores: Tensor,
    beta1: float,
    beta2: float,
    *,
    backend: str | Backend | None = None,
) -> Tensor:
    """As ``importance_update``, with what backwards have done of it taken from ``handover``.

    Args:
        handover: see ``reference.handover``.
        known: of which of the 3n gradients it is, as far as the host knows.
        The others as in ``importance_update``.

    Raises:
        RuntimeError: the backend asked for can't run.
    """
    module = implementation("importance", select("importance", state.device.type, state.dtype, 0, backend).backend)
    result: Tensor = module.importance_update(
        layout, params, grads, state, half, scores, beta1, beta2, handed_over=(handover, known)
    )
    return result


def hands_over(backend: Backend, device_type: str) -> bool:
    """Whether the stage that finishes a layer's gradients updates importance on this backend and device."""
    return backend is Backend.TRITON or (backend is Backend.NATIVE and device_type == "cuda")


def finisher_of(backend: Backend) -> Finisher | None:
    """The stage of a backend that has no passes of its own before it; None where it is one with them."""
    found: Finisher | None = getattr(implementation("importance", backend), "finish_gradients", None)
    return found


class Sink(Protocol):
    """Who takes gradients in the backward that makes them; ``allocator.fused`` has the one there is."""

    def begin_layer(self, lora_A: Tensor) -> LayerImportance | None:
        """A layer's backward is about to make all gradients of its adapter: what their last stage is to update."""

    def take_layer(self, lora_A: Tensor, dA: Tensor, dE: Tensor, dB: Tensor, begun: LayerImportance | None) -> None:
        """A layer's backward has finished its adapter's gradients, which autograd gets next. They may be added to.

        ``begun``: of ``begin_layer``, where that was called.
        """

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


def begin_layer(lora_A: Tensor, backend: Backend, needs: Sequence[bool]) -> LayerImportance | None:
    """What the sink of the layer with this A, if it has one, wants from the stage that finishes its gradients.

    Args:
        lora_A: the parameter.
        backend: who computes the backward.
        needs: whether dA, dE, dB are asked for.
    """
    sink = sink_of(lora_A)
    if sink is None or not all(needs) or not hands_over(backend, lora_A.device.type):
        return None
    return sink.begin_layer(lora_A)


def sink_of(lora_A: Tensor) -> Sink | None:
    """The sink of the layer with this A, if it has one."""
    if not _sinks:
        return None
    found = _sinks.get(lora_A)
    return None if found is None else found()


__all__ = [
    "Handover",
    "LayerImportance",
    "OrthogonalityShare",
    "Sink",
    "TripletLayout",
    "begin_layer",
    "finisher_of",
    "hands_over",
    "importance_handed_over",
    "importance_layer",
    "importance_update",
    "listen",
    "sink_of",
    "triplet_scores",
]
