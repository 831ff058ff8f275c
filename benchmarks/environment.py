"""What a record was made from and on: the commit, and the processor."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from hashlib import sha256
from pathlib import Path

_ROOT = Path(__file__).parents[1]
_PARTS = ("adalora_kernels", "csrc", "benchmarks/gpu", "benchmarks/step", "benchmarks/timing.py")
_SUFFIXES = (".py", ".json", ".h", ".cpp", ".cu", ".cuh")


def commit() -> str:
    """The commit of the checkout, with a mark where it is changed; without git what ADALORA_COMMIT says."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            capture_output=True, text=True, check=True, cwd=Path(__file__).parent,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("ADALORA_COMMIT") or "unknown"
    return done.stdout.strip()


@cache
def source() -> str:
    """A fingerprint of what a device's figures depend on: the package, what is compiled for it, and what times it.

    Unlike the commit it stays what it is while records and pages are committed.
    """
    files = [
        path for part in _PARTS for path in ([_ROOT / part] if part.endswith(".py") else (_ROOT / part).rglob("*"))
    ]
    found = sha256()
    for path in sorted(file for file in files if file.suffix in _SUFFIXES):
        found.update(path.relative_to(_ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:12]


def processor() -> str:
    """The CPU's name, as far as the system tells."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


__all__ = ["commit", "processor", "source"]
