"""``python3 -m benchmarks.gpu``: correctness first, then the core set of timings, then the record of this device.

With ``--part i/n`` the i-th of n shares of the full sweep (begun again, it goes on where it was cut off), with ``--part
steps`` whole training steps, with ``--part questions`` what decides between designs, with ``--part parity`` the small
correctness cases alone (parity:i, the i-th of all). ``--dry`` walks the same code with Triton's interpreter on the CPU.
Exits 1 where a check fails or a bound is missed.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.gpu.checks import Check
    from benchmarks.gpu.groups import GroupCase
    from benchmarks.gpu.layers import Case
    from benchmarks.gpu.machine import Machine

ROOT = Path(__file__).parents[2]
SHAPES = ((768, 768), (768, 3072), (3072, 768), (4096, 4096), (4096, 14336), (14336, 4096))
COMPILED = ((768, 768), (768, 3072), (4096, 4096), (4096, 14336))  # at these torch.compile takes part
CORE_TOKENS = (8192, 1024)
SWEEP_TOKENS, SWEEP_RANKS, ADAPTERS = (1024, 4096, 8192, 16384), (8, 16, 32, 64), ("bfloat16", "float32")
DRY_SHAPES, DRY_TOKENS = ((32, 48),), (24,)
ROUNDS, DRY_ROUNDS = 15, 2


def main() -> int:
    """Run the part that was asked for."""
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--dry", action="store_true", help="interpret tiny shapes on the CPU; nothing is timed")
    parser.add_argument("--part", default="core", help="core (default), steps, parity, questions, or i/n of the sweep")
    parser.add_argument("--seconds", type=float, default=450, help="no case is begun after so long (default 450)")
    where = "where records go (default benchmarks/results; for a dry run build/dry, which git ignores)"
    parser.add_argument("--results", type=Path, help=where)
    options = parser.parse_args()
    share = re.fullmatch(r"(\d+)/(\d+)", options.part)
    one = re.fullmatch(r"parity:(\d+)", options.part)
    known = options.part in ("core", "steps", "parity", "questions") or one is not None
    if not known and not (share and 1 <= int(share[1]) <= int(share[2])):
        parser.error(f"--part: expected core, steps, parity, questions or i/n with 1 <= i <= n, got {options.part!r}")
    if options.dry:
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
    import torch

    from benchmarks.gpu.machine import Machine

    if options.dry:
        torch.set_num_threads(1)
    elif not torch.cuda.is_available():
        print("No CUDA device: python3 -m benchmarks.gpu --dry walks the code without one.", file=sys.stderr)
        return 2
    if options.dry:
        machine = Machine("cpu", DRY_ROUNDS, options.results or ROOT / "build" / "dry")
    else:
        machine = Machine("cuda", ROUNDS, options.results or ROOT / "benchmarks" / "results")
    deadline = time.monotonic() + options.seconds
    print(", ".join(f"{key} {value}" for key, value in machine.environment().items()))
    if options.part == "parity" or one:
        return parity(machine, int(one[1]) if one else None)
    if options.part == "questions":
        return questions(machine, deadline)
    if options.part == "steps":
        return whole_steps(machine, deadline)
    return sweep(machine, int(share[1]), int(share[2]), deadline) if share else core(machine, deadline)


def core(machine: Machine, deadline: float) -> int:
    """Checks, the core set, the host's time; then the record and the bounds."""
    from benchmarks import records
    from benchmarks.gpu import checks, children, fused, graphed, groups, host
    from benchmarks.gpu.layers import Case
    from benchmarks.gpu.questions import ceilings
    from benchmarks.gpu.rows import RANK, Row, group_rows, rows
    from benchmarks.gpu.timed import measure

    print(extension())
    content: dict[str, Any] = {"environment": machine.environment()}
    content |= {name: [] for name in ("records", "groups", "rows", "left_out")}
    sanitizer = children.under_the_sanitizer(machine, "memcheck", timeout=120)
    public = chain(
        checks.public_call(machine), groups.checks(machine), fused.checks(machine), graphed.whole_steps(machine)
    )
    seen = list(announced(chain(children.side_by_side(machine), public, sanitizer)))
    content["checks"] = [check.record() for check in seen if check.outcome != "holds"]
    content["checks_held"] = sum(check.outcome == "holds" for check in seen)
    failed = [check for check in seen if check.outcome == "FAILED"]
    if failed or not content["checks_held"]:
        print(f"{len(failed)} checks failed: nothing is timed.")
        return 1
    content["ceilings"] = ceilings(machine)
    content["host"] = host.measure(machine)
    shapes, tokens = (DRY_SHAPES, DRY_TOKENS) if machine.dry else (SHAPES, CORE_TOKENS)
    cases = [Case(k, n, m, RANK, adapter) for m in tokens for adapter in ADAPTERS for k, n in shapes]
    path = machine.results / f"{machine.name}.json"
    for case in cases:
        compiled = (case.M, case.adapter) == (tokens[0], "bfloat16") and (machine.dry or (case.K, case.N) in COMPILED)
        add(content, "records", case, partial(measure, case, machine, compiled), deadline)
        records.write(path, content)  # a run that is cut off keeps what it has
    for group in group_cases(machine, tokens[:1]):
        add(content, "groups", group, partial(groups.measure, group, machine), deadline)
    found = list(rows(content["records"])) + list(group_rows(content["groups"]))
    found.append(Row("host time of an eager layer: ours / PEFT LoRA", content["host"]["ours_over_lora"], 1))
    content["rows"] = [row.record() for row in found]
    records.write(path, content)
    print("\n".join(["", *map(str, found), f"{content['checks_held']} checks hold; written to {path}"]))
    if machine.dry:
        print("A dry run: no figure above means anything.")
        return 0
    return 0 if all(row.holds for row in found) and not content["left_out"] else 1


