"""What must hold of every plan by itself: against fp64, and bit for bit twice."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import chain

import torch
from torch import Tensor

from adalora_kernels.backends.triton import plans
from adalora_kernels.backends.triton.problem import Problem, problem_of
from adalora_kernels.reference import svd_linear as reference
from adalora_kernels.reference.svd_linear import Adapter
from adalora_kernels.testing.inputs import LayerInputs, layer_inputs
from adalora_kernels.testing.tolerances import assert_within_budget
from benchmarks.gpu.apart import message_of, tail
from benchmarks.gpu.machine import Machine

NEEDS = (True, True, True, True)


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
    """One thing that was looked at.

    Attributes:
        outcome: "holds", "FAILED" or "skipped".
        detail: what came, or why it was skipped.
        subjects: what is not to be trusted where it failed: plans as backends ("triton:one_pass", "triton:/split"), or
            another of ``withheld``.
        trace: the end of the traceback of what was raised.
    """

    name: str
    outcome: str
    detail: str = ""
    subjects: tuple[str, ...] = ()
    trace: str = ""

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


def forward_parity(shape: Shape, plan: str, machine: Machine) -> list[Check]:
    """A forward plan, twice: within the error budget against fp64, and bit for bit the same; none if it can't run."""
    call = make_call(shape, machine)
    if plan not in able(call, "forward"):
        return []
    same_y, same_u = call.forward(reference.forward)
    exact_y, exact_u = call.exact().forward(reference.forward)
    with judged(f"{plan}: {shape}", f"triton:{plan}") as check:
        with poisoned():
            (y, u), again = (call.forward(plans.launcher("forward", plan)) for _ in range(2))
        assert_within_budget("y", y, same_y, exact_y)
        assert_within_budget("u", u[:, : shape.R], same_u, exact_u)
        assert_repeats((y, u), again)
    return check


def backward_parity(shape: Shape, plan: str, before: Sequence[str], machine: Machine) -> list[Check]:
    """Likewise a backward plan, after each of the forward plans, whose u it reads."""
    call = make_call(shape, machine)
    if plan not in able(call, "backward"):
        return []
    same = call.backward(reference.backward, call.forward(reference.forward)[1])
    exact = call.exact().backward(reference.backward, call.exact().forward(reference.forward)[1])
    found = []
    for name in before:
        with judged(f"{plan} after {name}: {shape}", f"triton:/{plan}") as check:
            with poisoned():
                u = call.forward(plans.launcher("forward", name))[1]
                first, again = (call.backward(plans.launcher("backward", plan), u) for _ in range(2))
            for quantity, *tensors in zip(("dx", "dA", "dE", "dB"), first, same, exact, strict=True):
                assert_within_budget(quantity, *tensors)  # type: ignore[arg-type]
            assert_repeats(first, again)
        found.append(check[0])
    return found


def parity(cases: tuple[Shape, ...], machine: Machine) -> Iterator[Check]:
    """Every plan of both directions; the backward ones after those forward ones that hold."""
    for shape in cases:
        forward = {name: forward_parity(shape, name, machine) for name in plans.FORWARD}
        yield from chain.from_iterable(forward.values())
        held = [name for name, found in forward.items() if any(check.outcome == "holds" for check in found)]
        for name in plans.BACKWARD:
            yield from backward_parity(shape, name, held, machine)


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
def judged(name: str, *subjects: str) -> Iterator[list[Check]]:
    """The outcome of the assertions within, in the list once they are through."""
    outcome: list[Check] = []
    try:
        yield outcome
    except Exception as error:  # a launch that fails is reported too, and the next check made
        outcome.append(Check(name, "FAILED", message_of(error), subjects, tail(error)))
    else:
        outcome.append(Check(name, "holds", subjects=subjects))


def assert_repeats(first: tuple[Tensor | None, ...], second: tuple[Tensor | None, ...]) -> None:
    """Bit for bit."""
    for a, b in zip(first, second, strict=True):
        assert (a is None) == (b is None)
        assert a is None or b is None or torch.equal(a, b), "two runs differ"


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


__all__ = [
    "SMALL", "Check", "able", "assert_repeats", "backward_parity", "forward_parity", "judged", "make_call", "parity",
    "poisoned", "shapes", "sync_is_an_error",
]  # fmt: skip
