"""AdamW of all adapters, with the step of their importance averages in the same pass.

AdamW is Loshchilov and Hutter's (arXiv 1711.05101, algorithm 2), in the order of operations of ``torch.optim.AdamW``:
θ ← (1 - lr wd) θ, m ← m + (1-β₁)(g - m), v ← β₂ v + (1-β₂) g², θ ← θ - lr/(1-β₁ᵗ) · m / (√v/√(1-β₂ᵗ) + ε).
Importance is ``reference.importance``'s, of the updated parameters (the published codes' timing) or of those before the
update (the paper's), with the same gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from adalora_kernels.reference.importance import TripletLayout, importance_update


class Importance(NamedTuple):
    """What the sweep updates beside the optimizer's own state; see ``reference.importance.importance_update``.

    Attributes:
        state, half, scores: the ping-pong averages, the current half, the triplets' scores. Updated in place.
        beta1, beta2: the two smoothing factors.
        pre_step: whether θ before its update counts, rather than after.
    """

    state: Tensor
    half: Tensor
    scores: Tensor
    beta1: float
    beta2: float
    pre_step: bool


def adamw_update(
    layout: TripletLayout,
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    moments: Tensor,
    steps: Tensor,
    groups: Tensor,
    settings: Tensor,
    grad_scale: Tensor,
    importance: Importance | None,
) -> Tensor:
    """One step of all adapters.

    Args:
        layout: where everything lies.
        params: the 3n parameters in the layout's order, contiguous, any floating dtype. Updated in place.
        grads: their gradients; None leaves that parameter and all that belongs to it as it is.
        moments: [2, total_elements], m and v, fp32 (fp64 for fp64 parameters). Updated in place.
        steps: float32 [3n], how often each parameter was stepped. Updated in place.
        groups: int64 [3n], each parameter's row of ``settings``.
        settings: fp64 [groups, 5] on the parameters' device: lr, weight decay, β₁, β₂, ε.
        grad_scale: fp64 [1], what gradients are multiplied by before anything else (clipping, unscaling).
        importance: what to update of the averages; None for nothing.

    Returns:
        bool [1]: whether every new s was finite, that is, whether the averages' update was taken.

    Raises:
        ValueError: a parameter or gradient does not fit the layout. Nothing changes.
    """
    if len(params) != len(layout.sizes) or len(grads) != len(params):
        raise ValueError(f"params, grads: expected {len(layout.sizes)} each, got {len(params)} and {len(grads)}")
    before = [p.detach().clone() for p in params] if importance is not None and importance.pre_step else params
    scaled = [None if g is None else g.detach().to(moments.dtype) * grad_scale.to(moments.dtype) for g in grads]
    rows = settings.to(groups.device).index_select(0, groups)
    for i, (param, grad) in enumerate(zip(params, scaled, strict=True)):
        if grad is None or param.numel() == 0:
            continue
        steps[i] += 1
        lr, decay, beta1, beta2, eps = rows[i].unbind()
        moment, square = moments[:, layout.offsets[i] : layout.offsets[i + 1]].view(2, *param.shape)
        moment.lerp_(grad, (1 - beta1).to(moment.dtype))
        square.mul_(beta2).add_((1 - beta2).to(square.dtype) * grad * grad)
        corrections = [1 - beta ** steps[i].double() for beta in (beta1, beta2)]
        denominator = square.sqrt() / corrections[1].sqrt().to(square.dtype) + eps
        step_size = (lr / corrections[0]).to(square.dtype)
        theta = param.detach().to(square.dtype)
        param.detach().copy_(theta * (1 - lr * decay) - step_size * (moment / denominator))
    if importance is None:
        return torch.ones(1, dtype=torch.bool, device=moments.device)
    return importance_update(
        layout, before, scaled, importance.state, importance.half, importance.scores, importance.beta1, importance.beta2
    )


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """‖·‖₂ of all tensors together, fp64 [1]."""
    return torch.stack([t.detach().double().square().sum() for t in tensors]).sum().sqrt().view(1)


__all__ = ["Importance", "adamw_update", "total_norm"]
