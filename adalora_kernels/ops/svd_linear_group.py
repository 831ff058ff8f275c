"""``svd_linear_group``: layers that read the same x (q, k, v; gate, up) as one differentiable call.

One node of the autograd graph for all of them: x is saved once, and its gradient is summed where it is made. Compiled
calls are traced as the single ops, one for each layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adalora_kernels.backends.select import Backend, Selection, select
from adalora_kernels.ops.checks import as_float, check_layer
from adalora_kernels.ops.importance import begin_layer, sink_of
from adalora_kernels.ops.once import differentiable_once
from adalora_kernels.ops.svd_linear import SEED_RANGE, autocast_off, compute_dtype_of, launchers, svd_linear
from adalora_kernels.reference import svd_linear_group as one_by_one
from adalora_kernels.reference.svd_linear import Adapter
from adalora_kernels.reference.svd_linear_group import Member


class GroupedLayer(NamedTuple):
    """One layer of a group; the attributes are arguments of ``svd_linear``."""

    weight: Tensor
    lora_A: Tensor
    lora_E: Tensor
    lora_B: Tensor
    bias: Tensor | None = None
    mask: Tensor | None = None
    scaling: float = 1.0


def svd_linear_group(
    x: Tensor,
    layers: Sequence[GroupedLayer | tuple[Any, ...]],
    *,
    dropout_p: float = 0.0,
    training: bool = True,
    backend: str | Backend | None = None,
) -> tuple[Tensor, ...]:
    """y_i = x W_iᵀ + b_i + (drop_i(x) A_iᵀ ⊙ c_i E_i ⊙ mask_i) B_iᵀ for layers that read the same x, in one call.

    ``svd_linear`` of each, as one node of the autograd graph: x is saved once, and dx = Σ_i dx_i is summed where it is
    made. On the triton backend one pass over x serves the u of all layers and one all their dA, where that is fast by
    calculation. Ranks, N, bias and mask may differ; K is that of x.

    An output that isn't used costs nothing in the backward. With dropout each layer drops elements of its own, so that
    no pass over x is shared.

    Args:
        x: [..., K], any leading shape and strides.
        layers: at least one (weight, lora_A, lora_E, lora_B, bias, mask, scaling), as in ``svd_linear``; the last three
            may be left out.
        dropout_p: probability of dropping an element of x before each A, in [0, 1].
        training: whether dropout applies.
        backend: as in ``svd_linear``.

    Returns:
        y [..., N] of each layer, in the dtype of the products.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: a shape, device or probability does not fit, or there is no layer; the message names the argument.
        RuntimeError: the backend or plan asked for can't run.
    """
    try:
        group = [layer if type(layer) is GroupedLayer else GroupedLayer(*layer) for layer in layers]
    except TypeError:
        raise TypeError(f"layers: expected {GroupedLayer._fields} of each layer, got {layers!r:.80}") from None
    if not group:
        raise ValueError("layers: expected at least one layer, got none")
    probability = dropout_p if training else 0.0
    for i, layer in enumerate(group):
        _check(i, x, layer, probability)
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        settings: dict[str, Any] = {"dropout_p": probability, "backend": backend}
        return tuple(
            svd_linear(x, w, a, e, b, bias=bias, mask=mask, scaling=c, **settings)
            for w, a, e, b, bias, mask, c in group
        )
    dtype = compute_dtype_of(x)
    selection = select("svd_linear", x.device.type, dtype, max(layer.lora_A.shape[0] for layer in group), backend)
    arguments: list[Tensor | None] = []
    numbers = []
    for i, (w, a, e, b, bias, mask, c) in enumerate(group):
        seed = None
        if probability > 0 and a.shape[0] > 0:
            seed = torch.randint(SEED_RANGE, (1,), dtype=torch.int64, device=x.device)
        arguments += [w, bias, a, e, b, mask, seed]
        numbers.append((as_float(f"layers[{i}].scaling", c), probability, dtype))
    outputs: tuple[Tensor, ...] = _SVDLinearGroup.apply(numbers, selection, x, *arguments)
    return outputs


def shares_passes(
    x: Tensor, layers: Sequence[GroupedLayer], *, dropout_p: float = 0.0, backend: str | Backend | None = None
) -> bool:
    """Whether ``svd_linear_group`` would go over x once for several layers, forward or, with gradients on, backward.

    Only the triton backend does, where that is fast by calculation. Arguments as there; they aren't checked.
    """
    dtype, rank = compute_dtype_of(x), max(layer.lora_A.shape[0] for layer in layers)
    selection = select("svd_linear", x.device.type, dtype, rank, backend)
    if selection.backend is not Backend.TRITON or dropout_p > 0:
        return False
    from adalora_kernels.backends.triton import group

    x_2d = x.new_empty(()).expand(math.prod(x.shape[:-1]), x.shape[-1])
    members = [Member(w, bias, Adapter(a, e, b, mask, None, c, 0.0, dtype)) for w, a, e, b, bias, mask, c in layers]
    needs = (torch.is_grad_enabled(), x.requires_grad)
    return group.shares_passes(x_2d, members, *needs, selection.plan_asked_for)


_TENSORS = 7  # of a layer, as they follow each other in the node's arguments


def _check(i: int, x: Tensor, layer: GroupedLayer, dropout_p: float) -> None:
    weight, lora_A, lora_E, lora_B, bias, mask, _ = layer
    if weight is None:
        raise TypeError(f"layers[{i}].weight: expected a tensor, got NoneType")
    try:
        check_layer(x, weight, bias, None, lora_A, lora_E, lora_B, mask, dropout_p)
    except (TypeError, ValueError) as error:
        shared = str(error).startswith(("x:", "dropout_p:"))
        raise error if shared else type(error)(f"layers[{i}].{error}") from None


def _members(tensors: Sequence[Any], numbers: Sequence[tuple[float, float, torch.dtype]]) -> list[Member]:
    found = []
    for i, rest in enumerate(numbers):
        weight, bias, *adapter = tensors[i * _TENSORS : (i + 1) * _TENSORS]
        found.append(Member(weight, bias, Adapter._make((*adapter, *rest))))
    return found


@cache
def _group_launchers(selection: Selection) -> tuple[Callable[..., Any], Callable[..., Any]]:
    if selection.backend is Backend.TRITON:
        from adalora_kernels.backends.triton import group

        plan = selection.plan_asked_for
        return partial(group.forward, plan=plan), partial(group.backward, plan=plan)
    forward, backward = launchers(selection)
    return partial(one_by_one.forward, launch=forward), partial(one_by_one.backward, launch=backward)


class _SVDLinearGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, numbers: Any, selection: Selection, x: Tensor, *tensors: Any) -> tuple[Tensor, ...]:
        launch, _ = _group_launchers(selection)
        tokens = math.prod(x.shape[:-1])  # not -1, which K = 0 or N = 0 would leave open
        with autocast_off(x):
            made = launch(x.reshape(tokens, x.shape[-1]), _members(tensors, numbers))
        ctx.save_for_backward(x, *tensors, *(u for _, u in made))
        ctx.numbers, ctx.selection = numbers, selection
        ctx.lora_As = tensors[2::_TENSORS]  # themselves: under checkpointing the saved ones are aliases
        ctx.set_materialize_grads(False)
        if x.dim() == 2:
            return tuple(y for y, _ in made)
        # Not .view(): what a Function returns must not be a view, or users could no longer add to it in place.
        return tuple(torch.ops.aten._unsafe_view.default(y, (*x.shape[:-1], y.shape[1])) for y, _ in made)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grad_ys: Tensor | None) -> tuple[Tensor | None, ...]:
        saved, numbers = ctx.saved_tensors, ctx.numbers
        x, count = saved[0], len(numbers)
        tensors, us = saved[1 : 1 + count * _TENSORS], saved[1 + count * _TENSORS :]
        members = _members(tensors, numbers)
        # Of x, then for each layer of weight, bias, A, E, B, mask, seed; mask and seed have none.
        need_x, *need = ctx.needs_input_grad[2:]
        needs = [tuple(need[i * _TENSORS + 2 : i * _TENSORS + 5]) for i in range(count)]
        _, launch = _group_launchers(ctx.selection)
        tokens = math.prod(x.shape[:-1])
        x_2d = x.reshape(tokens, x.shape[-1])
        grads = [None if g is None else g.reshape(tokens, g.shape[-1]) for g in grad_ys]
        found: list[Tensor | None] = [None, None]
        begun = [
            None if g is None else begin_layer(lora_A, ctx.selection.backend, asked)
            for g, lora_A, asked in zip(grads, ctx.lora_As, needs, strict=True)
        ]
        extra = {"importance": begun} if any(begun) else {}
        with autocast_off(x):
            dx, gradients = launch(grads, x_2d, us, members, need_x, needs, **extra)
            found.append(None if dx is None else dx.view(x.shape))
            for i, (g, (weight, bias, adapter)) in enumerate(zip(grads, members, strict=True)):
                need_weight, need_bias = need[i * _TENSORS : i * _TENSORS + 2]
                dw = db = None
                if g is not None and need_weight:
                    dw = (g.to(adapter.compute_dtype).t() @ x_2d.to(adapter.compute_dtype)).to(weight.dtype)
                if g is not None and need_bias and bias is not None:
                    db = g.sum(0).to(bias.dtype)
                found += [dw, db, *gradients[i], None, None]
                dA, dE, dB = gradients[i]
                sink = sink_of(ctx.lora_As[i])
                if sink is not None and dA is not None and dE is not None and dB is not None:
                    sink.take_layer(ctx.lora_As[i], dA, dE, dB, begun[i])
        return tuple(found)


__all__ = ["GroupedLayer", "shares_passes", "svd_linear_group"]
