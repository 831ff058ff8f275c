"""One case, timed: every contestant in one process, interleaved, as replays of a graph that rotates its inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adalora_kernels.backends import triton
from benchmarks.gpu import layers as contest
from benchmarks.gpu.layers import Call, Case, Layer
from benchmarks.gpu.machine import Machine, Run
from benchmarks.gpu.withheld import BOTH, FORWARD, Withheld, why
from benchmarks.timing import Sample, ratio

NOTHING: Withheld = {}
_AGAIN = "frozen, once more"


def measure(case: Case, machine: Machine, compiled: bool = False, withheld: Withheld = NOTHING) -> list[dict[str, Any]]:
    """Forward, and forward + backward, of every contestant.

    Args:
        case: the layer.
        machine: where.
        compiled: whether torch.compile of PEFT's expression takes part.
        withheld: what failed its checks; who depends on it is not timed, nor is who computes something else here.

    Returns:
        Two records: the case, the direction, the microseconds of each contestant, their ratios to the frozen linear
        within the rounds, and who was withheld and why.
    """
    sets = contest.layers(case, machine)
    for layer in sets:
        contest.add_peft(case, layer)
    plan, configuration, reason = explain(case, sets[0])
    chosen_forward = plan.partition("/")[0]
    rivals = contest.rivals(case, machine, compiled)
    chosen = {contest.OURS: contest.ours(case, "triton")}
    forward = {name: contest.ours(case, name) for name in contest.forward_plans(case, sets[0])}
    backward = {name: contest.ours(case, name) for name in contest.backward_plans(case, sets[0])}
    plans = {contest.OURS: plan}
    plans |= {name: f"{name.partition(':')[2]}/" for name in forward}
    plans |= {name: chosen_forward + name.partition(":")[2] for name in backward}
    about: dict[str, Any] = {
        "benchmark": "layer", "case": case.record(), "plan": plan, "configuration": configuration, "reason": reason
    }  # fmt: skip
    directions: tuple[tuple[str, dict[str, Call], Callable[[str, Call, Layer], Run]], ...] = (
        (FORWARD, rivals | chosen | forward, forward_run),
        (BOTH, rivals | chosen | backward, both_run),
    )
    records = []
    for direction, calls, prepare in directions:
        out = {name: said for name in calls if name in plans and (said := why(withheld, plans[name], direction))}
        calls = {name: call for name, call in calls.items() if name not in out}
        out |= contest.disagreeing(calls, sets[0], direction)
        if contest.OURS in calls and contest.OURS not in out:
            about["saved_bytes"] = saved_bytes(calls[contest.OURS], sets[0])
        runs = {name: [prepare(name, call, layer) for layer in sets] for name, call in calls.items() if name not in out}
        record = about | {"direction": direction, "copies": len(sets), **replayed(runs, machine)}
        records.append(record | ({"withheld": out} if out else {}))
    return records


def replayed(runs: Mapping[str, Sequence[Run]], machine: Machine) -> dict[str, Any]:
    """Times and ratios of contestants, each of which has as many runs, replayed as one graph; the frozen one twice."""
    pool = machine.pool()
    repeats = machine.repeats(runs[contest.FROZEN])
    graphs = {name: machine.recorded([*of] * repeats, pool) for name, of in runs.items()}
    graphs[_AGAIN] = machine.recorded([*runs[contest.FROZEN]] * repeats, pool)
    seconds = machine.replays(graphs)
    state = machine.state()
    del graphs
    machine.forget()
    return _summary(seconds, repeats * len(runs[contest.FROZEN])) | ({"device": state} if state else {})


def _summary(seconds: dict[str, list[float]], runs: int) -> dict[str, Any]:
    """Medians with 20/80 percentiles per run, in µs, the ratios to the frozen linear, and the noise."""
    noise = abs(ratio(seconds.pop(_AGAIN), seconds[contest.FROZEN]) - 1)
    scaled = {name: [1e6 * s / runs for s in values] for name, values in seconds.items()}
    return {
        "microseconds": {name: vars(Sample.of(values)) for name, values in scaled.items()},
        "ratio_to_frozen": {name: ratio(values, seconds[contest.FROZEN]) for name, values in seconds.items()},
        "noise": noise,
        "runs": runs,
        "rounds": len(seconds[contest.FROZEN]),
    }


def forward_run(name: str, call: Call, layer: Layer) -> Run:
    """Without autograd; ours writes the u that the backward would read all the same."""

    def run() -> Tensor:
        with torch.no_grad():
            return call(layer)

    return run


def both_run(name: str, call: Call, layer: Layer) -> Run:
    """With the gradients of x and the adapter; the frozen linear has that of x alone."""
    leaves = [layer.x] if name == contest.FROZEN else layer.leaves
    return lambda: torch.autograd.grad(call(layer), leaves, layer.grad_y)


def explain(case: Case, layer: Layer) -> tuple[str, str, str]:
    """The plan that is chosen, its configuration, and why."""
    return triton.explain(layer.x, layer.weight, contest.adapter_of(case, layer))


def saved_bytes(call: Call, layer: Layer) -> int:
    """What ours keeps for the backward beyond x, W, bias and the adapter."""
    saved: list[Tensor] = []
    own = {t.data_ptr() for t in (layer.weight, layer.bias, *layer.leaves) if t is not None}

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call(layer)
    return sum(t.nbytes for t in saved if t.data_ptr() not in own)


__all__ = ["NOTHING", "explain", "measure", "replayed", "saved_bytes"]