def add(
    content: dict[str, Any], name: str, case: Case | GroupCase, measure: Callable[[], list[Any]], deadline: float
) -> None:
    """Time a case and keep its records, or why it has none: the others are not to be lost for it."""
    why = "for want of time"
    if time.monotonic() <= deadline:
        try:
            content[name] += measure()
        except Exception as error:
            why = f"{type(error).__name__}: {error}"[:2000]
        else:
            print("\n".join(shown(record) for record in content[name][-2:]), flush=True)
            return
    content["left_out"].append(case.record() | {"why": why})
    print(f"left out, {why}: {case}", flush=True)


def group_cases(machine: Machine, tokens: Iterable[int]) -> list[GroupCase]:
    """Each group of layers at each number of tokens, at the rank of the core set."""
    from benchmarks.gpu import groups
    from benchmarks.gpu.rows import RANK

    shapes = groups.DRY_SHAPES if machine.dry else groups.SHAPES
    return [groups.GroupCase(k, ns, m, RANK, "bfloat16") for k, ns in shapes for m in tokens]


def parity(machine: Machine, index: int | None) -> int:
    """The small correctness cases; or one of all, which is written down."""
    from benchmarks import records
    from benchmarks.gpu import checks

    small = checks.SMALL[:2] if machine.dry else checks.SMALL
    cases = small if index is None else checks.shapes(machine)[index : index + 1]
    seen = list(announced(checks.parity(cases, machine)))
    if index is not None:
        records.write(machine.results / f"parity-{index}.json", {"checks": [check.record() for check in seen]})
    print(f"{len(seen)} checks")
    return 0 if seen and all(check.outcome == "holds" for check in seen) else 1


def questions(machine: Machine, deadline: float) -> int:
    """What decides between designs, written to a file of its own."""
    from benchmarks import records
    from benchmarks.gpu import groups
    from benchmarks.gpu.questions import questions as asked

    shapes, tokens = (DRY_SHAPES, DRY_TOKENS) if machine.dry else (SHAPES, SWEEP_TOKENS)
    content: dict[str, Any] = {"environment": machine.environment(), "records": [], "complete": True}
    path = machine.results / f"{machine.name}-questions.json"
    siblings = (record for case in group_cases(machine, tokens) for record in groups.measure(case, machine))
    for record in chain(asked(machine, shapes, tokens), siblings):
        content["records"].append(record)
        records.write(path, content | {"complete": False})  # a run that is cut off keeps what it has
        print(shown(record), flush=True)
        if time.monotonic() > deadline:
            content["complete"] = False
            break
    records.write(path, content)
    print(f"written to {path}" + ("" if content["complete"] else ", cut off for want of time"))
    return 0 if content["complete"] else 1


