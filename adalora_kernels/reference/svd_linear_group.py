"""Layers that read the same x (q, k, v; gate, up), one after the other: y_i as ``svd_linear`` each, dx = Σ_i dx_i."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from adalora_kernels.reference import svd_linear
from adalora_kernels.reference.svd_linear import Adapter


class Member(NamedTuple):
    """One layer of a group.

    Attributes:
        weight: frozen W [N, K], any strides.
        bias: [N] or None.
        adapter: the low-rank branch, of a rank and N of its own; K and the dtype of the products are the group's.
    """

    weight: Tensor
    bias: Tensor | None
    adapter: Adapter


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def forward(
    x: Tensor, members: Sequence[Member], launch: Callable[..., Any] = svd_linear.forward
) -> list[tuple[Tensor, Tensor]]:
    """y and u of each member.

    Args:
        x: [M, K], any strides.
        members: the layers.
        launch: computes one layer, as ``reference.svd_linear.forward`` does.
    """
    return [launch(x, weight, bias, None, adapter) for weight, bias, adapter in members]


def backward(
    grads: Sequence[Tensor | None],
    x: Tensor,
    us: Sequence[Tensor],
    members: Sequence[Member],
    need_x: bool,
    needs: Sequence[tuple[bool, bool, bool]],
    launch: Callable[..., Any] = svd_linear.backward,
) -> tuple[Tensor | None, list[Gradients]]:
    """Gradients of x and of each member's adapter. A member without a gradient of its output costs nothing.

    Args:
        grads: g_i [M, N_i] of each member, or None where its output was not used.
        x, members: as in ``forward``.
        us: u of each member from ``forward``.
        need_x: whether dx is asked for.
        needs: for each member, whether dA, dE, dB are asked for.
        launch: computes one layer's gradients, as ``reference.svd_linear.backward`` does.

    Returns:
        dx [M, K] in x's dtype, summed in the memory of the first; and dA, dE, dB of each member, None for what was not
        asked for or gets no gradient.
    """
    dx: Tensor | None = None
    gradients: list[Gradients] = []
    for grad_y, u, (weight, _, adapter), need in zip(grads, us, members, needs, strict=True):
        if grad_y is None:
            gradients.append((None, None, None))
            continue
        share, *rest = launch(grad_y, x, u, weight, adapter, (need_x, *need))
        dx = share if dx is None else dx.add_(share)
        gradients.append((rest[0], rest[1], rest[2]))
    return dx, gradients


__all__ = ["Gradients", "Member", "backward", "forward"]
