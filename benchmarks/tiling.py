"""The fastest tile of each kernel: from the one in use one field is changed at a time, while the layer gets faster.

Candidates are first tried by processes of their own, side by side, which compile them: whoever does not fit, spills,
crashes or hangs is out before this process launches it. What is left is timed here with nothing else on the device, in
turn with the best so far, and given up after a few rounds where it is clearly slower.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adalora_kernels.backends.triton import group, measured, plans, rank_padding
from adalora_kernels.backends.triton.launch import kept_kernels
from adalora_kernels.backends.triton.launched import tile as tile_in_use
from adalora_kernels.backends.triton.tiles import Tile
from adalora_kernels.reference.svd_linear_group import Member
from benchmarks.gpu.apart import Apart, Failed, Here, message_of
from benchmarks.gpu.layers import Case, Layer, adapter_of, layers, problem
from benchmarks.gpu.machine import Machine, Run
from benchmarks.timing import Sample, ratio

SHAPES, DRY_SHAPES = ((768, 3072), (4096, 4096)), ((32, 48),)
TOKENS, DRY_TOKENS = 8192, 24
BLOCKS, WARPS, STAGES = (16, 32, 64, 128, 256), (4, 8), (1, 2, 3, 4, 5)
GAIN = 1.01  # less is noise
_CLEARLY, _FIRST_ROUNDS = 1.2, 3  # so much slower in so many rounds is enough
_SECONDS = 60.0  # to compile a candidate and run it once
_SHARED, _REGISTERS = 232_448, 255  # bytes a block, of every device; 4-byte registers a thread

Outputs = tuple[Tensor | None, ...]


@dataclass
class Climb:
    """The search for one kernel's tile.

    Attributes:
        case: kernel, direction, plan, rank and source.
        sets: inputs by problem.
        want: what the tile in use computes.
        first, best: tiles.
        graphs: replays of the best one.
        candidates: what came of each tile, in order.
        over_first: time of the best over that of the first.
    """

    case: dict[str, Any]
    sets: dict[Case, list[Layer]]
    want: dict[Case, list[Tensor]]
    first: Tile
    best: Tile
    graphs: dict[Case, Run]
    candidates: dict[Tile, dict[str, Any]] = field(default_factory=dict)
    over_first: float = 1.0
    done: bool = False

    def record(self) -> dict[str, Any]:
        """As it is written down."""
        tried = [{"tile": astuple(tile), **found} for tile, found in self.candidates.items()]
        return {
            "benchmark": "tile", "case": self.case, "tile": astuple(self.best), "gain": 1 / self.over_first,
            "candidates": tried,
        }  # fmt: skip


def problems(case: dict[str, Any], machine: Machine) -> list[Case]:
    """The layers that a kernel is timed in."""
    shapes, tokens = (DRY_SHAPES, DRY_TOKENS) if machine.dry else (SHAPES, TOKENS)
    return [Case(k, n, tokens, case["rank"], "float32") for k, n in shapes]


def begun(case: dict[str, Any], machine: Machine) -> Climb:
    """A search that has run the tile in use alone."""
    sets = {each: layers(each, machine) for each in problems(case, machine)}
    each, of = next(iter(sets.items()))
    first = tile_in_use(case["kernel"], problem(each, of[0]))
    want, graphs = {}, {}
    with measured.trial(case["kernel"], astuple(first)):
        for each, of in sets.items():
            call = call_of(case, each)
            want[each] = [t.clone() for t in call(of[0]) if t is not None]
            graphs[each] = machine.recorded([partial(call, layer) for layer in of])
    return Climb(case, sets, want, first, first, graphs, {first: {"seconds_over_best": 1.0}})


def climbed(cases: Sequence[dict[str, Any]], machine: Machine, runners: Sequence[Apart | Here]) -> list[Climb]:
    """The searches of several kernels, step by step together, so that all processes have something to compile."""
    climbs = [begun(case, machine) for case in cases]
    with ThreadPoolExecutor(len(runners)) as pool:
        while active := [climb for climb in climbs if not climb.done]:
            jobs = []
            for climb in active:
                new = [tile for tile in neighbours(climb.best) if tile not in climb.candidates and not hopeless(tile)]
                jobs += [(climb, tile) for tile in new[: 2 if machine.dry else None]]
                climb.done = True
            free = list(runners)

            def tried(job: tuple[Climb, Tile], free: list[Apart | Here] = free) -> dict[str, Any]:
                runner = free.pop()
                try:
                    found: dict[str, Any] = runner.run(attempt, job[0].case, job[1], machine, seconds=_SECONDS)
                except Failed as failure:
                    found = {"out": str(failure)[:300]}
                finally:
                    free.append(runner)
                return found

            for (climb, tile), found in list(zip(jobs, pool.map(tried, jobs), strict=True)):
                climb.candidates[tile] = found
                if "out" not in found and compared(climb, tile, machine) and not machine.dry:
                    climb.done = False
    return climbs


def attempt(case: dict[str, Any], tile: Tile, machine: Machine) -> dict[str, Any]:
    """Compile a candidate and run it once on each problem; what it takes, and why it is out, if it is."""
    before = set(kept_kernels())
    with measured.trial(case["kernel"], astuple(tile)):
        for each in problems(case, machine):
            call_of(case, each)(layers(each, machine, most=1)[0])
        machine.wait()
    new = [kernel for kernel in set(kept_kernels()) - before if kernel.n_regs]
    machine.forget()
    taken = {"registers": max((k.n_regs for k in new), default=0), "spills": max((k.n_spills for k in new), default=0)}
    return taken | ({"out": f"{taken['spills']} spills"} if taken["spills"] else {})


def compared(climb: Climb, tile: Tile, machine: Machine) -> bool:
    """Time a candidate in turn with the best, whose place it takes where it is faster; whether it does."""
    found, over, graphs = climb.candidates[tile], 1.0, dict[Case, Run]()
    microseconds: list[float] = []
    with measured.trial(climb.case["kernel"], astuple(tile)):
        try:
            for each, of in climb.sets.items():
                call = call_of(climb.case, each)
                computed = [t for t in call(of[0]) if t is not None]
                if not all(alike(a, b) for a, b in zip(computed, climb.want[each], strict=True)):
                    found["out"] = "it computes something else"
                    return False
                graphs[each] = machine.recorded([partial(call, layer) for layer in of])
                both = {"best": climb.graphs[each], "candidate": graphs[each]}
                seconds = replace(machine, rounds=min(_FIRST_ROUNDS, machine.rounds)).replays(both)
                if ratio(seconds["candidate"], seconds["best"]) < _CLEARLY:
                    seconds = machine.replays(both)
                over *= ratio(seconds["candidate"], seconds["best"])
                microseconds.append(1e6 * Sample.of(seconds["candidate"]).median / len(of))
                if over > _CLEARLY:
                    break
        except Exception as error:  # a candidate that fails is out; the others are tried
            found["out"] = message_of(error)[:300]
            return False
    found |= {"seconds_over_best": over, "microseconds": microseconds}
    if over * GAIN >= 1 or len(graphs) < len(climb.sets):
        return False
    climb.best, climb.graphs, climb.over_first = tile, graphs, climb.over_first * over
    return True


def neighbours(tile: Tile) -> list[Tile]:
    """Tiles that differ in one field by one step."""
    found = []
    steps = {"block_m": BLOCKS, "block_n": BLOCKS, "block_k": BLOCKS, "num_warps": WARPS, "num_stages": STAGES}
    for name, values in steps.items():
        value = getattr(tile, name)
        if value in values:  # a dimension that the kernel does not block is 0
            place = values.index(value)
            near = (*values[max(0, place - 1) : place], *values[place + 1 :][:1])
            found += [replace(tile, **{name: v}) for v in near]
    return found


def hopeless(tile: Tile) -> bool:
    """Whether 16-bit operands in the pipeline or fp32 sums can't fit, whichever of N and K is summed over."""
    m, n, k = tile.block_m, tile.block_n, tile.block_k
    if not (n and k):
        return False
    operands = min((m + n) * k, (m + k) * n) * 2 * max(1, tile.num_stages - 1)
    sums = m * min(n, k) // (32 * tile.num_warps)
    return operands > _SHARED or sums > _REGISTERS