def whole_steps(machine: Machine, deadline: float) -> int:
    """Training steps of whole models, as far as they are not yet recorded, and the bounds on them."""
    from benchmarks import records
    from benchmarks.gpu import steps
    from benchmarks.gpu.rows import step_rows

    path = machine.results / f"{machine.name}-steps.json"
    if machine.dry:
        path.unlink(missing_ok=True)  # what was walked with other code in the working tree counts for nothing
    held = records.Sweep(path, machine.environment())
    missing = 0
    for planned, found in steps.run(machine, held, deadline):
        if isinstance(found, str):
            missing += 1
            print(f"{planned.name}: {found}", flush=True)
        else:
            print(shown(found), flush=True)
    rows = list(step_rows([record for record in held.records if record["environment"] == held.current]))
    content = {"environments": held.environments, "records": held.records, "rows": [row.record() for row in rows]}
    records.write(path, content)
    print("\n".join(["", *map(str, rows), f"written to {path}"]))
    print(f"{missing} cases are left: run it again." if missing else "Every case is recorded.")
    return 1 if missing else 0 if machine.dry or all(row.holds for row in rows) else 1


def sweep(machine: Machine, part: int, parts: int, deadline: float) -> int:
    """Every shape, number of tokens, rank and adapter dtype of this share that is not yet recorded."""
    from benchmarks import records
    from benchmarks.gpu.layers import Case
    from benchmarks.gpu.timed import measure

    shapes, tokens = (DRY_SHAPES, DRY_TOKENS) if machine.dry else (SHAPES, SWEEP_TOKENS)
    ranks = SWEEP_RANKS[:2] if machine.dry else SWEEP_RANKS
    cases = [Case(k, n, m, r, adapter) for k, n in shapes for m in tokens for r in ranks for adapter in ADAPTERS]
    held = records.Sweep(machine.results / f"{machine.name}-sweep.json", machine.environment())
    left = [case for case in cases[part - 1 :: parts] if not held.holds(case.record())]
    failed = 0
    while left and time.monotonic() < deadline:
        case = left.pop(0)
        try:
            held.put(case.record(), measure(case, machine))
        except Exception as error:
            failed += 1
            print(f"{case}: {type(error).__name__}: {error}"[:2000], flush=True)
            continue
        print("\n".join(shown(record) for record in held.records[-2:]), flush=True)
    about, missing = f"part {part}/{parts}", len(left) + failed
    print(f"{missing} cases of {about} are left: run it again." if missing else f"{about} is done.")
    return 1 if missing else 0


def announced(checks: Iterable[Check]) -> Iterable[Check]:
    """The checks, with a line for each that doesn't hold."""
    for check in checks:
        if check.outcome != "holds":
            print(f"{check.outcome:7} {check.name}: {check.detail}", flush=True)
        yield check


def shown(record: dict[str, Any]) -> str:
    """One line of a record."""
    about = " ".join(f"{key}={value}" for key, value in record.get("case", {}).items())
    head = f"{record['benchmark']} {record.get('direction', '')} {about}".strip()
    if "ratio_to_frozen" in record:
        frozen = record["microseconds"]["frozen"]["median"]
        ratios = ", ".join(f"{name} {ratio:.3f}" for name, ratio in record["ratio_to_frozen"].items())
        return f"{head}: frozen {frozen:.1f} µs; {ratios}"
    if "milliseconds" in record:
        times = (f"{name} {value['median']:.1f} ms" for name, value in record["milliseconds"].items())
        refused = (record.get("not_captured", {}) | record.get("not_compiled", {})).items()
        return "\n".join([f"{head}: {', '.join(times)}", *(f"    not {name}: {why}" for name, why in refused)])
    if "microseconds" in record:
        times = (f"{name} {value['median']:.1f} µs" for name, value in record["microseconds"].items())
        return f"{head}: {', '.join(times)}"
    return f"{head}: " + ", ".join(f"{key} {value:.4g}" for key, value in record.items() if isinstance(value, float))


def extension() -> str:
    """Whether the compiled extension takes part; the layer's GPU kernels do without it."""
    from adalora_kernels.backends.native import unavailable_reason

    reason = unavailable_reason("cuda")
    built = "python3 setup.py build_ext --inplace builds it"
    return "compiled extension: built" if reason is None else f"compiled extension: left out ({reason}; {built})"


if __name__ == "__main__":
    raise SystemExit(main())
