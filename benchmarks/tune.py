"""``python3 -m benchmarks.tune``: measure tiles and plans on this device, and write the table that chooses by them.

Tiles: for every kernel of every plan and each rank, from the tile in use one field is changed at a time for as long as
the layer gets faster; whoever computes something else, spills or does not fit is out. Plans: of each case in the record
of the full sweep (``make gpu PART=i/n``) the fastest. Begun again, it goes on where it was cut off. The table is
``adalora_kernels/backends/triton/measured.json``; its evidence, every candidate with its time, lies in
``benchmarks/results/<device>-tuning.json``. ``--dry`` walks the same code on the CPU and writes to build/dry alone.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from adalora_kernels.backends.triton.tiles import Tile
    from benchmarks.gpu.layers import Case, Layer
    from benchmarks.gpu.machine import Machine

ROOT = Path(__file__).parents[1]
RANKS = (16, 32, 64, 128)
SHAPES = ((768, 3072), (4096, 4096))
TOKENS = 8192
BLOCKS, WARPS, STAGES = (16, 32, 64, 128, 256), (4, 8), (1, 2, 3, 4, 5)
GAIN = 1.01  # less is noise
# Kernels of layers that read the same x, with the plan whose place they take.
STACKED = (("group_shrink", "forward", "shrink_tail"), ("group_x", "backward", "blas"))


def main() -> int:
    """Measure what isn't measured yet, then write the table; 1 where something is left."""
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.tune", description=__doc__)
    parser.add_argument("--dry", action="store_true", help="interpret tiny shapes on the CPU; nothing is timed")
    parser.add_argument("--seconds", type=float, default=540, help="no kernel is begun after so long (default 540)")
    parser.add_argument("--results", type=Path, help="where the evidence goes (default benchmarks/results)")
    options = parser.parse_args()
    if options.dry:
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
    import torch

    from adalora_kernels.backends.triton import measured
    from benchmarks.gpu.machine import Machine
    from benchmarks.records import Sweep, write

    if options.dry:
        torch.set_num_threads(1)
        machine = Machine("cpu", 2, options.results or ROOT / "build" / "dry")
    elif torch.cuda.is_available():
        machine = Machine("cuda", 11, options.results or ROOT / "benchmarks" / "results")
    else:
        print("No CUDA device: python3 -m benchmarks.tune --dry walks the code without one.", file=sys.stderr)
        return 2
    deadline = time.monotonic() + options.seconds
    evidence = machine.results / f"{machine.name}-tuning.json"
    held = Sweep(evidence, machine.environment())
    left = [case for case in kernels(machine) if not held.holds(case)]
    while left and time.monotonic() < deadline:
        case = left.pop(0)
        record = tuned(case, machine)
        held.put(case, [record])
        print(f"{case}: {record['tile']}, {record['gain']:.3f} x the tile before", flush=True)
    sweep = machine.results / f"{machine.name}-sweep.json"
    destination = machine.results / "measured.json" if machine.dry else measured.PATH
    content = json.loads(destination.read_text(encoding="utf-8")) if destination.exists() else {}
    about = machine.environment()
    minor = measured.minor_version(about["triton"])
    tiles, plans = tile_entries(held.records), plan_entries(Sweep(sweep, about).under(minor))
    files = [path.name for path in (evidence, sweep) if path.exists()]
    content.setdefault(about.get("capability", "0.0"), {})[minor] = {"evidence": files, "tiles": tiles, "plans": plans}
    measured.read(content)
    write(destination, content)
    print(f"{len(tiles)} tiles and {len(plans)} plans written to {destination}")
    if left:
        print(f"{len(left)} kernels are left: run it again.")
    return 1 if left else 0


def kernels(machine: Machine) -> Iterator[dict[str, Any]]:
    """Every kernel with a tile, by the plan that it is timed in, and each rank, or a stack's, that the plan can run."""
    from adalora_kernels.backends.triton import MAX_RANK, plans
    from adalora_kernels.backends.triton.launched import launches
    from benchmarks.gpu.layers import Case, layers, problem

    seen: set[tuple[str, int]] = set()
    for rank in RANKS[:1] if machine.dry else RANKS:
        case = Case(64, 64, 16, rank, "float32")
        able = problem(case, layers(case, machine)[0])
        for direction, table in (("forward", plans.FORWARD), ("backward", plans.BACKWARD)):
            for plan in table.values():
                for kernel in plan.kernels if plan.obstacle(able) is None else ():
                    if (kernel, rank) not in seen and launches(kernel, able):
                        seen.add((kernel, rank))
                        yield {"kernel": kernel, "direction": direction, "plan": plan.name, "rank": rank}
        if 2 * rank <= MAX_RANK:  # a stack of two layers
            for kernel, direction, name in STACKED:
                yield {"kernel": kernel, "direction": direction, "plan": name, "rank": 2 * rank}


