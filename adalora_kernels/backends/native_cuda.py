"""What the extension has for CUDA alone: importance fused into a backward (``reference.handover``), and masking that
may take its budget from the device.

The passes before the stage that finishes a layer's gradients are Triton's, as the layer is; that stage can be either's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adalora_kernels.backends.native_views import Layout, views_of, views_or_copies
from adalora_kernels.reference.handover import Handover, LayerImportance
from adalora_kernels.reference.svd_linear import Adapter


def importance_handed_over(
    state: Tensor,
    half: Tensor,
    scores: Tensor,
    sizes: Tensor,
    params: Tensor,
    grads: Tensor,
    handover: Handover,
    known: list[bool],
    beta1: float,
    beta2: float,
) -> Tensor:
    """``native.importance_update`` where backwards have updated the ``known`` gradients' parameters.

    ``sizes``: R, K, N of each layer, int64 [3, n] on the CPU. ``params``, ``grads``: their tables (``native_views``).
    """
    on_host = torch.tensor(known, dtype=torch.bool, device="cpu")
    finite: Tensor = torch.ops.adalora_native.importance_handed_over(
        state, half, scores, sizes, params, grads, *handover, on_host, beta1, beta2
    )
    return finite


def finish_gradients(
    t: Tensor, da_shares: Tensor, adapter: Adapter, importance: LayerImportance, ticket: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dA, dE and dB of a layer, with its importance updated in the same launch; see ``reference.handover``.

    Bitwise repeatable. Arguments as in ``reference.handover.Finisher``.

    Raises:
        RuntimeError: a shape, dtype or device that the kernel does not take. Nothing changes.
    """
    lora_A, lora_E, lora_B, mask, _, scaling, _, _ = adapter
    params, _held = views_or_copies("params", [lora_A, lora_E, lora_B], importance.state)
    before, _held_too = views_or_copies("before", importance.before, importance.state)
    slopes, offset_A, offset_B, scale = (None, 0, 0, None) if importance.term is None else importance.term
    gradients: tuple[Tensor, Tensor, Tensor] = torch.ops.adalora_native.finish_gradients(
        t,
        da_shares,
        params,
        None if mask is None else mask.reshape(-1).float(),
        scaling,
        before,
        None if slopes is None else slopes.float(),
        offset_A,
        offset_B,
        None if scale is None else scale.float(),
        importance.state,
        importance.half,
        importance.first,
        importance.sums,
        importance.probes,
        ticket,
        importance.beta1,
        importance.beta2,
    )
    return gradients


def mask_to_budget(
    scores: Tensor, lora_E: Sequence[Tensor], budget: int | Tensor, live: Tensor, enabled: Tensor | None
) -> Tensor:
    """As ``native.mask_to_budget``; a budget on the device stays there.

    Raises:
        RuntimeError: a shape, dtype or device that the kernel does not take. Nothing changes.
    """
    number, on_device = (0, budget) if isinstance(budget, Tensor) else (budget, None)
    values = views_of("lora_E", lora_E, scores, Layout.CONTIGUOUS_ROWS)
    threshold: Tensor = torch.ops.adalora_native.mask_by_selection(scores, live, enabled, values, number, on_device)
    return threshold


__all__ = ["finish_gradients", "importance_handed_over", "mask_to_budget"]
