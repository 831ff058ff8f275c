"""Failing checks in the GPU harness, for a process in which Triton interprets; ``test_gpu.py`` runs it."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from benchmarks.gpu import core, layers, rows, timed
from benchmarks.gpu.apart import Here
from benchmarks.gpu.checks import Check
from benchmarks.gpu.layers import Case
from benchmarks.gpu.machine import Machine

every = core.jobs
PLANTED = (
    Check("one_pass: a shape", "FAILED", "y: 3 elements are NaN", ("triton:one_pass",), "Traceback"),
    Check("blas after one_pass: a shape", "FAILED", "it hangs", ("triton:/blas",)),
    Check("split after one_pass: a shape", "holds", subjects=("triton:/split",)),
)


def test_a_failed_check_is_recorded_and_what_depends_on_it_withheld(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a time of the plans that failed; with those of all others, and exit 1."""
    monkeypatch.setattr(
        core, "jobs", lambda machine, failed: [j for j in every(machine, failed) if j[0] == "records"][1:2]
    )
    machine = Machine("cpu", 2, tmp_path)
    assert core.core(machine, time.monotonic() + 600, Here(), PLANTED) == 1
    content = json.loads((tmp_path / "dry.json").read_text())
    assert [check["name"] for check in content["checks"]] == [check.name for check in PLANTED[:2]]
    assert content["checks"][0]["trace"] == "Traceback" and content["checks_held"] == 1
    why = {
        "triton:one_pass": f"a check failed: {PLANTED[0].name}",
        "triton:/blas": f"a check failed: {PLANTED[1].name}",
    }
    assert content["withheld"] == why
    forward, both = content["records"]
    assert forward["withheld"] == {"triton:one_pass": why["triton:one_pass"]}
    assert both["withheld"] == {"triton:/blas": why["triton:/blas"]}
    for record in (forward, both):
        assert not {"triton:one_pass", "triton:/blas"} & {*record["microseconds"], *record["ratio_to_frozen"]}
        assert {"frozen", "addmm_", "peft", "ours"} <= set(record["microseconds"])
    assert {"triton:published", "triton:/split"} <= {*forward["microseconds"], *both["microseconds"]}
    assert "FAILED one_pass: a shape: y: 3 elements are NaN" in capsys.readouterr().out


def test_ours_is_withheld_with_a_plan_that_is_chosen(tmp_path: Path) -> None:
    machine, case = Machine("cpu", 2, tmp_path), Case(32, 48, 24, 16, "float32")
    chosen = timed.explain(case, layers.layers(case, machine)[0])[0].partition("/")
    failed = {f"triton:/{chosen[2]}": "a check failed: it"}
    forward, both = timed.measure(case, machine, withheld=failed)
    assert "ours" in forward["microseconds"] and "ours" not in both["microseconds"]
    found = {
        row.name: row.state for row in rows.rows([both | {"case": {**both["case"], "M": 8192, "K": 768, "N": 768}}])
    }
    assert found["forward + backward, 768x768, float32 adapter: PEFT / ours"] == rows.OPEN
