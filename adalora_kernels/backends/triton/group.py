"""Layers that read the same x (q, k, v; gate, up): one pass over x for the u of all, and one for all their dA.

    forward    u_i = x A_iᵀ of all in one launch (``forward.group``); y_i by the product with a tail (``forward.gemm``)
    backward   v_i, T_i from a pass over each g_i (``backward.g_pass``); dx = Σ g_i W_i by the BLAS, each product added
               to the one before; dA_i and the low-rank terms of dx in one pass over x (``backward.group``)

That is what the plans ``shrink_tail`` and ``blas`` are for a group. Where it can't be had (dropout, which is drawn for
each layer; factors of different layouts), where another plan is asked for by name, or where it costs more by
calculation, members go through their own plans, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

from torch import Tensor

from adalora_kernels.backends import triton as layer
from adalora_kernels.backends.triton import costs, launched, plans
from adalora_kernels.backends.triton.backward.frozen import frozen_gradients, has_low_rank
from adalora_kernels.backends.triton.backward.g_pass import pass_over_g
from adalora_kernels.backends.triton.backward.group import pass_over_x
from adalora_kernels.backends.triton.backward.slab_sums import finish
from adalora_kernels.backends.triton.forward.gemm import multiply
from adalora_kernels.backends.triton.forward.group import shrink_stack
from adalora_kernels.backends.triton.forward.shrink import has_dependent_launch
from adalora_kernels.backends.triton.problem import Problem, problem_of
from adalora_kernels.backends.triton.stack import Stack, stackable, stacks
from adalora_kernels.reference import svd_linear_group as one_by_one
from adalora_kernels.reference.handover import LayerImportance
from adalora_kernels.reference.svd_linear_group import Gradients, Member

_ON_GEMM = ("published", "shrink_tail")  # plans whose product is the stack's


def forward(x: Tensor, members: Sequence[Member], plan: str | None = None) -> list[tuple[Tensor, Tensor]]:
    """As ``reference.svd_linear_group.forward``, with u [M, rank_padding(R)]: 0 in its columns past R.

    Args:
        plan: of each layer, as in ``plans.parse``.
        The others as in the reference.

    Raises:
        RuntimeError: the plan asked for can't run a member.
    """
    if layer.interpreted():
        flat = _forward(x, members, plan)
    else:
        from adalora_kernels.backends.triton.replay import replayed

        tensors = (x, *(t for m in members for t in (m.weight, m.bias, *m.adapter[:5])))
        flat = replayed(_forward, tensors, (plan, *(m.adapter[5:] for m in members)), x, members, plan)
    return list(zip(flat[::2], flat[1::2], strict=True))


def _forward(x: Tensor, members: Sequence[Member], plan: str | None) -> tuple[Tensor, ...]:
    """y and u of each member in turn."""
    found = _stacks(members)
    problems = tuple(problem_of(x, m.weight, m.adapter) for m in members)
    if found and _forward_pays(_ranked(problems), len(found), plan):
        made = _stacked_forward(x, members, found)
    else:
        names = [plans.choose(p, plan).forward for p in problems]
        made = [
            plans.launcher("forward", name)(x, weight, bias, None, adapter)
            for name, (weight, bias, adapter) in zip(names, members, strict=True)
        ]
    return tuple(t for pair in made for t in pair)


def backward(
    grads: Sequence[Tensor | None],
    x: Tensor,
    us: Sequence[Tensor],
    members: Sequence[Member],
    need_x: bool,
    needs: Sequence[tuple[bool, bool, bool]],
    plan: str | None = None,
    importance: Sequence[LayerImportance | None] | None = None,
) -> tuple[Tensor | None, list[Gradients]]:
    """As ``reference.svd_linear_group.backward``, with the u of ``forward``; ``plan`` and errors as there.

    ``importance``: of each member, to be updated on the way as ``reference.handover`` says.
    """
    importance = [None] * len(members) if importance is None else importance
    used = [i for i, grad_y in enumerate(grads) if grad_y is not None]
    found = _stacks([members[i] for i in used]) if x.numel() > 0 else []
    problems = tuple(problem_of(x, members[i].weight, members[i].adapter, need_x) for i in used)
    if found and _backward_pays(_ranked(problems), len(found), plan):
        return _stacked_backward(grads, x, us, members, need_x, needs, importance)
    updates = iter([importance[i] for i in used])
    alone: Callable[..., Any] = partial(layer.svd_linear_backward, plan=plan)

    def launch(*call: Any) -> Any:
        return alone(*call, importance=next(updates))

    return one_by_one.backward(grads, x, us, members, need_x, needs, launch)


def shares_passes(
    x: Tensor, members: Sequence[Member], need_gradients: bool, need_x: bool, plan: str | None = None
) -> bool:
    """Whether several members would share a pass over x, in the forward or in a backward, and that saves time.

    It saves the device's. Where layers are so small that the device waits for the host, who groups them makes it wait
    longer, unless plans are asked for by name.
    """
    found = _stacks(members)
    problems = _ranked(tuple(problem_of(x, m.weight, m.adapter, need_x) for m in members))
    if not found or (plan is None and waits_for_the_host(problems)):
        return False
    pays = _backward_pays if need_gradients else _forward_pays
    return _forward_pays(problems, len(found), plan) or pays(problems, len(found), plan)


@cache
def waits_for_the_host(problems: tuple[Problem, ...]) -> bool:
    """Whether the frozen products, forward and backward, take the device less time than their layers the host."""
    return 2 * sum(map(costs.frozen, problems)) < len(problems) * costs.HOST


def explain(x: Tensor, members: Sequence[Member], need_x: bool = True, plan: str | None = None) -> tuple[str, str, str]:
    """Plan, configuration and reason of a group's call, "forward/backward".

    Each is "stack", or "one by one" with the layers' own plans, whose reason says why they share nothing. The
    configuration has the tiles of all that is launched.

    Errors as in ``forward``.
    """
    found = _stacks(members)
    problems = tuple(problem_of(x, m.weight, m.adapter, need_x) for m in members)
    choices = [plans.choose(p, plan) for p in problems]
    names, reasons, kernels = [], [], list[tuple[str, Problem]]()
    for direction, known, stacked, beside, pays in (
        ("forward", plans.FORWARD, "group_shrink", ("gemm",), _forward_pays),
        ("backward", plans.BACKWARD, "group_x", ("g", "t", "v"), _backward_pays),
    ):
        own = [getattr(choice, direction) for choice in choices]
        if found and pays(_ranked(problems), len(found), plan):
            names.append("stack")
            count, layers = len(found), sum(len(s.members) for s in found)
            reasons.append(f"{direction}: {count} pass{'es' * (count > 1)} over x for {layers} layers")
            kernels += [(stacked, problems[0]._replace(rank=s.total)) for s in found]
            kernels += [(kernel, p) for p in problems for kernel in beside]
        else:
            names.append(f"one by one: {', '.join(dict.fromkeys(own))}")
            reasons.append(f"{direction}: {_apart(direction, found, own, plan)}")
            kernels += [(kernel, p) for p, name in zip(problems, own, strict=True) for kernel in known[name].kernels]
    if any(name != "stack" for name in names):
        reasons += dict.fromkeys(f"a layer alone: {choice.reason}" for choice in choices)
    tiles = (f"{kernel} {launched.tile(kernel, p)}" for kernel, p in kernels if launched.launches(kernel, p))
    return "/".join(names), "; ".join(dict.fromkeys(tiles)) or plans.NO_TILES, "; ".join(reasons)


def _apart(direction: str, found: Sequence[Stack], own: Sequence[str], plan: str | None) -> str:
    """Why layers share nothing, in words; as ``_stacks`` and what pays decide."""
    if not found:
        return "no stack spares a pass, for dropout, ranks, layouts or dtypes of A"
    if plan and plans.parse(plan)[direction == "backward"]:
        return "the plan asked for has no form for groups"
    if direction == "forward" and not all(name in _ON_GEMM for name in own):
        return "the layers run on products of their own"
    return "the layers' own plans take less time by calculation"


def _stacks(members: Sequence[Member]) -> list[Stack]:
    """Stacks of those that have a rank; none where they can't be stacked, or a stack would spare nothing."""
    ranked = {i: m.adapter for i, m in enumerate(members) if m.adapter.lora_A.shape[0] > 0}
    if len(ranked) < 2 or not stackable([*ranked.values()]):
        return []
    found = stacks(ranked)
    return found if len(found) < len(ranked) else []


