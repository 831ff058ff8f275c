"""The GPU harness, walked with Triton's interpreter on the CPU; its bounds, its records, and that it can fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.gpu import __main__ as harness_main
from benchmarks.gpu import checks, graphed, layers, rows
from benchmarks.gpu.layers import Case
from benchmarks.gpu.machine import Machine
from benchmarks.records import Sweep, complaints
from benchmarks.report import page
from benchmarks.step import names

ROOT = Path(__file__).parents[2]


def harness(*arguments: str) -> subprocess.CompletedProcess[str]:
    # What another commit measured counts as left: without git the commit is unknown, whoever commits meanwhile.
    environment = os.environ | {"GIT_DIR": str(ROOT / "none")}
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_core(tmp_path: Path) -> None:
    """Checks, every contestant in both directions, the host's time, the bounds; and a record that says it is dry."""
    done = harness("--dry", "--results", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads((tmp_path / "dry.json").read_text())
    assert list(complaints(content)) == []
    assert content["environment"]["dry"] and content["left_out"] == []
    assert content["checks_held"] >= 4 and {check["outcome"] for check in content["checks"]} == {"skipped"}
    assert {record["direction"] for record in content["records"]} == {"forward", "forward + backward"}
    timed = set(content["records"][0]["microseconds"])
    assert {"frozen", "addmm_", "peft", "peft, torch.compile", "ours", "triton:one_pass"} <= timed
    assert {record["direction"] for record in content["groups"]} == {"forward", "forward + backward"}
    assert {"frozen", "peft", "one by one", "ours", "triton:shrink_tail/blas"} == set(
        content["groups"][0]["microseconds"]
    )
    assert any(row["name"].endswith("one group: ours / one by one") for row in content["rows"])
    assert content["rows"] and "no figure above means anything" in done.stdout


def test_parts(tmp_path: Path) -> None:
    """A share of the sweep, resumed with nothing left to do; and the questions."""
    share = ("--dry", "--part", "1/4", "--results", str(tmp_path))
    done = harness(*share)
    assert done.returncode == 0 and "part 1/4 is done." in done.stdout, done.stdout + done.stderr
    assert "layer forward" in done.stdout and "layer" not in harness(*share).stdout
    done = harness("--dry", "--part", "questions", "--results", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads((tmp_path / "dry-questions.json").read_text())
    asked = {record["benchmark"] for record in content["records"]}
    assert asked == {
        "ceilings", "host time of a launch", "importance in a backward", "plain product", "accumulation",
        "backward passes", "group"
    }  # fmt: skip
    text = page.write(tmp_path, tmp_path / "page").read_text(encoding="utf-8")
    assert "Left out" not in text and "Backward passes" in text and "Host time of a launch" in text


def test_whole_steps(tmp_path: Path) -> None:
    """Eager, captured and compiled; PEFT's AdaLoRA, which can't be captured, says why; and every bound is open."""
    done = harness("--dry", "--part", "steps", "--results", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads((tmp_path / "dry-steps.json").read_text())
    assert list(complaints(content)) == []
    records = content["records"]
    assert [(r["benchmark"], r["case"]["lora"]) for r in records] == [
        (names.EAGER, names.RANK), (names.GRAPHED, names.RANK), (names.EAGER, names.TARGET),
        (names.GRAPHED, names.TARGET), (names.COMPILED, names.RANK),
    ]  # fmt: skip
    ours = {names.OURS, names.OURS_SWEPT}
    for record in records:
        assert set(record["ours_over_lora"]) == ours and ours | {names.LORA} <= set(record["milliseconds"])
        if record["benchmark"] == names.GRAPHED:
            assert set(record["not_captured"]) == {names.PEFT} and set(record["eager_peft_over_ours"]) == ours
            assert "RuntimeError: called a synchronizing operation" in record["not_captured"][names.PEFT]
    assert records[-1]["not_compiled"] == {}
    assert {row["state"] for row in content["rows"]} == {rows.OPEN} and "not measured (at most 1)" in done.stdout


def test_graphed_steps_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine("cpu", 1, ROOT)
    monkeypatch.setattr(graphed, "plain_losses", lambda *_: [1.0] * 24)
    outcomes = [(check.outcome, check.detail) for check in graphed.whole_steps(machine)]
    assert {outcome for outcome, _ in outcomes} == {"FAILED", "skipped"} and "losses differ" in outcomes[0][1]


def test_dry_records_go_where_git_ignores_them() -> None:
    assert subprocess.run(["git", "check-ignore", "-q", "build/dry/dry.json"], cwd=ROOT, check=False).returncode == 0


def test_what_it_is_asked_for() -> None:
    done = harness("--part", "3/2")
    expected = "expected core, steps, parity, questions or i/n with 1 <= i <= n, got '3/2'"
    assert done.returncode == 2 and expected in done.stderr
    if not torch.cuda.is_available():
        done = harness()
        assert done.returncode == 2 and "No CUDA device" in done.stderr


def record(k: int, n: int, direction: str, ratios: dict[str, float], adapter: str = "bfloat16") -> dict[str, Any]:
    case = {"K": k, "N": n, "M": rows.TOKENS, "R": rows.RANK, "adapter": adapter}
    saved = 2 * rows.TOKENS * 16
    return {"case": case, "direction": direction, "saved_bytes": saved, "ratio_to_frozen": {"frozen": 1.0, **ratios}}


def test_bounds() -> None:
    """Each bound holds on one side of its figure and is missed on the other."""

    def missed(*arguments: Any, **options: Any) -> list[str]:
        return [row.name for row in rows.rows([record(*arguments, **options)]) if not row.holds]

    fast = {"ours": 1.05, "peft": 2.0, "addmm_": 1.3}
    assert missed(4096, 4096, "forward", fast) == []
    assert missed(4096, 4096, "forward", fast | {"ours": 1.09}) == [
        "forward, 4096x4096, bfloat16 adapter: ours / frozen"
    ]
    assert missed(768, 768, "forward", fast | {"ours": 1.19}) == []
    assert missed(768, 768, "forward", fast | {"addmm_": 1.0}) == [
        "forward, 768x768, bfloat16 adapter: ours / the best other (addmm_)"
    ]
    both = "forward + backward"
    assert missed(768, 768, both, fast) == ["forward + backward, 768x768, bfloat16 adapter: PEFT / ours"]
    assert missed(4096, 4096, both, {"ours": 1.14, "peft": 2.2, "addmm_": 1.3}, adapter="float32") == [
        "forward + backward, 4096x4096, float32 adapter: PEFT / ours"
    ]
    kept = record(768, 768, "forward", fast) | {"saved_bytes": 2 * rows.TOKENS * 16 + 1}
    assert next(rows.rows([kept])).holds is False


def test_sweep_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "sweep.json"
    one, two = {"K": 1}, {"K": 2}
    first = Sweep(path, {"commit": "a"})
    assert not first.holds(one)
    first.put(one, [{"case": one, "direction": "forward"}])
    again = Sweep(path, {"commit": "a"})
    assert again.holds(one) and not again.holds(two)
    later = Sweep(path, {"commit": "b"})
    assert not later.holds(one)  # measured with other code
    later.put(two, [{"case": two, "direction": "forward"}])
    assert Sweep(path, {"commit": "a"}).holds(one) and Sweep(path, {"commit": "b"}).holds(two)
    Sweep(path, {"commit": "b"}).put(one, [{"case": one, "direction": "forward"}])
    assert json.loads(path.read_text())["environments"] == [{"commit": "b"}]


def test_contestants_must_agree(tmp_path: Path) -> None:
    machine, case = Machine("cpu", 1, tmp_path), Case(32, 48, 24, 8, "float32")
    (layer,) = layers.layers(case, machine)
    layers.add_peft(case, layer)
    calls = layers.rivals(case, machine, compiled=False)
    layers.check_equal(calls, layer)
    right = calls[layers.ADDMM]
    calls[layers.ADDMM] = lambda layer: right(layer) * 1.1
    with pytest.raises(AssertionError, match="addmm_: y differs from PEFT's by"):
        layers.check_equal(calls, layer)


def test_a_case_that_fails_leaves_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    content: dict[str, Any] = {"records": [], "left_out": []}
    case = Case(32, 48, 24, 16, "float32")

    def fails() -> list[Any]:
        raise AssertionError("ours: y differs from PEFT's")

    harness_main.add(content, "records", case, fails, time.monotonic() + 60)
    harness_main.add(content, "records", case, lambda: [{"benchmark": "layer"}], time.monotonic() + 60)
    harness_main.add(content, "records", case, fails, time.monotonic() - 1)
    assert content["records"] == [{"benchmark": "layer"}]
    assert [left["why"] for left in content["left_out"]] == [
        "AssertionError: ours: y differs from PEFT's", "for want of time"
    ]  # fmt: skip
    assert "left out, AssertionError" in capsys.readouterr().out


def test_a_wrong_plan_fails_its_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from adalora_kernels.reference import svd_linear as reference

    def launcher(direction: str, name: str) -> Any:
        if direction == "backward":
            return reference.backward
        return lambda *args: tuple(t * (1.01 if name == "one_pass" else 1) for t in reference.forward(*args))

    monkeypatch.setattr(checks.plans, "launcher", launcher)
    shape = checks.Shape(9, 8, 16, 4, torch.float32, torch.float32)
    found = list(checks.parity((shape,), Machine("cpu", 1, tmp_path)))
    outcomes = {check.name: check.outcome for check in found}
    assert outcomes["one_pass: 9x8x16 r=4 float32/float32"] == "FAILED"
    assert outcomes["split after one_pass: 9x8x16 r=4 float32/float32"] == "FAILED"  # from a wrong u
    del outcomes["one_pass: 9x8x16 r=4 float32/float32"]
    assert all(outcome == "holds" for name, outcome in outcomes.items() if "after one_pass" not in name)
