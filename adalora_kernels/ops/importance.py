"""Importance of all layers at once: the averages of sensitivity and uncertainty, and the score of every triplet."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from adalora_kernels.backends.select import Backend, implementation, select
from adalora_kernels.reference.importance import TripletLayout, triplet_scores


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


__all__ = ["TripletLayout", "importance_update", "triplet_scores"]