def call_of(case: dict[str, Any], problem: Case) -> Callable[[Layer], Outputs]:
    """The launcher of the case's plan, on one set of inputs."""
    if case["kernel"].startswith("group_"):
        return _stack_of(case, problem)
    launcher = plans.launcher(case["direction"], case["plan"])

    def call(layer: Layer) -> Outputs:
        with torch.no_grad():
            adapter = adapter_of(problem, layer)
            if case["direction"] == "forward":
                return launcher(layer.x, layer.weight, layer.bias, None, adapter)
            u = layer.x.new_ones(problem.M, rank_padding(problem.R))
            return launcher(layer.grad_y, layer.x, u, layer.weight, adapter, (True,) * 4)

    return call


def _stack_of(case: dict[str, Any], problem: Case) -> Callable[[Layer], Outputs]:
    """Likewise of two layers with one x and one W, and half of the triplets each."""
    half = problem.R // 2

    def call(layer: Layer) -> Outputs:
        with torch.no_grad():
            whole = adapter_of(problem, layer)
            members = []
            for own in (slice(half), slice(half, None)):
                a, e, b = whole.lora_A[own], whole.lora_E[own], whole.lora_B[:, own]
                members.append(Member(layer.weight, layer.bias, whole._replace(lora_A=a, lora_E=e, lora_B=b)))
            if case["direction"] == "forward":
                made = group.forward(layer.x, members, case["plan"])
                return tuple(tensor for pair in made for tensor in pair)
            us = [layer.x.new_ones(problem.M, rank_padding(half))] * 2
            grads, needs = [layer.grad_y] * 2, [(True,) * 3] * 2
            dx, found = group.backward(grads, layer.x, us, members, True, needs, f"/{case['plan']}")
            return (dx, *(gradient for of_member in found for gradient in of_member))

    return call


def alike(a: Tensor, b: Tensor) -> bool:
    """Equal but for the order of sums and their rounding."""
    return bool((a.float() - b.float()).norm() <= 1e-2 * b.float().norm())


__all__ = ["Climb", "alike", "attempt", "begun", "climbed", "compared", "hopeless", "neighbours"]
