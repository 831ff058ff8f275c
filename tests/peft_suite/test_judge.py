"""The comparison of two runs finds what it is there for."""

from __future__ import annotations

import pytest

from tests.peft_suite.judge import Run, faults

OUTCOMES = {"a": "passed", "b": "skipped", "c": "xfailed", "d": "hub-only"}
CALLS = {"forward": 3, "svd_linear": 2}


def test_equal_runs_are_good() -> None:
    assert faults(Run(OUTCOMES, {}), Run(OUTCOMES, CALLS)) == []
    assert Run(OUTCOMES, CALLS).counts() == "1 passed, 1 skipped, 1 xfailed, 1 hub-only"


@pytest.mark.parametrize(
    ("unpatched", "patched", "fault"),
    [
        (Run(OUTCOMES, {}), Run({**OUTCOMES, "a": "failed"}, CALLS), "a: passed unpatched, failed patched"),
        (Run(OUTCOMES, {}), Run({**OUTCOMES, "a": "skipped"}, CALLS), "a: passed unpatched, skipped patched"),
        (Run({**OUTCOMES, "e": "passed"}, {}), Run(OUTCOMES, CALLS), "e: passed unpatched, missing patched"),
        (Run({**OUTCOMES, "e": "error"}, {}), Run({**OUTCOMES, "e": "error"}, CALLS), "e: error in both runs"),
        (Run({"b": "skipped"}, {}), Run({"b": "skipped"}, CALLS), "no test passed"),
        (Run(OUTCOMES, {}), Run(OUTCOMES, {}), "no fused forward with an op of ours"),
        (Run(OUTCOMES, {}), Run(OUTCOMES, {"forward": 3}), "no fused forward with an op of ours"),
        (Run(OUTCOMES, CALLS), Run(OUTCOMES, CALLS), "the unpatched run was patched"),
    ],
)
def test_each_fault_is_found(unpatched: Run, patched: Run, fault: str) -> None:
    found = faults(unpatched, patched)
    assert any(fault in line for line in found), found
