"""y = x Wᵀ + b + (u ⊙ λ) Bᵀ in one pass over x, u = drop(x) Aᵀ made once for each row block (plan ``published``).

In the persistent product of ``gemm`` only the first tile of a row block computes u, writes it out for the backward and
raises a flag; the later tiles of the row block wait for the flag and use u in their tail. Beside the first tile's own
product that costs Rpad/N + Rpad/K of the frozen product's FLOPs; made ahead of it (dropout, fp32 adapters, ranks past
32), another read of the rows of x, from L2, by one tile of each row. Beyond the frozen product's own traffic: A and B
once for each row of tiles, and the store of u (M Rpad elements). No further launch, and no memset.
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
