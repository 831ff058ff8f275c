"""``python3 -m benchmarks.tune``: measure tiles on this device, and write the table that chooses by what was measured.

Tiles: of every kernel of every plan at each rank (``tiling``), the most valuable first. Plans: of each layer that
``make gpu`` and its sweep have timed, the fastest. Each kernel's record is written when it is done, with the source of
its kernel; begun again, on the same machine or another of its kind, the tuner goes on with those that neither
``--results`` nor benchmarks/results hold. ``--part i/n`` takes the i-th of n shares of the kernels, and writes to a
file of its own. The table is ``adalora_kernels/backends/triton/measured.json``, with a copy in ``--results``;
``--part table`` makes it from the records alone, without a device. ``--dry`` walks the same code on the CPU and writes
to build/dry alone.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.gpu.apart import Apart, Here
    from benchmarks.gpu.machine import Machine

ROOT = Path(__file__).parents[1]
RANKS = (16, 64, 32, 128)  # the first two decide most layers
TOGETHER = 4  # kernels that are searched side by side
WORKERS = 14
# Those on the way of a forward and a backward at common ranks, what takes most of the time first.
FIRST = ("gemm", "one_gemm", "dx", "x", "g", "shrink", "low_rank", "one_pass", "v", "t")
# Kernels of layers that read the same x, with the plan whose place they take.
STACKED = (("group_shrink", "forward", "shrink_tail"), ("group_x", "backward", "blas"))


def main() -> int:
    """Measure what isn't measured yet, then write the table; 1 where something is left."""
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.tune", description=__doc__)
    parser.add_argument("--dry", action="store_true", help="interpret tiny shapes on the CPU; nothing is timed")
    parser.add_argument("--part", default="1/1", help="i/n, a share of the kernels; or table (default all kernels)")
    parser.add_argument("--seconds", type=float, default=480, help="no kernel is begun after so long (default 480)")
    parser.add_argument("--results", type=Path, help="where the evidence goes (default benchmarks/results)")
    options = parser.parse_args()
    share = re.fullmatch(r"(\d+)/(\d+)", options.part)
    if options.part != "table" and not (share and 1 <= int(share[1]) <= int(share[2])):
        parser.error(f"--part: expected table or i/n with 1 <= i <= n, got {options.part!r}")
    deadline = time.monotonic() + options.seconds
    if options.dry:
        os.environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}  # read when triton and torch are imported
    import torch

    from benchmarks.gpu.apart import Apart, Here
    from benchmarks.gpu.machine import RESULTS, Machine

    results = options.results or (ROOT / "build" / "dry" if options.dry else RESULTS)
    if share is None:
        return table(results, options.dry)
    if not options.dry and not torch.cuda.is_available():
        print("No CUDA device: python3 -m benchmarks.tune --dry walks the code without one.", file=sys.stderr)
        return 2
    machine = Machine("cpu", 2, results) if options.dry else Machine("cuda", 11, results)
    workers = 1 if options.dry else max(1, min(WORKERS, (os.cpu_count() or 2) - 2))
    runners: list[Apart | Here] = [Here() if options.dry else Apart() for _ in range(workers)]
    try:
        left = tiles(machine, (int(share[1]), int(share[2])), deadline, runners)
    finally:
        for runner in runners:
            runner.close()
    return max(table(results, options.dry), 1 if left else 0)


