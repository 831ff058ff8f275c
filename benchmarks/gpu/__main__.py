"""``python3 -m benchmarks.gpu``: correctness first, then the core set of timings, then the record of this device.

A check that fails is recorded, what depends on it is not timed, and everything else is. With ``--part i/n`` the i-th
of n shares of the full sweep, with ``--part steps`` whole training steps, with ``--part questions`` what decides
between designs, with ``--part sanitizer`` the small shapes under compute-sanitizer, with ``--part parity`` the small
correctness cases alone. Sweep, steps and questions go on where they were cut off, by what lies in ``--results`` or in
benchmarks/results. ``--dry`` walks the same code with Triton's interpreter on the CPU. Exits 1 where a check fails, a
bound is missed or something is left to do.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.gpu.apart import Apart, Here
    from benchmarks.gpu.machine import Machine
    from benchmarks.gpu.withheld import Withheld

ROOT = Path(__file__).parents[2]
SWEEP_TOKENS, SWEEP_RANKS = (1024, 4096, 8192, 16384), (8, 16, 32, 64)
ROUNDS, DRY_ROUNDS = 15, 2
CASE_SECONDS = 120.0
# A case as it is known again, and what makes its records.
Job = tuple[Any, Callable[..., list[dict[str, Any]]], tuple[Any, ...]]
PARTS = ("core", "steps", "questions", "sanitizer", "parity")


def main() -> int:
    """Run the part that was asked for."""
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--dry", action="store_true", help="interpret tiny shapes on the CPU; nothing is timed")
    parser.add_argument("--part", default="core", help=f"{', '.join(PARTS)} (default core), or i/n of the sweep")
    parser.add_argument("--seconds", type=float, default=420, help="no case is begun after so long (default 420)")
    where = "where records go (default benchmarks/results; for a dry run build/dry, which git ignores)"
    parser.add_argument("--results", type=Path, help=where)
    options = parser.parse_args()
    share = re.fullmatch(r"(\d+)/(\d+)", options.part)
    if options.part not in PARTS and not (share and 1 <= int(share[1]) <= int(share[2])):
        parser.error(f"--part: expected {', '.join(PARTS)} or i/n with 1 <= i <= n, got {options.part!r}")
    deadline = time.monotonic() + options.seconds
    if options.dry:
        # Read when triton is imported, and when torch is; by the processes of checks and cases too.
        os.environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    import torch

    from benchmarks.gpu.apart import Apart, Here
    from benchmarks.gpu.machine import RESULTS, Machine

    if not options.dry and not torch.cuda.is_available():
        print("No CUDA device: python3 -m benchmarks.gpu --dry walks the code without one.", file=sys.stderr)
        return 2
    if options.dry:
        machine = Machine("cpu", DRY_ROUNDS, options.results or ROOT / "build" / "dry")
    else:
        machine = Machine("cuda", ROUNDS, options.results or RESULTS)
    print(", ".join(f"{key} {value}" for key, value in machine.environment().items()))
    if options.part == "parity":
        return parity(machine)
    if options.part == "sanitizer":
        return sanitizer(machine, deadline)
    if options.part == "core":
        from benchmarks.gpu.core import core

        print(extension())
        with Apart() as process:
            return core(machine, deadline, process)
    withheld = failed_checks(machine)
    runner: Apart | Here = Here() if machine.dry else Apart()
    try:
        if options.part == "questions":
            return questions(machine, deadline, runner, withheld)
        if options.part == "steps":
            return whole_steps(machine, deadline, runner, withheld)
        assert share is not None
        return sweep(machine, (int(share[1]), int(share[2])), deadline, runner, withheld)
    finally:
        runner.close()


def failed_checks(machine: Machine) -> Withheld:
    """What the core run of the same source found not to be trusted."""
    from benchmarks.gpu.withheld import of_record

    if machine.dry:
        return {}
    found = of_record(machine.earlier(), machine.environment()["source"])
    if found is None:
        print("No core run of this source is recorded: only what contestants compute here is checked.")
    elif found:
        print(f"withheld, since checks failed: {', '.join(found)}")
    return found or {}


def parity(machine: Machine) -> int:
    """The small correctness cases, in this process."""
    from benchmarks.gpu import checks
    from benchmarks.gpu.core import announced

    seen = list(announced(checks.parity(checks.SMALL[:2] if machine.dry else checks.SMALL, machine)))
    print(f"{len(seen)} checks")
    return 0 if seen and all(check.outcome == "holds" for check in seen) else 1


def sanitizer(machine: Machine, deadline: float) -> int:
    """Every tool of compute-sanitizer over the small shapes, written to a file of its own."""
    from benchmarks import records
    from benchmarks.gpu.core import announced
    from benchmarks.gpu.sanitizer import TOOLS, check

    content: dict[str, Any] = {"environment": machine.environment(), "records": [], "checks": []}
    for number, tool in enumerate(TOOLS):
        share = (deadline - time.monotonic()) / (len(TOOLS) - number)  # of the time that is left
        (found,) = announced(check(tool, max(1.0, share), machine))
        outcome = {"benchmark": "compute-sanitizer", "case": {"tool": tool}, "outcome": found.outcome}
        content["records"].append(outcome)
        content["checks"] += [found.record()] if found.outcome != "holds" else []
        content["checks_held"] = len(content["records"]) - len(content["checks"])
        records.write(machine.record("sanitizer"), content)
        print(f"{tool}: {found.outcome}", flush=True)
    print(f"written to {machine.record('sanitizer')}")
    return 0 if machine.dry or content["checks_held"] == len(TOOLS) else 1


def questions(machine: Machine, deadline: float, runner: Apart | Here, withheld: Withheld) -> int:
    """What decides between designs, as far as it is not yet recorded."""
    from benchmarks.gpu import groups
    from benchmarks.gpu.core import DRY_SHAPES, DRY_TOKENS, SHAPES, group_cases
    from benchmarks.gpu.questions import questions as asked

    shapes, tokens = (DRY_SHAPES, DRY_TOKENS) if machine.dry else (SHAPES, SWEEP_TOKENS)
    siblings = ((f"group {case}", groups.measure, (case, machine, withheld)) for case in group_cases(machine, tokens))
    jobs = [*asked(machine, shapes, tokens, withheld), *siblings]
    return resumed(machine, "questions", jobs, deadline, runner)


def sweep(machine: Machine, share: tuple[int, int], deadline: float, runner: Apart | Here, withheld: Withheld) -> int:
    """Every shape, number of tokens, rank and adapter dtype of this share that is not yet recorded."""
    from benchmarks.gpu.core import ADAPTERS, DRY_SHAPES, DRY_TOKENS, SHAPES
    from benchmarks.gpu.layers import Case
    from benchmarks.gpu.timed import measure

    shapes, tokens = (DRY_SHAPES, DRY_TOKENS) if machine.dry else (SHAPES, SWEEP_TOKENS)
    ranks = SWEEP_RANKS[:2] if machine.dry else SWEEP_RANKS
    cases = [Case(k, n, m, r, adapter) for k, n in shapes for m in tokens for r in ranks for adapter in ADAPTERS]
    part, parts = share
    jobs = [(case.record(), measure, (case, machine, False, withheld)) for case in cases[part - 1 :: parts]]
    return resumed(machine, "sweep", jobs, deadline, runner, f"part {part}/{parts}")


def resumed(
    machine: Machine, kind: str, jobs: Sequence[Job], deadline: float, runner: Apart | Here, about: str = ""
) -> int:
    """Those jobs whose records are not held yet, each recorded when it is done."""
    from benchmarks.gpu.apart import Failed
    from benchmarks.gpu.shown import shown
    from benchmarks.records import Sweep

    held = Sweep(machine.record(kind), machine.environment(), machine.earlier(kind))
    left = [job for job in jobs if not held.holds(job[0])]
    failed = 0
    while left and time.monotonic() < deadline:
        key, function, args = left.pop(0)
        try:
            made = runner.run(function, *args, seconds=CASE_SECONDS)
        except Failed as failure:
            failed += 1
            print(f"{key}: {failure}\n{failure.trace}", flush=True)
            continue
        held.put(key, made)
        print("\n".join(shown(record) for record in made), flush=True)
    held.write()
    missing, named = len(left) + failed, about or kind
    print(f"written to {held.path}")
    print(f"{missing} cases of {named} are left: run it again." if missing else f"{named} is done.")
    return 1 if missing else 0


def whole_steps(machine: Machine, deadline: float, runner: Apart | Here, withheld: Withheld) -> int:
    """Training steps of whole models, as far as they are not yet recorded, and the bounds on them."""
    from benchmarks import records
    from benchmarks.gpu import steps
    from benchmarks.gpu.rows import step_rows
    from benchmarks.gpu.shown import shown

    path = machine.record("steps")
    if machine.dry:
        path.unlink(missing_ok=True)  # what was walked with other code in the working tree counts for nothing
    held = records.Sweep(path, machine.environment(), machine.earlier("steps"))
    missing = 0
    for planned, found in steps.run(machine, held, deadline, runner, withheld):
        if isinstance(found, str):
            missing += 1
            print(f"{planned.name}: {found}", flush=True)
        else:
            print(shown(found), flush=True)
    rows = list(step_rows([record for record in held.records if held.is_current(record)]))
    content = {"environments": held.environments, "records": held.records, "rows": [row.record() for row in rows]}
    records.write(path, content)
    print("\n".join(["", *map(str, rows), f"written to {path}"]))
    print(f"{missing} cases are left: run it again." if missing else "Every case is recorded.")
    return 1 if missing else 0 if machine.dry or all(row.holds for row in rows) else 1


def extension() -> str:
    """Whether the compiled extension takes part; the layer's GPU kernels do without it."""
    from adalora_kernels.backends.native import unavailable_reason

    reason = unavailable_reason("cuda")
    built = "python3 setup.py build_ext --inplace builds it"
    return "compiled extension: built" if reason is None else f"compiled extension: left out ({reason}; {built})"


if __name__ == "__main__":
    raise SystemExit(main())
