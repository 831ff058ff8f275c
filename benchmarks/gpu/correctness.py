"""All checks of a run, side by side in processes of their own: compiling takes long, and one may crash or hang."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from queue import SimpleQueue
from typing import Any

from adalora_kernels.allocator.schedule import VARIANTS
from adalora_kernels.backends.triton import plans
from benchmarks.gpu import fused, graphed, groups, public, sanitizer
from benchmarks.gpu.apart import Apart, Failed, Here
from benchmarks.gpu.checks import Check, backward_parity, forward_parity, shapes
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.withheld import ENGINE, GROUP, STEP

_AT_ONCE = 8
_SECONDS = 90.0  # for one job; kernels are compiled within it
_SELF_TEST = [sys.executable, "-c", "from adalora_kernels.cli.main import main; raise SystemExit(main(['check']))"]


@dataclass(frozen=True)
class Job:
    """Some checks that are made together.

    Attributes:
        name: of the check that is reported where they come to no end.
        function: makes them, of ``args``.
        subjects: what is not to be trusted then.
        seconds: how long they may take.
    """

    name: str
    function: Callable[..., list[Check]]
    args: tuple[Any, ...]
    subjects: tuple[str, ...] = ()
    seconds: float = _SECONDS


def checks(machine: Machine) -> Iterator[Check]:
    """Every check, as it is made; backward plans after those forward plans that hold at the shape."""
    runners: SimpleQueue[Apart | Here] = SimpleQueue()
    ended: set[str] = set()
    workers = max(1, min(_AT_ONCE, (os.cpu_count() or 2) // 2))
    for _ in range(workers):
        runners.put(Here() if machine.dry else Apart())
    try:
        with ThreadPoolExecutor(1 if machine.dry else workers) as pool:
            own = [pool.submit(job.function, *job.args) for job in _in_processes_of_their_own(machine)]
            first = list(_made(pool, runners, _forward(machine), ended))
            yield from (check for _, found in first for check in found)
            held = [job.args[:2] for job, found in first if any(check.outcome == "holds" for check in found)]
            jobs = [*_backward(machine, held), *_public(machine), *_whole(machine)]
            for _, found in _made(pool, runners, jobs, ended):
                yield from found
            for future in own:
                yield from future.result()
    finally:
        while not runners.empty():
            runners.get().close()


def _made(
    pool: ThreadPoolExecutor, runners: SimpleQueue[Apart | Here], jobs: Iterable[Job], ended: set[str]
) -> Iterator[tuple[Job, list[Check]]]:
    """The jobs with their checks, in their order; none of what has ``ended`` in a crash or a hang, each of which costs
    the time of a job."""

    def made(job: Job) -> list[Check]:
        if lost := ended.intersection(job.subjects):
            return [Check(job.name, "skipped", f"{', '.join(sorted(lost))} crashed or hung before", job.subjects)]
        runner = runners.get()
        try:
            found: list[Check] = runner.run(job.function, *job.args, seconds=job.seconds)
            if any(check.outcome == "FAILED" and check.trace for check in found):
                runner.close()  # what a launch that failed leaves on the device is anybody's guess
        except Failed as failure:
            ended.update(job.subjects)
            found = [Check(job.name, "FAILED", str(failure), job.subjects, failure.trace)]
        finally:
            runners.put(runner)
        return found

    yield from [(job, future.result()) for job, future in [(job, pool.submit(made, job)) for job in jobs]]


def _forward(machine: Machine) -> Iterator[Job]:
    for shape, plan in product(shapes(machine), plans.FORWARD):
        yield Job(f"{plan}: {shape}", forward_parity, (shape, plan, machine), (f"triton:{plan}",))


def _backward(machine: Machine, held: list[tuple[Any, ...]]) -> Iterator[Job]:
    for shape, plan in product(shapes(machine), plans.BACKWARD):
        before = [name for where, name in held if where == shape][: 2 if machine.dry else None]
        name = f"{plan} after {', '.join(before)}: {shape}"
        yield Job(name, backward_parity, (shape, plan, before, machine), (f"triton:/{plan}",))


def _public(machine: Machine) -> Iterator[Job]:
    for plan, check in product(public.pairs(machine), public.CHECKS):
        name = f"{plan}: {check.__name__.replace('_', ' ')}"
        yield Job(name, check, (plan, machine), public.subjects(plan))


def _whole(machine: Machine) -> Iterator[Job]:
    for number in range(1 if machine.dry else len(groups.CHECKED)):
        yield Job(f"group {number}", groups.check, (number, machine), (GROUP,))
    for term in (False, True):
        yield Job(f"importance in a backward, term {term}", fused.check, (term, machine), (ENGINE,))
    for variant, swept in product(VARIANTS, (True, False)):
        yield Job(f"graphed_step, {variant}, swept {swept}", graphed.check, (variant, swept, machine), (STEP,))
    for swept in (True, False):
        yield Job(f"a step waits for nothing, swept {swept}", graphed.check_waits, (swept, machine))


def _in_processes_of_their_own(machine: Machine) -> Iterator[Job]:
    yield Job("adalora-kernels check", self_test, (machine,))
    yield Job("compute-sanitizer", sanitizer.check, ("memcheck", 150.0, machine))


def self_test(machine: Machine) -> list[Check]:
    """``adalora-kernels check``: every backend that can run, the budget engine and the compiled extension with it."""
    name = "adalora-kernels check"
    if machine.dry:
        return [Check(name, "skipped", "dry run")]
    try:
        done = subprocess.run(_SELF_TEST, capture_output=True, text=True, check=False, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        return [Check(name, "FAILED", f"not through in {_SECONDS:.0f} s", (ENGINE,))]
    if done.returncode == 0:
        return [Check(name, "holds")]
    told = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    found = [Check(f"{name}: {' '.join(line.split()[1:])}", "FAILED", line, failed_in(line)) for line in told]
    return found or [Check(name, "FAILED", f"exit {done.returncode}", (ENGINE,), done.stderr[-2000:])]


def failed_in(line: str) -> tuple[str, ...]:
    """What a line of the self-test says is not to be trusted on a GPU."""
    plan = re.search(r"triton on cuda: svd_linear.*, plan (\S+):", line)
    return (f"triton:{plan[1]}",) if plan else (ENGINE,) if " on cuda: " in line else ()


__all__ = ["Job", "checks", "failed_in", "self_test"]