def tuned(case: dict[str, Any], machine: Machine) -> dict[str, Any]:
    """The fastest tile of one kernel and rank, by steps that change one field."""
    from adalora_kernels.backends.triton.launched import tile
    from benchmarks.gpu.layers import Case, layers, problem

    shapes, tokens = (((32, 48),), 24) if machine.dry else (SHAPES, TOKENS)
    problems = [Case(k, n, tokens, case["rank"], "float32") for k, n in shapes]
    sets = {each: layers(each, machine) for each in problems}
    first = best = tile(case["kernel"], problem(problems[0], sets[problems[0]][0]))
    want = {each: outputs(case, each, sets[each][0]) for each in problems}
    seconds: dict[Tile, float | None] = {first: timed(case, first, sets, want, machine)}
    improved = True
    while improved:
        improved = False
        for candidate in neighbours(best)[: 2 if machine.dry else None]:
            if candidate not in seconds:
                seconds[candidate] = timed(case, candidate, sets, want, machine)
            mine, record = seconds[candidate], seconds[best]
            if mine is not None and (record is None or mine * GAIN < record) and not machine.dry:
                best, improved = candidate, True
    before, after = seconds[first], seconds[best]
    if after is None:
        raise RuntimeError(f"{case}: no tile runs, not even the one in use ({first})")
    return {
        "case": case,
        "tile": astuple(best),
        "gain": before / after if before is not None else float("inf"),
        "candidates": [{"tile": astuple(tile), "microseconds": s and 1e6 * s} for tile, s in seconds.items()],
    }


def neighbours(tile: Tile) -> list[Tile]:
    """Tiles that differ in one field by one step."""
    found = []
    steps = {"block_m": BLOCKS, "block_n": BLOCKS, "block_k": BLOCKS, "num_warps": WARPS, "num_stages": STAGES}
    for field, values in steps.items():
        value = getattr(tile, field)
        if value in values:  # a dimension that the kernel does not block is 0
            place = values.index(value)
            found += [
                replace(tile, **{field: v}) for v in (*values[max(0, place - 1) : place], *values[place + 1 :][:1])
            ]
    return found


def call_of(case: dict[str, Any], problem: Case) -> Callable[[Layer], tuple[Tensor | None, ...]]:
    """The launcher of the case's plan, on one set of inputs."""
    import torch

    from adalora_kernels.backends.triton import plans, rank_padding
    from benchmarks.gpu.layers import adapter_of

    if case["kernel"].startswith("group_"):
        return stack_of(case, problem)
    launcher = plans.launcher(case["direction"], case["plan"])

    def call(layer: Layer) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            adapter = adapter_of(problem, layer)
            if case["direction"] == "forward":
                return launcher(layer.x, layer.weight, layer.bias, None, adapter)
            u = layer.x.new_ones(problem.M, rank_padding(problem.R))
            return launcher(layer.grad_y, layer.x, u, layer.weight, adapter, (True,) * 4)

    return call


def stack_of(case: dict[str, Any], problem: Case) -> Callable[[Layer], tuple[Tensor | None, ...]]:
    """Likewise of two layers with one x and one W, and half of the triplets each."""
    import torch

    from adalora_kernels.backends.triton import group, rank_padding
    from adalora_kernels.reference.svd_linear_group import Member
    from benchmarks.gpu.layers import adapter_of

    half = problem.R // 2

    def call(layer: Layer) -> tuple[Tensor | None, ...]:
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


def outputs(case: dict[str, Any], problem: Case, layer: Layer) -> list[Tensor]:
    """What the tile in use computes."""
    return [t.clone() for t in call_of(case, problem)(layer) if t is not None]


def timed(
    case: dict[str, Any],
    tile: Tile,
    sets: dict[Case, list[Layer]],
    want: dict[Case, list[Tensor]],
    machine: Machine,
) -> float | None:
    """Median seconds, multiplied over the shapes; None where the tile does not fit, spills or computes wrongly."""
    from statistics import median

    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    from adalora_kernels.backends.triton import measured
    from adalora_kernels.backends.triton.launch import kept_kernels

    product = 1.0
    before = set(kept_kernels())
    with measured.trial(case["kernel"], astuple(tile)):
        try:
            for problem, layers in sets.items():
                call = call_of(case, problem)
                found = [t for t in call(layers[0]) if t is not None]
                if not all(alike(a, b) for a, b in zip(found, want[problem], strict=True)):
                    return None
                graph = machine.recorded([lambda layer=layer, call=call: call(layer) for layer in layers])  # type: ignore[misc]
                product *= median(machine.replays({"trial": graph})["trial"])
        except (CompilationError, OutOfResources, PTXASError):
            return None
    return None if any(kernel.n_spills for kernel in set(kept_kernels()) - before) else product


def alike(a: Tensor, b: Tensor) -> bool:
    """Equal but for the order of sums and their rounding."""
    return bool((a.float() - b.float()).norm() <= 1e-2 * b.float().norm())


def tile_entries(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The table's tiles: ranks that share a tile with the next higher one are left out."""
    found: dict[str, list[dict[str, Any]]] = {}
    for record in sorted(records, key=lambda record: (record["case"]["kernel"], -record["case"]["rank"])):
        kernel = record["case"]["kernel"]
        higher = found.setdefault(kernel, [])
        if not higher or higher[-1]["tile"] != record["tile"]:
            entry = {"kernel": kernel, "width": "half", "max_rank": record["case"]["rank"], "tile": record["tile"]}
            higher.append(entry)
    return [entry for entries in found.values() for entry in reversed(entries)]


def plan_entries(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The table's plans: the fastest of each case of the sweep, of the forward and of the backward."""
    entries = []
    for record in records:
        direction = "forward" if record["direction"] == "forward" else "backward"
        prefix = "triton:" if direction == "forward" else "triton:/"
        times = {
            name.removeprefix(prefix): spread["median"]
            for name, spread in record["microseconds"].items()
            if name.startswith(prefix)
        }
        case = record["case"]
        point = {key: case[key] for key in ("M", "K", "N", "R")}
        point |= {"width": "half", "adapter_bytes": 4 if case["adapter"] == "float32" else 2}
        entries.append({"direction": direction, "point": point, "plan": min(times, key=lambda name: times[name])})
    return entries


if __name__ == "__main__":
    raise SystemExit(main())
