"""A layer's call with x of any leading shape, for launchers that take matrices."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from adalora_kernels.reference.svd_linear import Adapter

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def forward(
    launch: Callable[..., tuple[Tensor, Tensor]],
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    base: Tensor | None,
    adapter: Adapter,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    """``launch`` with x [..., K] and ``base`` [..., N] flattened: y [..., N] and u [M, ...]."""
    if x.dim() == 2:
        return launch(x, weight, bias, base, adapter, *rest)
    tokens, n = tokens_of(x), adapter.lora_B.shape[0]
    base = None if base is None else base.reshape(tokens, n)
    y, u = launch(x.reshape(tokens, x.shape[-1]), weight, bias, base, adapter, *rest)
    # Not .view(): what a Function returns must not be a view, or users could no longer add to it in place.
    return torch.ops.aten._unsafe_view.default(y, (*x.shape[:-1], n)), u


def backward(
    launch: Callable[..., Gradients],
    grad_y: Tensor,
    x: Tensor,
    u: Tensor,
    weight: Tensor | None,
    adapter: Adapter,
    needs: tuple[bool, bool, bool, bool],
    *rest: Any,
    **options: Any,
) -> Gradients:
    """``launch`` with g [..., N] and x [..., K] flattened: dx [..., K], dA, dE, dB."""
    if x.dim() == 2:
        return launch(grad_y, x, u, weight, adapter, needs, *rest, **options)
    g, x_2d = flat(grad_y), flat(x)
    dx, dA, dE, dB = launch(g, x_2d, u, weight, adapter, needs, *rest, **options)
    return None if dx is None else dx.view(x.shape), dA, dE, dB


def flat(tensor: Tensor) -> Tensor:
    """[..., F] as [M, F]; a copy where its strides demand one."""
    return tensor.reshape(tokens_of(tensor), tensor.shape[-1])


def tokens_of(x: Tensor) -> int:
    """M of [..., K]; not left to ``reshape``, which couldn't tell where K is 0."""
    return math.prod(x.shape[:-1])


__all__ = ["backward", "flat", "forward", "tokens_of"]
