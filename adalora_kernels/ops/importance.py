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

    Raises:
        ValueError: a parameter, gradient, or the state does not fit the layout.
        RuntimeError: the backend asked for can't run.
    """
    _check(layout, params, grads, state, half, scores)
    chosen = select("importance", state.device.type, state.dtype, 0, backend).backend
    module = implementation("importance", chosen)
    result: Tensor = module.importance_update(layout, params, grads, state, half, scores, beta1, beta2)
    return result


def _check(
    layout: TripletLayout,
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    state: Tensor,
    half: Tensor,
    scores: Tensor,
) -> None:
    if len(params) != len(layout.sizes) or len(grads) != len(params):
        raise ValueError(f"params, grads: expected {len(layout.sizes)} each, got {len(params)} and {len(grads)}")
    if state.shape != (2, 2, layout.total_elements):
        raise ValueError(f"state: expected [2, 2, {layout.total_elements}], got {list(state.shape)}")
    if scores.shape != (layout.total_rank,) or half.shape != (1,):
        raise ValueError(
            f"scores, half: expected [{layout.total_rank}] and [1], got {list(scores.shape)} and {list(half.shape)}"
        )
    # All at once first: this runs in every step, for hundreds of parameters.
    present = [(p, g) for p, g in zip(params, grads, strict=True) if g is not None]
    if (
        [p.numel() for p in params] == list(layout.sizes)
        and all(p.shape == g.shape for p, g in present)
        and {t.device for t in (*params, *(g for _, g in present))} <= {state.device}
    ):
        return
    for i, (param, grad, size) in enumerate(zip(params, grads, layout.sizes, strict=True)):
        if param.numel() != size or param.device != state.device:
            raise ValueError(
                f"params[{i}]: expected {size} elements on {state.device}, got {list(param.shape)} on {param.device}"
            )
        if grad is not None and (grad.shape != param.shape or grad.device != state.device):
            raise ValueError(
                f"grads[{i}]: expected {list(param.shape)} on {state.device}, got {list(grad.shape)} on {grad.device}"
            )


__all__ = ["TripletLayout", "importance_update", "triplet_scores"]
