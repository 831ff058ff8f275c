"""The plans of the layer by name: what each can run, and which of them a call takes.

The choice is a pure function of a ``Problem``. Nothing here imports triton: a plan's kernels are imported when it is
first launched.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

from adalora_kernels.backends.triton import configurations, costs, measured
from adalora_kernels.backends.triton.launched import launches, tile
from adalora_kernels.backends.triton.problem import Problem


class Plan(NamedTuple):
    """One way to compute a direction of the layer.

    Attributes:
        name: what it is asked for by.
        kernels: those of its kernels that have a table of tiles, in the order of launches; not each runs every problem.
        obstacle: says why it can't run a problem, or None where it can.
        seconds: the calculated time of a problem.
    """

    name: str
    kernels: tuple[str, ...]
    obstacle: Callable[[Problem], str | None]
    seconds: Callable[[Problem], float]


class Choice(NamedTuple):
    """The plans of one call, and why these."""

    forward: str
    backward: str
    reason: str


def _needs_weight(problem: Problem) -> str | None:
    return "a base's output was given in place of a weight" if problem.weight_dtype is None else None


def _needs_base(problem: Problem) -> str | None:
    return None if problem.weight_dtype is None else "it adds to a base's output, and a weight was given"


def _nothing(problem: Problem) -> str | None:
    return None


def _needs_dx(problem: Problem) -> str | None:
    """Of a plan that is built around the product g W."""
    return _needs_weight(problem) or (None if problem.need_x else "the gradient of x isn't asked for")


def _fits_beside_dx(problem: Problem) -> str | None:
    """Of a plan that keeps v, T and dA in registers beside a tile of dx."""
    largest = configurations.largest_rank("one_gemm")
    too_large = f"it holds ranks up to {largest}, and this is {problem.rank}" if problem.rank > largest else None
    return _needs_dx(problem) or too_large


FORWARD = {
    plan.name: plan
    for plan in (
        Plan("published", ("gemm",), _needs_weight, costs.published),
        Plan("shrink_tail", ("shrink", "gemm"), _needs_weight, costs.shrink_tail),
        Plan("blas", ("shrink", "low_rank"), _needs_weight, costs.forward_blas),
        Plan("one_pass", ("one_pass",), _needs_weight, costs.one_pass),
        Plan("delta", ("delta",), _needs_base, costs.delta),
    )
}
BACKWARD = {
    plan.name: plan
    for plan in (
        Plan("one_gemm", ("one_gemm",), _fits_beside_dx, costs.one_gemm),
        Plan("split", ("g", "t", "v", "dx", "x"), _nothing, costs.split),
        Plan("blas", ("g", "t", "v", "x"), _needs_dx, costs.backward_blas),
    )
}
_DIRECTIONS = {"forward": FORWARD, "backward": BACKWARD}


NO_TILES = "products of the BLAS alone"


@cache
def parse(plan: str) -> tuple[str | None, str | None]:
    """The names in "forward", "forward/backward" or "/backward"; None for what is left open.

    Raises:
        ValueError: for an unknown name, or where none is given.
    """
    forward, slash, backward = plan.partition("/")
    for direction, name, given in (("forward", forward, not slash or forward), ("backward", backward, backward)):
        if given and name not in _DIRECTIONS[direction]:
            known = ", ".join(_DIRECTIONS[direction])
            raise ValueError(f"backend: expected a {direction} plan of triton ({known}), got {name!r} in {plan!r}")
    if slash and not forward and not backward:
        raise ValueError(f"backend: expected a plan of triton before or after the slash, got {plan!r}")
    return forward or None, backward or None


@cache
def choose(problem: Problem, plan: str | None = None) -> Choice:
    """The plans of a call: those asked for by name in ``plan``; else the fastest measured, or by calculated time.

    Raises:
        RuntimeError: a plan asked for by name can't run the problem, with the reason.
        TypeError, ValueError: no kernel has products of such a dtype, or holds such a rank.
    """
    forward, backward = parse(plan) if plan else (None, None)
    forward, why_forward = _pick("forward", problem, forward)
    backward, why_backward = _pick("backward", problem, backward)
    return Choice(forward, backward, f"forward {why_forward}; backward {why_backward}")


def _pick(direction: str, problem: Problem, asked: str | None) -> tuple[str, str]:
    plans = _DIRECTIONS[direction]
    if asked is not None:
        obstacle = plans[asked].obstacle(problem)
        if obstacle is not None:
            raise RuntimeError(f"backend 'triton': its {direction} plan {asked!r} can't run this call: {obstacle}")
        return asked, f"{asked} asked for by name"
    seconds = {name: plan.seconds(problem) for name, plan in plans.items() if plan.obstacle(problem) is None}
    ranking = sorted(seconds, key=lambda name: seconds[name])
    if len(ranking) == 1:
        return ranking[0], f"{ranking[0]}, the only plan that can run it"
    if (found := _measured(direction, problem, tuple(seconds))) is not None:
        return found
    frozen = costs.frozen(problem)
    times = ", ".join(f"{name} {seconds[name] / frozen:.2f}" for name in ranking)
    return ranking[0], f"{times} times the frozen product, calculated, not measured" + measured.left_aside(
        problem.capability
    )


def _measured(direction: str, problem: Problem, able: tuple[str, ...]) -> tuple[str, str] | None:
    """The plan that was fastest on such a device near the problem, and why; None where nothing like it was timed."""
    table = measured.table(problem.capability)
    timed = problem.weight_dtype is not None and not problem.dropout and (problem.need_x or direction == "forward")
    if table is None or not timed:
        return None
    m, k, n, r = problem.tokens, problem.in_features, problem.out_features, problem.rank
    point = measured.Point(m, k, n, r, problem.width.value, problem.adapter_dtype.itemsize)
    found = table.plan(direction, point, able)
    if found is None:
        return None
    name, at = found
    return name, f"{name}, measured fastest at M={at.M}, K={at.K}, N={at.N}, R={at.R} ({', '.join(table.evidence)})"


def configuration(problem: Problem, choice: Choice) -> str:
    """The tiles that the plans' kernels are launched with, in words."""
    kernels = FORWARD[choice.forward].kernels + BACKWARD[choice.backward].kernels
    found = (f"{name} {tile(name, problem)}" for name in kernels if launches(name, problem))
    return "; ".join(found) or NO_TILES


@cache
def launcher(direction: str, name: str) -> Callable[..., Any]:
    """The function of a plan: ``forward`` or ``backward`` of the module that bears its name."""
    module = import_module(f"adalora_kernels.backends.triton.{direction}.{name}")
    function: Callable[..., Any] = getattr(module, direction)
    return function


__all__ = ["BACKWARD", "FORWARD", "NO_TILES", "Choice", "Plan", "choose", "configuration", "launcher", "parse", "tile"]