def _ranked(problems: tuple[Problem, ...]) -> tuple[Problem, ...]:
    """Those that have a low-rank term, and so something to share."""
    return tuple(p for p in problems if p.rank > 0)


@cache
def _forward_pays(problems: tuple[Problem, ...], passes: int, plan: str | None) -> bool:
    """What is ``shrink_tail`` for each layer is the stack's for all; of ``published`` it takes the place if cheaper.

    Other plans run on another product, which may be what was measured to be fast: they are left as they are.
    """
    chosen = [plans.choose(p, plan).forward for p in problems]
    if all(name == "shrink_tail" for name in chosen):
        return True
    if (plan and plans.parse(plan)[0]) or not all(name in _ON_GEMM for name in chosen):
        return False
    alone = sum(plans.FORWARD[name].seconds(p) for name, p in zip(chosen, problems, strict=True))
    return costs.group_forward(problems, passes) < alone


@cache
def _backward_pays(problems: tuple[Problem, ...], passes: int, plan: str | None) -> bool:
    """What is ``blas`` for each layer is the stack's for all; of another plan it takes the place if cheaper."""
    chosen = [plans.choose(p, plan).backward for p in problems]
    if all(name == "blas" for name in chosen):
        return True
    if plan and plans.parse(plan)[1]:
        return False
    alone = sum(plans.BACKWARD[name].seconds(p) for name, p in zip(chosen, problems, strict=True))
    if problems[0].need_x:
        alone += (len(problems) - 1) * costs.sum_of_dx(problems[0])
    return costs.group_backward(problems, passes) < alone


