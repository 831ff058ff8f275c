"""Checks in processes of their own: side by side, since compiling takes long; and under compute-sanitizer."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.gpu.checks import SMALL, Check, shapes
from benchmarks.gpu.machine import Machine

_AT_ONCE = 8
_FOUND = 99  # what compute-sanitizer exits with where it found something
_SELF_TEST = [sys.executable, "-c", "from adalora_kernels.cli.main import main; raise SystemExit(main(['check']))"]
_PARITY = [sys.executable, "-m", "benchmarks.gpu", "--part", "parity"]


def side_by_side(machine: Machine) -> Iterator[Check]:
    """The package's self-test, and ``checks.parity`` of every shape."""
    workers = max(1, min(_AT_ONCE, (os.cpu_count() or 2) // 2))
    with TemporaryDirectory() as folder, ThreadPoolExecutor(workers) as pool:
        jobs = [pool.submit(_self_test, machine)]
        jobs += [pool.submit(_parity_of, machine, Path(folder), i) for i in range(len(shapes(machine)))]
        for job in jobs:
            yield from job.result()


def _self_test(machine: Machine) -> list[Check]:
    """``adalora-kernels check``: every backend that can run, the budget engine and the compiled extension with it."""
    name = "adalora-kernels check"
    if machine.dry:
        return [Check(name, "skipped", "dry run")]
    done = subprocess.run(_SELF_TEST, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return [Check(name, "holds")]
    told = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    return [Check(name, "FAILED", f"exit {done.returncode}: " + ("\n".join(told) + done.stderr)[-2000:])]


def _parity_of(machine: Machine, folder: Path, index: int) -> list[Check]:
    command = [*_PARITY[:-1], f"parity:{index}", "--results", str(folder), *(["--dry"] if machine.dry else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    path = folder / f"parity-{index}.json"
    if not path.exists():
        shape = shapes(machine)[index]
        return [Check(f"parity: {shape}", "FAILED", f"exit {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")]
    return [Check(**check) for check in json.loads(path.read_text(encoding="utf-8"))["checks"]]


def under_the_sanitizer(machine: Machine, tool: str, timeout: float) -> Iterator[Check]:
    """compute-sanitizer over the small shapes."""
    name = f"compute-sanitizer {tool} over {len(SMALL)} small shapes"
    program = shutil.which("compute-sanitizer")
    if machine.dry or program is None:
        yield Check(name, "skipped", "dry run" if machine.dry else "compute-sanitizer is not on PATH")
        return
    command = [program, "--tool", tool, "--error-exitcode", str(_FOUND), *_PARITY]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # or a read past a tensor meets another one
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=timeout, check=False
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        yield Check(name, "skipped", f"not through in {timeout:.0f} s")
        return
    tail = (done.stdout + done.stderr)[-2000:]
    if "Device not supported" in tail:
        yield Check(name, "skipped", "this device or driver does not let it in")
    else:
        yield Check(name, "holds" if done.returncode == 0 else "FAILED", "" if done.returncode == 0 else tail)


__all__ = ["side_by_side", "under_the_sanitizer"]
