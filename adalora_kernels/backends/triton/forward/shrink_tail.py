"""First u = drop(x) Aᵀ, then y = x Wᵀ + b + (u ⊙ λ) Bᵀ with a low-rank tail, in two launches (plan ``shrink_tail``).

Beyond the frozen product that costs a pass over x (M K elements read, M Rpad written) and, in the persistent product of
``gemm``, Rpad/K of its FLOPs. Where the device has dependent launch the product begins while u is still being made, and
waits for it only before its first tail.
"""

from __future__ import annotations

from torch import Tensor

from adalora_kernels.backends.triton.forward.gemm import multiply
from adalora_kernels.backends.triton.forward.shrink import has_dependent_launch, shrink
from adalora_kernels.reference.svd_linear import Adapter


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, base: None, adapter: Adapter) -> tuple[Tensor, Tensor]:
    """As ``reference.svd_linear.forward`` with a weight, and with u [M, rank_padding(R)]: 0 in its columns past R."""
    dependent = adapter.lora_A.shape[0] > 0 and has_dependent_launch(x.device)
    u = shrink(x, adapter, lets_next_begin=dependent)
    return multiply(x, weight, bias, adapter, u, make_u=False, dependent=dependent), u


__all__ = ["forward"]