def tiles(machine: Machine, share: tuple[int, int], deadline: float, runners: Sequence[Apart | Here]) -> int:
    """Search what isn't held yet; how many kernels are left."""
    from benchmarks.gpu.withheld import of_record
    from benchmarks.records import Sweep
    from benchmarks.tiling import climbed

    environment = machine.environment()
    part, parts = share
    kind = "tuning" if parts == 1 else f"tuning-{part}-of-{parts}"
    others = [
        file for folder in dict.fromkeys(p.parent for p in machine.earlier()) for file in evidence(folder, machine)
    ]
    held = Sweep(machine.record(kind), environment, others, aside=("commit", "source", "kernels"))
    withheld = {} if machine.dry else of_record(machine.earlier(), environment["source"]) or {}
    left, failed = [], 0
    for case in list(kernels(machine))[part - 1 :: parts]:
        subject = f"triton:{'/' * (case['direction'] == 'backward')}{case['plan']}"
        if subject in withheld:
            print(f"{described(case)}: left out, {withheld[subject]}", flush=True)
            failed += 1
        elif not held.holds(case):
            left.append(case)
    while left and time.monotonic() < deadline:
        batch, left = left[:TOGETHER], left[TOGETHER:]
        begun = time.monotonic()
        try:
            climbs = climbed(batch, machine, runners)
        except Exception as error:  # of a tile in use; what the others of the batch have is lost with it
            failed += len(batch)
            print(f"{', '.join(map(described, batch))}: {type(error).__name__}: {error}"[:2000], flush=True)
            continue
        for climb in climbs:
            held.put(climb.case, [climb.record()])
            tried = f"{len(climb.candidates)} tiles tried"
            print(f"{described(climb.case)}: {climb.best}, {1 / climb.over_first:.3f} x as fast, {tried}", flush=True)
        machine.forget()
        print(f"{len(batch)} kernels in {time.monotonic() - begun:.0f} s", flush=True)
    held.write()
    missing = len(left) + failed
    print(f"{missing} kernels are left: run it again." if missing else "Every kernel is recorded.")
    return missing


def described(case: dict[str, Any]) -> str:
    """A kernel in words."""
    return f"{case['kernel']} of {case['plan']}, rank {case['rank']}"


def evidence(folder: Path, machine: Machine) -> list[Path]:
    """The tuner's records of this device in a folder, of any share."""
    return sorted(folder.glob(f"{machine.name}-tuning*.json"))


def kernels(machine: Machine) -> list[dict[str, Any]]:
    """Every kernel with a tile, by the plan that it is timed in, and each rank, or a stack's, that the plan can run."""
    from adalora_kernels.backends.triton import MAX_RANK, plans
    from adalora_kernels.backends.triton.launched import launches
    from adalora_kernels.backends.triton.sources import fingerprint
    from benchmarks.gpu.layers import Case, layers, problem

    found: dict[tuple[str, int], dict[str, Any]] = {}

    def note(kernel: str, direction: str, plan: str, rank: int) -> None:
        case = {"kernel": kernel, "direction": direction, "plan": plan, "rank": rank}
        found.setdefault((kernel, rank), case | {"source": fingerprint(kernel)})

    for rank in RANKS[:1] if machine.dry else RANKS:
        case = Case(64, 64, 16, rank, "float32")
        able = problem(case, layers(case, machine)[0])
        of_rank = [
            (kernel, direction, plan.name)
            for direction, table in (("forward", plans.FORWARD), ("backward", plans.BACKWARD))
            for plan in table.values()
            for kernel in (plan.kernels if plan.obstacle(able) is None else ())
            if launches(kernel, able)
        ]
        for kernel, direction, plan in sorted(of_rank, key=lambda each: FIRST.index(each[0])):
            note(kernel, direction, plan, rank)
        if 2 * rank <= MAX_RANK:  # a stack of two layers
            for kernel, direction, plan in STACKED:
                note(kernel, direction, plan, 2 * rank)
    return list(found.values())


def table(results: Path, dry: bool) -> int:
    """Write the table from every record of this folder and of benchmarks/results; 1 where there is none."""
    from adalora_kernels.backends.triton import measured
    from benchmarks.gpu.machine import RESULTS
    from benchmarks.records import write

    folders = [results] if dry else list(dict.fromkeys((results, RESULTS)))
    destinations = [results / "measured.json"] if dry else [measured.PATH, results / "measured.json"]
    content = json.loads(destinations[0].read_text(encoding="utf-8")) if destinations[0].exists() else {}
    made = entries(folders)
    for (capability, minor), entry in made.items():
        content.setdefault(capability, {})[minor] = entry
    measured.read(content)
    for destination in destinations[: 1 if results == RESULTS else 2] if made else ():
        write(destination, content)
        said = "; ".join(
            f"{c} under triton {v}: {len(e['tiles'])} tiles, {len(e['plans'])} plans" for (c, v), e in made.items()
        )
        print(f"{said}; written to {destination}")
    if not made:
        print(f"No record of the kernels as they are in {', '.join(map(str, folders))}: nothing is written.")
    return 0 if made else 1


