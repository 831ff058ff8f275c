"""y = x Wᵀ + b + (u ⊙ λ) Bᵀ in one pass over x, u = drop(x) Aᵀ made once for each row block (plan ``published``).

In the persistent product of ``gemm`` only the first tile of a row block computes u, in a second narrow product beside
its own, writes it out for the backward, and raises a flag; the later tiles of the row block wait for the flag and use u
in their tail. Beyond the frozen product that costs Rpad/N + Rpad/K of its FLOPs, and of memory traffic A and B once for
each row of tiles and the store of u (M Rpad elements). No launch, no pass over x and no memset beside the product's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adalora_kernels.backends.triton import tiles
from adalora_kernels.backends.triton.forward.gemm import multiply
from adalora_kernels.reference.svd_linear import Adapter


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, base: None, adapter: Adapter) -> tuple[Tensor, Tensor]:
    """As ``reference.svd_linear.forward`` with a weight, and with u [M, rank_padding(R)]: 0 in its columns past R."""
    rank = adapter.lora_A.shape[0]
    u = torch.empty((x.shape[0], tiles.rank_padding(rank)), dtype=adapter.compute_dtype, device=x.device)
    return multiply(x, weight, bias, adapter, u, make_u=rank > 0), u


__all__ = ["forward"]
