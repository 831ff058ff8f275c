"""The GPU harness, walked with Triton's interpreter on the CPU; its bounds, its records, and that it can fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.gpu import __main__ as harness_main
from benchmarks.gpu import checks, core, correctness, engine, graphed, layers, rows, steps, withheld
from benchmarks.gpu.apart import Failed, Here
from benchmarks.gpu.checks import Check
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
    layer = [record for record in content["records"] if record["benchmark"] == "layer"]
    assert {record["direction"] for record in layer} == {"forward", "forward + backward"}
    assert {record["benchmark"] for record in content["records"]} == {"layer", *engine.MEASURED}
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
    assert done.returncode == 0 and "questions is done." in done.stdout, done.stdout + done.stderr
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
    (check,) = graphed.check("peft", True, machine)
    assert check.outcome == "FAILED" and "losses differ" in check.detail and check.subjects == (withheld.STEP,)


def test_dry_records_go_where_git_ignores_them() -> None:
    assert subprocess.run(["git", "check-ignore", "-q", "build/dry/dry.json"], cwd=ROOT, check=False).returncode == 0


def test_what_it_is_asked_for() -> None:
    done = harness("--part", "3/2")
    expected = "expected core, steps, questions, sanitizer, parity or i/n with 1 <= i <= n, got '3/2'"
    assert done.returncode == 2 and expected in done.stderr
    if not torch.cuda.is_available():
        done = harness()
        assert done.returncode == 2 and "No CUDA device" in done.stderr


def record(k: int, n: int, direction: str, ratios: dict[str, float], adapter: str = "bfloat16") -> dict[str, Any]:
    case = {"K": k, "N": n, "M": rows.TOKENS, "R": rows.RANK, "adapter": adapter}
    saved = 2 * rows.TOKENS * 16
    return {
        "benchmark": "layer",
        "case": case,
        "direction": direction,
        "saved_bytes": saved,
        "ratio_to_frozen": {"frozen": 1.0, **ratios},
    }


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


def test_bounds_of_the_budget_engine() -> None:
    def states(**records: dict[str, Any]) -> list[str]:
        return [row.state for row in rows.engine_rows([{"benchmark": name} | of for name, of in records.items()])]

    assert set(states()) == {rows.OPEN} and len(states()) == 5
    whole = {engine.WHOLE: {"peft_over_ours": {"ours": 50.0, engine.REPLAYED: 49.9, names.OURS_SWEPT: 51.0}}}
    assert states(**whole)[:3] == [rows.HELD, rows.MISSED, rows.HELD]
    alone = {engine.IMPORTANCE: {"importance_to_copy": {"triton": 1.31, "native": 1.3}}}
    assert states(**alone)[3:5] == [rows.MISSED, rows.HELD]
    counts = {engine.LAUNCHES: {"launches": {"ours, 3 layers": 6, "ours, 72 layers": 7, "nothing counted": 0}}}
    assert states(**counts)[-3:] == [rows.HELD, rows.MISSED, rows.OPEN]


@pytest.mark.parametrize(
    ("subject", "left"), [(withheld.ENGINE, 5), (withheld.GROUP, 5), (withheld.STEP, 2), ("triton:one_pass", 0)]
)
def test_steps_that_depend_on_what_failed_are_left(subject: str, left: int, tmp_path: Path) -> None:
    class Runner:
        def run(self, function: Any, *args: Any, seconds: float) -> Any:
            return [{"benchmark": "training step", "case": {}}]

    machine = Machine("cpu", 1, tmp_path)
    held = Sweep(tmp_path / "steps.json", {"commit": "a"})
    found = steps.run(machine, held, time.monotonic() + 60, Runner(), {subject: "a check failed: it"})  # type: ignore[arg-type]
    assert [said for _, said in found if isinstance(said, str)] == ["a check failed: it"] * left


def test_a_step_that_chose_what_failed_has_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from adalora_kernels.backends.triton import plans

    monkeypatch.setattr(plans, "choose", lambda *_: plans.Choice("published", "split", ""))
    planned = steps.Planned({}, lambda: plans.choose() and {"benchmark": "training step"})  # type: ignore[call-arg,return-value]
    monkeypatch.setattr(steps, "planned", lambda machine: [planned])
    machine = Machine("cpu", 1, tmp_path)
    assert steps.measured(0, machine, {"triton:/blas": "no"}) == [{"benchmark": "training step"}]
    with pytest.raises(AssertionError, match="triton:/split: no"):
        steps.measured(0, machine, {"triton:/split": "no"})


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


def test_what_is_as_before_counts_under_another_commit(tmp_path: Path) -> None:
    """Records are committed between parts, and earlier ones may lie in the checkout."""
    path, other, case = tmp_path / "sweep.json", tmp_path / "out" / "sweep.json", {"K": 1}
    Sweep(path, {"commit": "a", "source": "1"}).put(case, [{"case": case}])
    assert Sweep(path, {"commit": "b", "source": "1"}).holds(case)
    assert not Sweep(path, {"commit": "a", "source": "2"}).holds(case)
    later = Sweep(other, {"commit": "b", "source": "1"}, [path])
    assert later.holds(case)
    later.put("by name", [{"case": case}])
    again = Sweep(other, {"commit": "c", "source": "1"})
    assert again.holds(case) and again.holds("by name") and len(again.records) == 2


def test_contestants_must_agree(tmp_path: Path) -> None:
    machine, case = Machine("cpu", 1, tmp_path), Case(32, 48, 24, 8, "float32")
    (layer,) = layers.layers(case, machine)
    layers.add_peft(case, layer)
    calls = layers.rivals(case, machine, compiled=False)
    for direction in (withheld.FORWARD, withheld.BOTH):
        assert layers.disagreeing(calls, layer, direction) == {}
        right = calls[layers.ADDMM]
        faulty = calls | {layers.ADDMM: lambda layer, right=right: right(layer) * 1.1, "none": lambda layer: layer.none}
        found = layers.disagreeing(faulty, layer, direction)
        assert found[layers.ADDMM].startswith("y differs from PEFT's by ") and found["none"].startswith(
            "AttributeError"
        )


def test_what_failed_is_withheld() -> None:
    """In a process of its own, where kernels are interpreted: ``gpu_cases.py``."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-o", "addopts=", "-q", "--tb=short"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTEST_ADDOPTS"}
    done = subprocess.run(
        [*command, str(Path(__file__).with_name("gpu_cases.py"))],
        env=environment | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout + done.stderr


def test_plans_by_direction() -> None:
    failed = {"triton:/split": "no"}
    assert withheld.why(failed, "published/split", withheld.FORWARD) is None
    assert withheld.why(failed, "published/split", withheld.BOTH) == "no"
    assert withheld.why({"triton:published": "no"}, "published/split", withheld.FORWARD) == "no"


def test_other_parts_withhold_what_the_core_run_found(tmp_path: Path) -> None:
    record = {"environment": {"source": "1"}, "checks": [Check("it", "FAILED", subjects=("triton:one_pass",)).record()]}
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(record))
    assert set(withheld.of_record([tmp_path / "none.json", path], "1") or {}) == {"triton:one_pass"}
    assert withheld.of_record([path], "2") is None


