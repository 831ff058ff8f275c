"""compute_orth_regu against the original's expression, value and gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from adalora_kernels import SVDLinear, compute_orth_regu
from adalora_kernels.allocator import find_triplets


@pytest.mark.parametrize("backend", ("reference", "native"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_compute_orth_regu_equals_the_expression(backend: str, dtype: torch.dtype, monkeypatch: Any) -> None:
    monkeypatch.setenv("ADALORA_KERNELS_BACKEND", backend)
    model = nn.Sequential(*(SVDLinear(k, n, r=r, dtype=dtype) for k, n, r in ((24, 40, 6), (40, 33, 5), (33, 10, 8))))
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    terms = []
    for t in find_triplets(model):
        for cov in (t.lora_A @ t.lora_A.t(), t.lora_B.t() @ t.lora_B):
            terms.append(torch.norm(cov - torch.eye(len(cov), dtype=dtype), p="fro"))
    want = 0.3 * torch.stack(terms).mean()
    got = compute_orth_regu(model, 0.3)
    leaves = [p for t in find_triplets(model) for p in (t.lora_A, t.lora_B)]
    torch.testing.assert_close(got, want)
    for scale in (1.0, 0.25):
        for a, b in zip(
            torch.autograd.grad(got * scale, leaves, retain_graph=True),
            torch.autograd.grad(want * scale, leaves, retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(a, b)
