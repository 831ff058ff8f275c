"""The commit that a record was made from."""

from __future__ import annotations

import subprocess
from pathlib import Path


def commit() -> str:
    """The commit of the checkout, with a mark where it is changed."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            capture_output=True, text=True, check=True, cwd=Path(__file__).parent,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


__all__ = ["commit"]
