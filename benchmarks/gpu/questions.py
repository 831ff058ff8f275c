"""``--part questions``: the measurements that decide between designs, as far as the kernels that exist can answer.

A rank of 0 makes a plan's kernel the plain product, which is how Triton's products are set against cuBLAS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from adalora_kernels.backends.triton import plans
from adalora_kernels.backends.triton.launch import launch
from benchmarks.gpu import fused
from benchmarks.gpu import layers as contest
from benchmarks.gpu.host import queued
from benchmarks.gpu.layers import Case, Layer
from benchmarks.gpu.machine import Machine, Run
from benchmarks.gpu.rows import RANK, TOKENS
from benchmarks.gpu.timed import replayed
from benchmarks.gpu.withheld import ENGINE, Withheld
from benchmarks.timing import Sample

PEAK = 8192
Calls = dict[str, Callable[[Layer], object]]


Question = tuple[str, Callable[..., list[dict[str, Any]]], tuple[Any, ...]]


def questions(
    machine: Machine, shapes: Sequence[tuple[int, int]], tokens: Sequence[int], withheld: Withheld
) -> Iterator[Question]:
    """What a question is known again by, and what to call for its records; the decisive shapes first."""
    yield "ceilings", single, (ceilings, machine)
    yield "host time of a launch", single, (launches, machine)
    for size in fused.sizes(machine) if ENGINE not in withheld else ():
        yield f"importance in a backward, {size}", single, (fused.of_size, machine, size)
    for m in sorted(tokens, key=lambda m: m != TOKENS):
        for k, n in shapes:
            plain, case = Case(k, n, m, 0, "bfloat16"), Case(k, n, m, RANK, "bfloat16")
            yield f"plain product, {plain}", single, (products, plain, machine, withheld)
            yield f"accumulation, {case}", single, (accumulation, case, machine)
            yield f"backward passes, {case}", single, (passes, case, machine, withheld)


def single(measure: Callable[..., dict[str, Any]], *args: Any) -> list[dict[str, Any]]:
    """As a list of one record."""
    return [measure(*args)]


def timed(question: str, case: Case, sets: list[Layer], calls: Calls, machine: Machine) -> dict[str, Any]:
    """Each call over every set of inputs, recorded as one graph."""
    runs = {name: [partial(call, layer) for layer in sets] for name, call in calls.items()}
    return {"benchmark": question, "case": case.record(), **replayed(runs, machine)}


def ceilings(machine: Machine) -> dict[str, Any]:
    """What the device reaches: a large product in bf16, and a copy that counts bytes read and written."""
    side = 64 if machine.dry else PEAK
    a, b = (torch.randn(side, side, device=machine.device, dtype=contest.DTYPE) for _ in range(2))
    source = torch.empty((1 << 10) if machine.dry else (1 << 30), dtype=torch.uint8, device=machine.device).random_()
    target = torch.empty_like(source)
    product, copy = machine.recorded([lambda: a @ b]), machine.recorded([lambda: target.copy_(source)])
    seconds = machine.replays({"product": product, "copy": copy})
    best = {name: Sample.of(values).median for name, values in seconds.items()}
    return {
        "benchmark": "ceilings",
        "case": {"side": side, "dtype": "bfloat16", "bytes": source.numel()},
        "teraflops": 2 * side**3 / best["product"] / 1e12,
        "terabytes_per_second": 2 * source.numel() / best["copy"] / 1e12,
    }


def products(case: Case, machine: Machine, withheld: Withheld) -> dict[str, Any]:
    """cuBLAS against the plain product of each forward plan: what its mainloop is worth without the low-rank term."""
    sets = contest.layers(case, machine)
    calls: Calls = {contest.FROZEN: _frozen}
    for backend in contest.forward_plans(case, sets[0]):
        if backend in withheld:
            continue
        calls[backend] = _without_autograd(contest.ours(case, backend))
    return timed("plain product", case, sets, calls, machine)


def accumulation(case: Case, machine: Machine) -> dict[str, Any]:
    """cuBLAS adding x Wᵀ to what is there (beta = 1) against the product first and the low-rank term by addmm_."""
    sets = contest.layers(case, machine)
    low_rank = torch.randn(case.M, case.R, device=machine.device, dtype=contest.DTYPE)

    def beta_one(layer: Layer) -> Tensor:
        y = low_rank @ layer.adapter[2].detach().t()
        return y.addmm_(layer.x.detach(), layer.weight.t())

    def base_first(layer: Layer) -> Tensor:
        return _frozen(layer).addmm_(low_rank, layer.adapter[2].detach().t())

    calls: Calls = {
        contest.FROZEN: _frozen, "low-rank, then beta = 1": beta_one, "base, then addmm_": base_first,
    }  # fmt: skip
    return timed("accumulation", case, sets, calls, machine)


def passes(case: Case, machine: Machine, withheld: Withheld) -> dict[str, Any]:
    """Each backward plan with only some gradients asked for: dE and dB read g alone, dA reads g and x."""
    sets = contest.layers(case, machine)
    u = torch.randn(case.M, -(-case.R // 16) * 16, device=machine.device, dtype=contest.DTYPE)
    wanted = {"dE and dB": (False, False, True, True), "dA": (False, True, False, False), "all": (True,) * 4}

    def backward(name: str, needs: tuple[bool, ...], layer: Layer) -> object:
        run = plans.launcher("backward", name)
        return run(layer.grad_y, layer.x, u, layer.weight, contest.adapter_of(case, layer), needs)

    calls: Calls = {contest.FROZEN: lambda layer: layer.grad_y @ layer.weight}
    for backend in contest.backward_plans(case, sets[0]):
        if backend in withheld:
            continue
        name = backend.partition("/")[2]
        calls |= {
            f"{name}: {what}": _without_autograd(partial(backward, name, needs)) for what, needs in wanted.items()
        }
    record = timed("backward passes", case, sets, calls, machine)
    return record | {"bytes": {"g": sets[0].grad_y.nbytes, "x": sets[0].x.nbytes}}


@triton.jit
def _nothing_kernel(a_ptr, b_ptr, c_ptr, d_ptr, m, n, k, stride_a, stride_b, stride_c, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """As many arguments as a kernel has, and no work."""
    tl.store(d_ptr + tl.arange(0, BLOCK), tl.load(a_ptr + tl.arange(0, BLOCK)))


def launches(machine: Machine) -> dict[str, Any]:
    """Host time of one launch, through Triton's front and of a kept kernel."""
    tensors = [torch.zeros(64, device=machine.device) for _ in range(4)]
    args = (*tensors, 4096, 768, 768, 768, 1, 768)
    calls = 1 if machine.dry else 200
    runs: dict[str, Run] = {
        "front": lambda: _nothing_kernel[(1,)](*args, BLOCK=64, num_warps=1),
        "kept": lambda: launch(_nothing_kernel, (1,), *args, BLOCK=64, num_warps=1),
    }
    seconds = machine.interleaved({name: queued(run, calls, machine) for name, run in runs.items()})
    scaled = {name: [1e6 * s / calls for s in values] for name, values in seconds.items()}
    return {
        "benchmark": "host time of a launch",
        "case": {"arguments": len(args), "calls": calls},
        "microseconds": {name: vars(Sample.of(values)) for name, values in scaled.items()},
        "rounds": machine.rounds,
    }


def _frozen(layer: Layer) -> Tensor:
    return F.linear(layer.x.detach(), layer.weight, layer.bias)


def _without_autograd(call: Callable[[Layer], object]) -> Callable[[Layer], object]:
    def run(layer: Layer) -> object:
        with torch.no_grad():
            return call(layer)

    return run


__all__ = ["ceilings", "questions", "single"]
