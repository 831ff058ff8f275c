"""What must hold between PEFT's tests as they are and under the patch."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

KINDS = ("passed", "skipped", "xfailed", "xpassed", "hub-only", "failed", "error")


@dataclass(frozen=True)
class Run:
    """One run of a test suite.

    Attributes:
        outcomes: of each test by its id, one of ``KINDS``; hub-only: failed for want of the hub.
        calls: how often our fused forward and each of our ops ran, where that was counted.
    """

    outcomes: dict[str, str]
    calls: dict[str, int]

    @classmethod
    def read(cls, path: Path) -> Run:
        """What ``record`` wrote."""
        return cls(**json.loads(path.read_text()))

    def counts(self) -> str:
        """How many tests of each kind."""
        found = Counter(self.outcomes.values())
        return ", ".join(f"{found[kind]} {kind}" for kind in KINDS if found[kind])

    def op_calls(self) -> int:
        """How often an op of ours ran."""
        return sum(count for name, count in self.calls.items() if name != "forward")


def faults(unpatched: Run, patched: Run) -> list[str]:
    """Why the patched run is not as good as the unpatched one; empty where it is.

    Each test has the same outcome in both, some pass, nothing fails but for want of the hub, and the patched run went
    through our layers and ops while the unpatched one didn't.
    """
    found = []
    for test in sorted(unpatched.outcomes.keys() | patched.outcomes.keys()):
        before, after = (run.outcomes.get(test, "missing") for run in (unpatched, patched))
        if before != after:
            found.append(f"{test}: {before} unpatched, {after} patched")
        elif before in ("failed", "error", "xpassed"):
            found.append(f"{test}: {before} in both runs")
    if "passed" not in patched.outcomes.values():
        found.append("no test passed")
    if not patched.calls.get("forward") or not patched.op_calls():
        found.append(f"the patched run made no fused forward with an op of ours, but {patched.calls}")
    if unpatched.calls:
        found.append(f"the unpatched run was patched: {unpatched.calls}")
    return found
