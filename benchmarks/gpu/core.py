"""The core set: every check, then the times of what held, each in a process that may fail without the others."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from benchmarks import records
from benchmarks.gpu import correctness, engine, groups, host
from benchmarks.gpu.apart import Apart, Failed, Here
from benchmarks.gpu.checks import Check
from benchmarks.gpu.groups import GroupCase
from benchmarks.gpu.layers import Case
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.questions import ceilings, single
from benchmarks.gpu.rows import RANK, Row, engine_rows, group_rows, rows
from benchmarks.gpu.shown import shown
from benchmarks.gpu.timed import measure
from benchmarks.gpu.withheld import ENGINE, Withheld, of_checks

SHAPES = ((768, 768), (768, 3072), (3072, 768), (4096, 4096), (4096, 14336), (14336, 4096))
COMPILED = ((768, 768), (768, 3072), (4096, 4096), (4096, 14336))  # at these torch.compile takes part
TOKENS, ADAPTERS = (8192, 1024), ("bfloat16", "float32")
DRY_SHAPES, DRY_TOKENS = ((32, 48),), (24,)
SECONDS = 120.0  # for one case; kernels are compiled within it
HOST = "host time of an eager layer: ours / PEFT LoRA"

Job = tuple[str, dict[str, Any], Callable[..., list[dict[str, Any]]], tuple[Any, ...]]


def core(machine: Machine, deadline: float, runner: Apart | Here, checks: Iterable[Check] | None = None) -> int:
    """Checks, the core set, the host's time; then the record and the bounds.

    Args:
        machine: where.
        deadline: no case is begun after it.
        runner: where cases are timed.
        checks: those to be made; None for all.

    Returns:
        1 where a check failed, a bound is missed or a case was left out.
    """
    path = machine.record()
    content: dict[str, Any] = {"environment": machine.environment()}
    content |= {name: [] for name in ("records", "groups", "rows", "left_out", "checks")}
    seen = list(announced(correctness.checks(machine) if checks is None else checks))
    content["checks"] = [check.record() for check in seen if check.outcome != "holds"]
    content["checks_held"] = sum(check.outcome == "holds" for check in seen)
    failed = [check for check in seen if check.outcome == "FAILED"]
    content["withheld"] = withheld = of_checks(content["checks"])
    records.write(path, content)
    if failed:
        print(f"{len(failed)} checks failed; withheld: {', '.join(withheld) or 'nothing'}.", flush=True)
    for where, about, function, args in jobs(machine, withheld):
        add(content, where, about, function, args, deadline, runner)
        records.write(path, content)  # a run that is cut off keeps what it has
    for name in ("ceilings", "host"):
        content[name] = next(iter(content.get(name, ())), None)
    found = [*rows(content["records"]), *engine_rows(content["records"]), *group_rows(content["groups"])]
    found.append(Row(HOST, (content["host"] or {}).get("ours_over_lora"), 1))
    content["rows"] = [row.record() for row in found]
    records.write(path, content)
    print("\n".join(["", *map(str, found), f"{content['checks_held']} checks hold; written to {path}"]))
    if failed or not content["checks_held"]:
        print("\n".join(["", *(f"FAILED {check.name}: {check.detail[:300]}" for check in failed)]))
        return 1
    if machine.dry:
        print("A dry run: no figure above means anything.")
        return 0
    return 0 if all(row.holds for row in found) and not content["left_out"] else 1


def jobs(machine: Machine, withheld: Withheld) -> Iterator[Job]:
    """What is timed, the decisive cases first: the section of the record, the case, and what makes its records."""
    yield "ceilings", {"benchmark": "ceilings"}, single, (ceilings, machine)
    shapes, tokens = (DRY_SHAPES, DRY_TOKENS) if machine.dry else (SHAPES, TOKENS)
    cases = [Case(k, n, m, RANK, adapter) for m in tokens for adapter in ADAPTERS for k, n in shapes]
    decisive = len(cases) // len(tokens)
    yield from (_layer(case, tokens, machine, withheld) for case in cases[:decisive])
    for name, function in engine.MEASURED.items() if ENGINE not in withheld else ():
        yield "records", {"benchmark": name}, single, (function, machine)
    yield "host", {"benchmark": "host time of an eager layer"}, single, (host.measure, machine, withheld)
    for group in group_cases(machine, tokens[:1]):
        yield "groups", group.record(), groups.measure, (group, machine, withheld)
    yield from (_layer(case, tokens, machine, withheld) for case in cases[decisive:])


def _layer(case: Case, tokens: tuple[int, ...], machine: Machine, withheld: Withheld) -> Job:
    compiled = (case.M, case.adapter) == (tokens[0], "bfloat16") and (machine.dry or (case.K, case.N) in COMPILED)
    return "records", case.record(), measure, (case, machine, compiled, withheld)


def add(
    content: dict[str, Any],
    where: str,
    about: dict[str, Any],
    function: Callable[..., list[dict[str, Any]]],
    args: tuple[Any, ...],
    deadline: float,
    runner: Apart | Here,
) -> None:
    """Time a case and keep its records, or why it has none: the others are not to be lost for it."""
    held, left = content.setdefault(where, []), {"why": "for want of time"}
    if time.monotonic() <= deadline:
        try:
            made = runner.run(function, *args, seconds=SECONDS)
        except Failed as failure:
            left = {"why": str(failure), "trace": failure.trace}
        else:
            held += made
            print("\n".join(shown(record) for record in made), flush=True)
            return
    content["left_out"].append(about | left)
    print(f"left out, {left['why']}: {about}", flush=True)


def group_cases(machine: Machine, tokens: Iterable[int]) -> list[GroupCase]:
    """Each group of layers at each number of tokens, at the rank of the core set."""
    shapes = groups.DRY_SHAPES if machine.dry else groups.SHAPES
    return [GroupCase(k, ns, m, RANK, "bfloat16") for k, ns in shapes for m in tokens]


def announced(checks: Iterable[Check]) -> Iterator[Check]:
    """The checks, with a line for each that doesn't hold."""
    for check in checks:
        if check.outcome != "holds":
            print(f"{check.outcome:7} {check.name}: {check.detail}", flush=True)
        yield check


__all__ = ["ADAPTERS", "DRY_SHAPES", "DRY_TOKENS", "SHAPES", "add", "announced", "core", "group_cases", "jobs"]
