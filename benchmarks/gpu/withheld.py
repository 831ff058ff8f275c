"""What failed checks say is not to be trusted, and which contestants that are, so that no time of theirs is published.

A subject is a plan, as the backend that forces it ("triton:one_pass" forward, "triton:/split" backward), or one of
``GROUP``, ``ENGINE`` and ``STEP``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

GROUP, ENGINE, STEP = "group", "budget engine", "training step"
FORWARD, BOTH = "forward", "forward + backward"
Withheld = Mapping[str, str]  # by subject why


def of_checks(checks: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """By subject the first check that failed, off the records of checks."""
    found: dict[str, str] = {}
    for check in checks:
        if check["outcome"] == "FAILED":
            for subject in check["subjects"]:
                found.setdefault(subject, f"a check failed: {check['name']}")
    return found


def of_record(paths: Iterable[Path], source: str) -> dict[str, str] | None:
    """As the core run's record has it, the first of these files that was made from such a source; None without one."""
    for path in paths:
        if path.exists():
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["environment"].get("source") == source:
                return of_checks(content.get("checks", ()))
    return None


def why(withheld: Withheld, plan: str, direction: str) -> str | None:
    """Why a layer that runs "forward/backward" has no time to be published in a direction; None where it has one."""
    forward, _, backward = plan.partition("/")
    subjects = [f"triton:{forward}"] + [f"triton:/{backward}"] * (direction == BOTH)
    return next((withheld[subject] for subject in subjects if subject in withheld), None)


__all__ = ["BOTH", "ENGINE", "FORWARD", "GROUP", "STEP", "Withheld", "of_checks", "of_record", "why"]
