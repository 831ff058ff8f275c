"""What must hold before anything is timed: every plan against fp64, bit for bit twice, in a graph, without a sync."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from adalora_kernels import svd_linear
from adalora_kernels.backends.triton import plans
from adalora_kernels.backends.triton.problem import Problem, problem_of
from adalora_kernels.reference import svd_linear as reference
from adalora_kernels.reference.svd_linear import Adapter
from adalora_kernels.testing.inputs import LayerInputs, layer_inputs
from adalora_kernels.testing.tolerances import assert_within_budget
from benchmarks.gpu.machine import Machine

NEEDS = (True, True, True, True)
DIRECTIONS = ("forward", "backward")


@dataclass(frozen=True)
class Shape:
    """One layer call: M, K, N, R, and the dtypes of x and of the adapter.

    ``full`` adds bias, mask, dropout and an x whose address is no multiple of 16; ``into_base`` adds to the output of a
    base in place of x Wᵀ.
    """

    M: int
    K: int
    N: int
    R: int
    dtype: torch.dtype
    adapter: torch.dtype
    full: bool = False
    into_base: bool = False

    def __str__(self) -> str:
        dtypes = "/".join(str(dtype).removeprefix("torch.") for dtype in (self.dtype, self.adapter))
        more = (", full" if self.full else "") + (", into a base" if self.into_base else "")
        return f"{self.M}x{self.K}x{self.N} r={self.R} {dtypes}{more}"


# Each dtype and option is another compilation of every kernel, which is what takes the time.
SMALL = (
    Shape(40, 33, 72, 12, torch.bfloat16, torch.float32, full=True),
    Shape(40, 33, 72, 12, torch.bfloat16, torch.float32, into_base=True),
    Shape(150, 70, 140, 33, torch.float32, torch.float32, full=True),
)
SHAPES = (
    *SMALL,
    Shape(129, 100, 130, 128, torch.float16, torch.float32),
    Shape(257, 768, 768, 16, torch.bfloat16, torch.float32),
    Shape(1000, 768, 3072, 64, torch.float16, torch.float16, full=True),
    Shape(513, 3072, 768, 8, torch.bfloat16, torch.bfloat16),
    Shape(1024, 4096, 4096, 16, torch.bfloat16, torch.float32),
    Shape(300, 1024, 2048, 16, torch.float32, torch.float32, into_base=True),
)


def shapes(machine: Machine) -> tuple[Shape, ...]:
    """Those that parity is checked at."""
    return SMALL[:2] if machine.dry else SHAPES


@dataclass(frozen=True)
class Check:
    """One thing that was looked at; ``outcome`` is "holds", "FAILED" or "skipped"."""

    name: str
    outcome: str
    detail: str = ""

    def record(self) -> dict[str, str]:
        """As it is written down."""
        return asdict(self)


@dataclass(frozen=True)
class Call:
    """Arguments of one call, as launchers take them."""

    inputs: LayerInputs
    adapter: Adapter
    base: Tensor | None

    @property
    def weight(self) -> Tensor | None:
        """None where a base's output takes its place."""
        return None if self.base is not None else self.inputs.weight

    def forward(self, launch: Callable[..., tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """y and u."""
        if self.base is not None:
            return launch(self.inputs.x, None, None, self.base.clone(), self.adapter)
        return launch(self.inputs.x, self.inputs.weight, self.inputs.bias, None, self.adapter)

    def backward(self, launch: Callable[..., tuple[Tensor | None, ...]], u: Tensor) -> tuple[Tensor | None, ...]:
        """dx, dA, dE and dB."""
        return launch(self.inputs.grad_y, self.inputs.x, u, self.weight, self.adapter, NEEDS)

    def exact(self) -> Call:
        """The same in fp64."""
        inputs = self.inputs.to(torch.float64)
        adapter = self.adapter._replace(
            lora_A=inputs.lora_A, lora_E=inputs.lora_E, lora_B=inputs.lora_B, compute_dtype=torch.float64
        )
        return Call(inputs, adapter, None if self.base is None else self.base.double())

    @property
    def problem(self) -> Problem:
        """What the plans say that they can or can't run."""
        return problem_of(self.inputs.x, self.weight, self.adapter)


def make_call(shape: Shape, machine: Machine) -> Call:
    """Random inputs."""
    m, k, n, r, full = shape.M, shape.K, shape.N, shape.R, shape.full
    inputs = layer_inputs(m, k, n, r, shape.dtype, shape.adapter, bias=full, device=machine.device)
    mask = seed = None
    if full:
        shifted = torch.empty(m * k + 1, dtype=shape.dtype, device=machine.device)[1:].view(m, k)
        inputs = replace(inputs, x=shifted.copy_(inputs.x))
        mask = (torch.arange(r, device=machine.device) % 3 != 1).view(-1, 1)
        seed = torch.tensor([987654321], dtype=torch.int64, device=machine.device)
    base = layer_inputs(m, n, 1, 0, shape.dtype, device=machine.device, seed=1).x if shape.into_base else None
    options = (mask, seed, 1.7, 0.3 if full else 0.0, shape.dtype)
    return Call(inputs, Adapter(inputs.lora_A, inputs.lora_E, inputs.lora_B, *options), base)


def able(call: Call, direction: str) -> list[str]:
    """The plans of a direction that can run the call."""
    table = plans.FORWARD if direction == "forward" else plans.BACKWARD
    return [name for name, plan in table.items() if plan.obstacle(call.problem) is None]


def parity(cases: tuple[Shape, ...], machine: Machine) -> Iterator[Check]:
    """Every plan of both directions, twice: within the error budget against fp64, and bit for bit the same."""
    for shape in cases:
        call = make_call(shape, machine)
        same_y, same_u = call.forward(reference.forward)
        exact_y, exact_u = call.exact().forward(reference.forward)
        us = {}
        for name in able(call, "forward"):
            with judged(f"{name}: {shape}") as check:
                with poisoned():
                    (y, us[name]), again = (call.forward(plans.launcher("forward", name)) for _ in range(2))
                assert_within_budget("y", y, same_y, exact_y)
                assert_within_budget("u", us[name][:, : shape.R], same_u, exact_u)
                assert_repeats((y, us[name]), again)
            yield check[0]
        same = call.backward(reference.backward, same_u)
        exact = call.exact().backward(reference.backward, exact_u)
        for (before, u), name in itertools.product(us.items(), able(call, "backward")):
            with judged(f"{name} after {before}: {shape}") as check:
                with poisoned():
                    found, repeated = (call.backward(plans.launcher("backward", name), u) for _ in range(2))
                for quantity, *tensors in zip(("dx", "dA", "dE", "dB"), found, same, exact, strict=True):
                    assert_within_budget(quantity, *tensors)  # type: ignore[arg-type]
                assert_repeats(found, repeated)
            yield check[0]


@contextmanager
def poisoned() -> Iterator[None]:
    """What is allocated within holds NaN until a kernel writes it."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that cuBLAS would want a workspace to be deterministic in
            yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def judged(name: str) -> Iterator[list[Check]]:
    """The outcome of the assertions within, in the list once they are through."""
    outcome: list[Check] = []
    try:
        yield outcome
    except AssertionError as error:
        outcome.append(Check(name, "FAILED", str(error)))
    except Exception as error:  # a launch that fails is reported too, and the next check made
        outcome.append(Check(name, "FAILED", f"{type(error).__name__}: {error}"))
    else:
        outcome.append(Check(name, "holds"))


def assert_repeats(first: tuple[Tensor | None, ...], second: tuple[Tensor | None, ...]) -> None:
    """Bit for bit."""
    for a, b in zip(first, second, strict=True):
        assert (a is None) == (b is None)
        assert a is None or b is None or torch.equal(a, b), "two runs differ"


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


def pairs(shape: Shape, machine: Machine) -> list[str]:
    """ "forward/backward" so that every plan that can run the shape occurs."""
    call = make_call(shape, machine)
    forward, backward = (able(call, direction) for direction in DIRECTIONS)
    return [f"{f}/{b}" for f, b in zip(forward, itertools.cycle(backward))] + [
        f"{forward[0]}/{b}" for b in backward[len(forward) :]
    ]


def in_a_graph(shape: Shape, machine: Machine) -> Iterator[Check]:
    """Captured forward and backward: two replays give what eager calls give."""
    for plan in pairs(shape, machine):
        with judged(f"{plan}: replayed from a CUDA graph, {shape}") as check:
            step = eager_step(shape, machine, plan)
            want = step()
            found: list[tuple[Tensor, ...]] = []
            replay = machine.recorded([lambda step=step, found=found: found.append(step())])  # type: ignore[misc]
            for _ in range(2):
                for tensor in found[-1] if found else ():
                    tensor.fill_(torch.nan)
                replay()
                machine.wait()
                assert_repeats(want, found[-1])
        yield check[0]


def without_sync(shape: Shape, machine: Machine) -> Iterator[Check]:
    """Forward and backward, dropout drawn, with every synchronising call an error."""
    for plan in pairs(shape, machine):
        name = f"{plan}: no host sync, {shape}"
        if machine.dry:
            yield Check(name, "skipped", "the CPU has nothing to wait for")
            continue
        step = eager_step(shape, machine, plan, dropout_p=0.1)
        step()
        machine.wait()
        try:
            with sync_is_an_error(machine):
                step()
        except RuntimeError as error:
            yield Check(name, "FAILED", str(error))
        else:
            yield Check(name, "holds")


def on_two_streams(shape: Shape, machine: Machine) -> Iterator[Check]:
    """Many steps on two streams at once give what one gives alone."""
    for plan in pairs(shape, machine):
        name = f"{plan}: two streams, {shape}"
        if machine.dry:
            yield Check(name, "skipped", "the CPU has one stream")
            continue
        with judged(name) as check:
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
        yield check[0]


@contextmanager
def sync_is_an_error(machine: Machine) -> Iterator[None]:
    """Whatever waits for the device within raises."""
    if machine.dry:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def public_call(machine: Machine) -> Iterator[Check]:
    """What the public call must hold beyond its numbers."""
    shape = SMALL[0] if machine.dry else SHAPES[4]  # which plans can run
    for check in (in_a_graph, without_sync, on_two_streams):
        yield from check(shape, machine)


__all__ = [
    "SMALL", "Check", "assert_repeats", "judged", "parity", "poisoned", "public_call", "shapes", "sync_is_an_error"
]  # fmt: skip
