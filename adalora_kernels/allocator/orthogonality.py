"""The orthogonality term of a whole model, under the original package's name."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from adalora_kernels.allocator.triplets import find_triplets, no_triplets
from adalora_kernels.backends.select import Backend
from adalora_kernels.ops.orthogonality import orthogonality_loss
from adalora_kernels.ops.shards import are_gathered


def compute_orth_regu(
    model: nn.Module, regu_weight: float = 0.1, *, squared: bool = False, accumulate: bool = False
) -> Tensor:
    """γ · mean of ‖A Aᵀ - I‖_F and ‖Bᵀ B - I‖_F over all adapted matrices of ``model``, differentiable, 0-d.

    Args:
        model: holds the layers.
        regu_weight: γ.
        squared: γ · Σ of their squares instead (the paper's, which goes with variant "paper" of ``RankAllocator``).
        accumulate: add its gradient in one launch when the backward ends; see ``ops.orthogonality_loss``. Not under
            FSDP2, which has reduced the gradients by then.

    Raises:
        ValueError: a model without layers with lora_A, lora_E and lora_B, a negative weight, or parameters that can't
            accumulate.
    """
    triplets = find_triplets(model)
    if not triplets:
        raise no_triplets(model)
    if accumulate and are_gathered(model.get_submodule(t.name) for t in triplets):
        raise ValueError("accumulate: expected False under fully_shard, got True")
    lora_A, lora_B = [t.lora_A for t in triplets], [t.lora_B for t in triplets]
    return loss_of_devices(lora_A, lora_B, regu_weight, squared, accumulate=accumulate)


def loss_of_devices(
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    weight: float,
    squared: bool = False,
    *,
    accumulate: bool | None = False,
    backend: str | Backend | None = None,
) -> Tensor:
    """``ops.orthogonality_loss`` of layers that may lie on several devices, on the first one's."""
    devices = dict.fromkeys(a.device for a in lora_A)
    if len(devices) == 1:
        return orthogonality_loss(lora_A, lora_B, weight, squared, accumulate=accumulate, backend=backend)
    terms = []
    for device in devices:
        here = [i for i, a in enumerate(lora_A) if a.device == device]
        share = weight if squared else weight * len(here) / len(lora_A)
        matrices = [lora_A[i] for i in here], [lora_B[i] for i in here]
        terms.append(orthogonality_loss(*matrices, share, squared, accumulate=accumulate, backend=backend))
    return sum((term.to(terms[0].device) for term in terms[1:]), terms[0])


__all__ = ["compute_orth_regu", "loss_of_devices"]