def _stacked_forward(x: Tensor, members: Sequence[Member], found: Sequence[Stack]) -> list[tuple[Tensor, Tensor]]:
    dependent = len(found) == 1 and has_dependent_launch(x.device)
    compute_dtype = members[0].adapter.compute_dtype
    us = [x.new_empty((x.shape[0], 0), dtype=compute_dtype)] * len(members)
    for stack in found:
        factors = [members[i].adapter.lora_A for i in stack.members]
        for i, u in zip(stack.members, shrink_stack(x, factors, stack, compute_dtype, dependent), strict=True):
            us[i] = u
    ys: dict[int, Tensor] = {}
    # Those with a rank first: the launch after the stack's is the one that may begin under it.
    for i in sorted(range(len(members)), key=lambda i: us[i].shape[1] == 0):
        weight, bias, adapter = members[i]
        ys[i] = multiply(x, weight, bias, adapter, us[i], make_u=False, dependent=dependent and not ys)
    return [(ys[i], u) for i, u in enumerate(us)]


def _stacked_backward(
    grads: Sequence[Tensor | None],
    x: Tensor,
    us: Sequence[Tensor],
    members: Sequence[Member],
    need_x: bool,
    needs: Sequence[tuple[bool, bool, bool]],
    importance: Sequence[LayerImportance | None],
) -> tuple[Tensor | None, list[Gradients]]:
    dx: Tensor | None = None
    gradients: list[Gradients] = [(None, None, None)] * len(members)
    v, t = dict[int, Tensor](), dict[int, Tensor | None]()
    for i, (grad_y, (weight, _, adapter)) in enumerate(zip(grads, members, strict=True)):
        if grad_y is None:
            continue
        if need_x:
            g, w = grad_y.to(adapter.compute_dtype), weight.to(adapter.compute_dtype)
            dx = g @ w if dx is None else dx.addmm_(g, w)
        need_A, need_E, need_B = needs[i]
        if not has_low_rank(grad_y, x, adapter):
            gradients[i] = frozen_gradients(grad_y, x, weight, adapter, (False, *needs[i]))[1:]
            continue
        made, t[i] = pass_over_g(grad_y, us[i], adapter, need_x or need_A, need_E or need_B)
        if made is not None:
            v[i] = made
    da: dict[int, Tensor | None] = {}
    for stack in stacks({i: members[i].adapter for i in v}):
        factors = [members[i].adapter.lora_A for i in stack.members]
        with_da = any(needs[i][0] for i in stack.members)
        dx, shares = pass_over_x(x, [v[i] for i in stack.members], factors, stack, dx, with_da)
        da.update(zip(stack.members, shares, strict=True))
    for i in t:
        shares_of_da = da.get(i) if needs[i][0] else None
        gradients[i] = finish(t[i], shares_of_da, members[i].adapter, (need_x, *needs[i]), importance[i])
    return None if dx is None else dx.to(x.dtype), gradients


__all__ = ["backward", "explain", "forward", "shares_passes", "waits_for_the_host"]
