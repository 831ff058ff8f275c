"""Importance of all layers in one launch; the kernel is in ``sweep``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from adalora_kernels.backends.triton.engine.sweep import sweep
from adalora_kernels.backends.triton.engine.tables import check, sizes_of, words_of
from adalora_kernels.reference.adamw import Importance
from adalora_kernels.reference.handover import Handover
from adalora_kernels.reference.importance import TripletLayout


def importance_update(
    layout: TripletLayout,
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    state: Tensor,
    half: Tensor,
    scores: Tensor,
    beta1: float,
    beta2: float,
    handed_over: tuple[Handover, list[bool]] | None = None,
) -> Tensor:
    """One step of the averages of all layers in one launch; see ``reference.importance.importance_update``.

    Bitwise repeatable. Parameters and gradients that aren't contiguous are copied.

    Args:
        handed_over: what backwards have left, and of which of the 3n gradients it is, as far as the host knows. These
            are contiguous.
        The others as in the reference.

    Raises:
        ValueError: where a shape or a device is not the layout's or the state's. Nothing changes.
        TypeError: where a dtype is none that the kernel reads.
    """
    importance = Importance(state, half, scores, beta1, beta2, False)
    check_importance(layout, importance, state.device)
    theta = words_of("params", params, parameter_sizes(layout), state.device)
    given = words_of("grads", grads, theta.sizes, state.device, some_missing=True)
    taken = sweep(layout, theta.words, given.words, state.device, importance, None, handed_over)
    del theta, given
    return taken


def check_importance(layout: TripletLayout, importance: Importance, device: torch.device) -> None:
    """Hold the averages, the half and the scores to the layout; errors as in ``tables.check``."""
    check("state", importance.state, torch.float32, 4 * layout.total_elements, device)
    check("half", importance.half, torch.int32, 1, device)
    check("scores", importance.scores, torch.float32, layout.total_rank, device)


@lru_cache(maxsize=16)
def parameter_sizes(layout: TripletLayout) -> bytes:
    """Of the 3n parameters, packed by ``tables.sizes_of``."""
    return sizes_of(shape for r, k, n in layout.shapes for shape in ((r, k), (r, 1), (n, r)))


__all__ = ["check_importance", "importance_update", "parameter_sizes"]
