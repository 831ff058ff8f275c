"""What the public call must hold beyond its numbers: in a CUDA graph, without a host sync, on two streams at once."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from adalora_kernels import svd_linear
from adalora_kernels.testing.inputs import layer_inputs
from benchmarks.gpu.checks import (
    SHAPES,
    SMALL,
    Check,
    Shape,
    able,
    assert_repeats,
    judged,
    make_call,
    sync_is_an_error,
)
from benchmarks.gpu.machine import Machine


def shape_of(machine: Machine) -> Shape:
    """Where most plans can run."""
    return SMALL[0] if machine.dry else SHAPES[4]


def pairs(machine: Machine) -> list[str]:
    """ "forward/backward" so that every plan that can run the shape occurs."""
    call = make_call(shape_of(machine), machine)
    forward, backward = (able(call, direction) for direction in ("forward", "backward"))
    return [f"{f}/{b}" for f, b in zip(forward, itertools.cycle(backward))] + [
        f"{forward[0]}/{b}" for b in backward[len(forward) :]
    ]


def subjects(plan: str) -> tuple[str, str]:
    """Both plans of a pair: which of them a failure comes from isn't known."""
    forward, _, backward = plan.partition("/")
    return f"triton:{forward}", f"triton:/{backward}"


def eager_step(shape: Shape, machine: Machine, plan: str, dropout_p: float = 0.0) -> Callable[[], tuple[Any, ...]]:
    """Forward and backward through the public call, bare; each run gives the same numbers, unless dropout draws."""
    i = layer_inputs(
        shape.M, shape.K, shape.N, shape.R, shape.dtype, shape.adapter, bias=False, device=machine.device
    )  # fmt: skip
    leaves = [t.requires_grad_() for t in (i.x, i.lora_A, i.lora_E, i.lora_B)]

    def step() -> tuple[Any, ...]:
        y = svd_linear(i.x, i.weight, *leaves[1:], dropout_p=dropout_p, backend=f"triton:{plan}")
        return (y.detach(), *torch.autograd.grad(y, leaves, i.grad_y))

    return step


def in_a_graph(plan: str, machine: Machine) -> list[Check]:
    """Captured forward and backward: two replays give what eager calls give."""
    shape = shape_of(machine)
    with judged(f"{plan}: replayed from a CUDA graph, {shape}", *subjects(plan)) as check:
        step = eager_step(shape, machine, plan)
        want = step()
        found: list[tuple[Tensor, ...]] = []
        replay = machine.recorded([lambda: found.append(step())])
        for _ in range(2):
            for tensor in found[-1] if found else ():
                tensor.fill_(torch.nan)
            replay()
            machine.wait()
            assert_repeats(want, found[-1])
    return check


def without_sync(plan: str, machine: Machine) -> list[Check]:
    """Forward and backward, dropout drawn, with every synchronising call an error."""
    shape = shape_of(machine)
    name = f"{plan}: no host sync, {shape}"
    if machine.dry:
        return [Check(name, "skipped", "the CPU has nothing to wait for")]
    with judged(name, *subjects(plan)) as check:
        step = eager_step(shape, machine, plan, dropout_p=0.1)
        step()
        machine.wait()
        with sync_is_an_error(machine):
            step()
    return check


def on_two_streams(plan: str, machine: Machine) -> list[Check]:
    """Many steps on two streams at once give what one gives alone."""
    shape = shape_of(machine)
    name = f"{plan}: two streams, {shape}"
    if machine.dry:
        return [Check(name, "skipped", "the CPU has one stream")]
    with judged(name, *subjects(plan)) as check:
        step = eager_step(shape, machine, plan)
        want = step()
        machine.wait()
        streams = [torch.cuda.Stream() for _ in range(2)]
        results: list[tuple[Any, ...]] = []
        for _ in range(10):
            for stream in streams:
                with torch.cuda.stream(stream):
                    results.append(step())
        machine.wait()
        for found in results:
            assert_repeats(want, found)
    return check


CHECKS = (in_a_graph, without_sync, on_two_streams)

__all__ = ["CHECKS", "in_a_graph", "on_two_streams", "pairs", "subjects", "without_sync"]