def entries(folders: Iterable[Path]) -> dict[tuple[str, str], dict[str, Any]]:
    """What the table says by capability and minor version of triton, from records of the kernels as they are."""
    from adalora_kernels.backends.triton.measured import minor_version
    from adalora_kernels.backends.triton.sources import fingerprint, fingerprint_of_all

    found: dict[tuple[str, str], dict[str, Any]] = {}
    tiles: dict[tuple[str, str], dict[tuple[str, int], dict[str, Any]]] = {}
    plans: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for path in dict.fromkeys(path for folder in folders for path in sorted(folder.glob("*.json"))):
        for environment, record in recorded(path):
            if not {"triton", "kernels"} <= set(environment):
                continue
            key = (environment.get("capability", "0.0"), minor_version(environment["triton"]))
            if record["benchmark"] == "tile" and record["case"]["source"] == fingerprint(record["case"]["kernel"]):
                tiles.setdefault(key, {}).setdefault((record["case"]["kernel"], record["case"]["rank"]), record)
            elif record["benchmark"] == "layer" and environment["kernels"] == fingerprint_of_all():
                for entry in plan_entries([record]):
                    plans.setdefault(key, {}).setdefault(json.dumps([entry["direction"], entry["point"]]), entry)
            else:
                continue
            named = found.setdefault(key, {"evidence": [], "tiles": [], "plans": []})["evidence"]
            named += [path.name] if path.name not in named else []
    for key, entry in found.items():
        entry |= {"tiles": tile_entries(tiles.get(key, {}).values()), "plans": [*plans.get(key, {}).values()]}
    return found


def recorded(path: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """The records of a file, each with its environment; none of a file of another kind."""
    content = json.loads(path.read_text(encoding="utf-8"))
    environments = content.get("environments") or [content.get("environment", {})]
    for record in content.get("records", ()):
        yield environments[record.get("environment", 0)], record


def tile_entries(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The table's tiles: ranks that share a tile with the next higher one are left out."""
    found: dict[str, list[dict[str, Any]]] = {}
    for record in sorted(records, key=lambda record: (record["case"]["kernel"], -record["case"]["rank"])):
        case, higher = record["case"], found.setdefault(record["case"]["kernel"], [])
        if not higher or higher[-1]["tile"] != record["tile"]:
            entry = {"kernel": case["kernel"], "width": "half", "max_rank": case["rank"], "tile": record["tile"]}
            higher.append(entry | {"source": case["source"]})
    return [entry for entries in found.values() for entry in reversed(entries)]


def plan_entries(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The table's plans: the fastest of each layer, of the forward and of the backward; those withheld have no time."""
    from adalora_kernels.backends.triton.sources import fingerprint_of_all

    found = []
    for record in records:
        direction = "forward" if record["direction"] == "forward" else "backward"
        prefix = "triton:" if direction == "forward" else "triton:/"
        times = {
            name.removeprefix(prefix): spread["median"]
            for name, spread in record["microseconds"].items()
            if name.startswith(prefix)
        }
        if not times:
            continue
        case = record["case"]
        point = {key: case[key] for key in ("M", "K", "N", "R")}
        point |= {"width": "half", "adapter_bytes": 4 if case["adapter"] == "float32" else 2}
        plan = min(times, key=lambda name: times[name])
        found.append({"direction": direction, "point": point, "plan": plan, "source": fingerprint_of_all()})
    return found


if __name__ == "__main__":
    raise SystemExit(main())
