"""compute-sanitizer over the small shapes: every plan of both directions, in a process of its own.

Triton synchronises by barriers of the hardware and by ``mbarrier``s that its compiler places, and the tickets of
``published`` by atomics between blocks. So

    memcheck    addresses: accesses out of bounds or misaligned, in global and in shared memory
    synccheck   barriers that threads of a warp or block don't all reach
    initcheck   global memory that is read before anybody has written it
    racecheck   shared memory that two warps touch without a barrier between; it knows nothing of global memory
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

from adalora_kernels.backends.triton import plans
from benchmarks.gpu.checks import SMALL, Check
from benchmarks.gpu.machine import Machine

TOOLS = ("memcheck", "synccheck", "initcheck", "racecheck")
_FOUND = 99  # what compute-sanitizer exits with where it found something
_PARITY = [sys.executable, "-m", "benchmarks.gpu", "--part", "parity"]
# The launched kernels' names, by what the tables call them, where they are others.
_NAMES = {"one_gemm": "backward_gemm", "dx": "backward_gemm", "g": "backward_t"}


def check(tool: str, seconds: float, machine: Machine) -> list[Check]:
    """One tool; what it finds is said of the plans that launch the kernels it names, or of all."""
    name = f"compute-sanitizer {tool} over {len(SMALL)} small shapes"
    program = shutil.which("compute-sanitizer")
    if machine.dry or program is None:
        return [Check(name, "skipped", "dry run" if machine.dry else "compute-sanitizer is not on PATH")]
    command = [program, "--tool", tool, "--error-exitcode", str(_FOUND), *_PARITY]
    # Else a read past a tensor meets another one, and memory that was freed counts as written.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=seconds, check=False
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return [Check(name, "skipped", f"not through in {seconds:.0f} s")]
    said = done.stdout + done.stderr
    if "Device not supported" in said:
        return [Check(name, "skipped", "this device or driver does not let it in")]
    if done.returncode == 0:
        return [Check(name, "holds")]
    found = "\n".join(line for line in said.splitlines() if line.startswith("========="))
    return [Check(name, "FAILED", f"exit {done.returncode}: {(found or said)[:4000]}", blamed(found), said[-2000:])]


def blamed(said: str) -> tuple[str, ...]:
    """The plans that launch one of the kernels that are named; every plan where none is."""
    kernels = set(re.findall(r"_svd_linear_(\w+?)_kernel", said))
    launched = {f"triton:{name}": set(plan.kernels) for name, plan in plans.FORWARD.items()}
    for name, plan in plans.BACKWARD.items():
        launched[f"triton:/{name}"] = {_NAMES.get(kernel, f"backward_{kernel}") for kernel in plan.kernels}
    return tuple(name for name, of in launched.items() if of & kernels) or tuple(launched)


__all__ = ["TOOLS", "blamed", "check"]