def test_the_sanitizer_blames_the_plans_of_the_kernels_it_names() -> None:
    from benchmarks.gpu.sanitizer import blamed

    assert set(blamed("=========     at _svd_linear_shrink_kernel+0x10")) == {"triton:shrink_tail", "triton:blas"}
    assert set(blamed("_svd_linear_backward_x_kernel")) == {"triton:/split", "triton:/blas"}
    assert {"triton:one_pass", "triton:/one_gemm"} <= set(blamed("something else"))


def test_what_hung_is_not_tried_again() -> None:
    """Each time would cost the time of a job."""
    asked: list[str] = []

    class Hangs:
        def run(self, function: Any, *args: Any, seconds: float) -> Any:
            asked.append(args[0])
            if args[0] == "a":
                raise Failed("no answer within 90 s")
            return [Check(args[0], "holds")]

    runners: SimpleQueue[Any] = SimpleQueue()
    runners.put(Hangs())
    jobs = [correctness.Job(name, list, (name,), (f"triton:{name}",)) for name in "abab"]
    with ThreadPoolExecutor(1) as pool:
        found = [check for _, made in correctness._made(pool, runners, jobs, set()) for check in made]
    assert asked == ["a", "b", "b"]
    assert [check.outcome for check in found] == ["FAILED", "holds", "skipped", "holds"]
    assert withheld.of_checks(check.record() for check in found) == {"triton:a": "a check failed: a"}


def test_the_sanitizers_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tool has its share of the time, and a record; without the tool nothing is proved."""
    given: list[float] = []

    def check(tool: str, seconds: float, machine: Machine) -> list[Check]:
        given.append(seconds)
        return [Check(tool, "skipped" if tool == "racecheck" else "holds")]

    monkeypatch.setattr("benchmarks.gpu.sanitizer.check", check)
    machine = Machine("cpu", 1, tmp_path)
    assert harness_main.sanitizer(machine, time.monotonic() + 400) == 0
    assert given == pytest.approx([100, 133, 200, 400], abs=20)
    content = json.loads((tmp_path / "dry-sanitizer.json").read_text())
    assert list(complaints(content)) == [] and content["checks_held"] == 3
    assert [record["outcome"] for record in content["records"]] == ["holds"] * 3 + ["skipped"]


def test_the_self_test_blames_plans() -> None:
    line = "FAILED   triton on cuda: svd_linear bfloat16, float32 adapters, plan /split: dx error 1, budget 0"
    assert correctness.failed_in(line) == ("triton:/split",)
    assert correctness.failed_in("FAILED   native on cuda: importance: x") == (withheld.ENGINE,)
    assert correctness.failed_in("FAILED   native on cpu: importance: x") == ()


def test_a_case_that_fails_leaves_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    content: dict[str, Any] = {"left_out": []}
    case = {"K": 32}

    def fails() -> list[Any]:
        raise ValueError("no kernel")

    made = [{"benchmark": "layer", "case": case, "bytes": 1.0}]
    core.add(content, "records", case, fails, (), time.monotonic() + 60, Here())
    core.add(content, "records", case, lambda: made, (), time.monotonic() + 60, Here())
    core.add(content, "records", case, fails, (), time.monotonic() - 1, Here())
    assert content["records"] == made
    assert [left["why"] for left in content["left_out"]] == ["ValueError: no kernel", "for want of time"]
    assert "in fails" in content["left_out"][0]["trace"]
    assert "left out, ValueError" in capsys.readouterr().out


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
    assert outcomes.pop("one_pass: 9x8x16 r=4 float32/float32") == "FAILED"
    assert not any("after one_pass" in name for name in outcomes)  # its u is wrong, and says nothing of them
    assert len(outcomes) > 4 and set(outcomes.values()) == {"holds"}
    assert {subject for check in found if check.outcome == "FAILED" for subject in check.subjects} == {
        "triton:one_pass"
    }
