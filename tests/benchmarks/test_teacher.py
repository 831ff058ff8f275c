"""The check of the idea: a small protocol end to end, a kill, tables of what exists, and faults that are noticed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from adalora_kernels.allocator.schedule import BudgetSchedule, StepPlan
from benchmarks.paper.teacher import __main__ as command
from benchmarks.paper.teacher import protocol as fixed
from benchmarks.paper.teacher.methods import execute
from benchmarks.paper.teacher.networks import LoRA, problem
from benchmarks.paper.teacher.protocol import AdaLora, Protocol, Run, Setting, proportional
from benchmarks.paper.teacher.records import Log, Results, load, merged, read_log, save
from benchmarks.paper.teacher.runner import PARTS, run_all, tuned_rate
from benchmarks.paper.teacher.summary import verdicts
from benchmarks.paper.teacher.tables import table
from benchmarks.records import complaints

TINY = Protocol(
    width=12, true_ranks=(0, 1, 2, 5), initial_rank=5, steps=10, batch=16, training=128, held_out=64, scales=(0.1, 1.0),
    budgets=(0.5, 1.0), rates=(0.03, 0.1), tuning_seeds=(1,), seeds=(10, 11), gammas=(0.1,), others=(AdaLora(alpha=6),),
    must_win=2, may_win=0,
)  # fmt: skip
ABOUT = {"device": "a CPU", "commit": "c", "python": "3", "torch": "2"}
ADALORA = Setting("adalora", "varied", 1.0, AdaLora())


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def invented(protocol: Protocol, run: Run) -> dict[str, Any]:
    """A result as ``execute`` makes it, without training: AdaLoRA wins on the varied teacher alone."""
    uniform = run.setting.teacher == "uniform"
    ranks = [2] * 4 if uniform else list(protocol.true_ranks)
    better = run.setting.method == "adalora" and not uniform
    return {
        "loss": (0.01 if better else 0.1) * (1 + run.rate), "start": run.setting.scale**2, "ranks": ranks,
        "true_ranks": ranks, "correlation": None if uniform else 1.0, "gamma": 0.1, "regularizer_to_loss": 0.5,
        "seconds": 1.0,
    }  # fmt: skip


def all_invented(tmp_path: Path) -> Results:
    with Log(tmp_path / "log.jsonl", TINY, ABOUT) as log:
        run_all(log, execute=invented, tell=lambda text: None)
    return log.results


def test_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Through the command, with real trainings: every run is made, and the files agree with each other."""
    protocol = replace(TINY, scales=(1.0,), others=())
    monkeypatch.setattr(command, "Protocol", lambda: protocol)
    log = tmp_path / "log.jsonl"
    assert command.main(["run", "--log", str(log)]) == 0
    settings = [*fixed.main_settings(protocol), *fixed.study_settings(protocol)]
    assert len(settings) == 7 + 1
    results = read_log(log)
    assert len(results.runs) == 8 * 2 + 7 * 4 + 1 * 2
    assert all(tuned_rate(results, setting) in TINY.rates for setting in settings)
    assert command.main(["collect", "--log", str(log), "--results", str(tmp_path)]) == 0
    capsys.readouterr()
    status = command.main(["table", "--results", str(tmp_path)])
    kept = load(tmp_path / "teacher.json")
    assert list(complaints(json.loads((tmp_path / "teacher.json").read_text()))) == []
    assert status == int(any(held is False for _, held in verdicts(kept)))
    assert capsys.readouterr().out == (tmp_path / "teacher.md").read_text() == table(kept) + "\n"
    for name in ("teacher-ranks.png", "teacher-border.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_methods_learn() -> None:
    """Long enough to tell them apart: the true ranks are best, and AdaLoRA finds them where γ suits the loss."""
    protocol = replace(TINY, steps=150, training=256)
    outcome = {m: execute(protocol, Run(Setting(m, "varied", 1.0), 1.0, 0.1, 10)) for m in ("lora", "lora-true")}
    assert outcome["lora-true"]["loss"] < 1e-3 < 1e-2 < outcome["lora"]["loss"] < 1
    assert outcome["lora"]["ranks"] == [2] * 4 and outcome["lora-true"]["correlation"] == 1.0
    for scale in TINY.scales:
        suited = Setting("adalora", "varied", scale, AdaLora(gamma=0.01, of_loss=True))
        found = execute(protocol, Run(suited, 1.0, 0.03, 10))
        assert found["correlation"] > 0.8 and found["loss"] < 0.1
        assert found["gamma"] == pytest.approx(0.01 * problem(protocol, "varied", scale, 10).start)
    cut = execute(protocol, Run(Setting("lora-truncated", "varied", 1.0), 1.0, 0.1, 10))
    assert sum(cut["ranks"]) == 8 and cut["correlation"] > 0.9 and cut["loss"] < 0.1


def test_runs_repeat_and_meet_the_same_data() -> None:
    run = Run(ADALORA, 1.0, 0.03, 10)
    first, other = execute(TINY, run), execute(TINY, replace(run, setting=Setting("lora", "varied", 1.0)))
    again = execute(TINY, run)
    assert first | {"seconds": 0} == again | {"seconds": 0}
    assert first["gamma"] == 0.1 and first["regularizer_to_loss"] > 0
    assert first["start"] == other["start"] and first["true_ranks"] == other["true_ranks"]


def test_teacher_has_the_ranks_it_says() -> None:
    """The increment is what a LoRA of those ranks has left to learn."""
    told = problem(TINY, "varied", 0.1, 3)
    assert sorted(told.ranks) == list(TINY.true_ranks)
    assert problem(TINY, "uniform", 0.1, 3).ranks == [2] * 4
    layer = LoRA(told.weights[0], 3)
    assert torch.equal(layer(told.x), told.x @ told.weights[0].t()), "the increment starts at 0"
    torch.nn.init.normal_(layer.lora_B)
    expected = told.x @ (told.weights[0] + layer.increment()).t()
    torch.testing.assert_close(layer(told.x), expected, rtol=1e-4, atol=1e-5)


def test_killed_run_resumes(tmp_path: Path) -> None:
    path, made = tmp_path / "log.jsonl", []

    def killed(protocol: Protocol, run: Run) -> dict[str, Any]:
        if len(made) == 7:
            raise KeyboardInterrupt
        made.append(run)
        return invented(protocol, run)

    with pytest.raises(KeyboardInterrupt), Log(path, TINY, ABOUT) as log:
        run_all(log, execute=killed, tell=lambda text: None)
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])  # as if the last line had been cut in the middle
    again: list[Run] = []

    def counted(protocol: Protocol, run: Run) -> dict[str, Any]:
        again.append(run)
        return invented(protocol, run)

    with Log(path, TINY, ABOUT | {"commit": "d"}) as log:
        assert list(log.results.runs) == made[:6]
        run_all(log, execute=counted, tell=lambda text: None)
    assert again[0] == made[6] and not set(again) & set(made[:6])
    results = read_log(path)
    assert set(results.runs) == {*made, *again}
    assert [results.environments[results.runs[run]["environment"]]["commit"] for run in (made[0], made[6])] == [
        "c",
        "d",
    ]


def test_log_is_ours_alone(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with Log(path, TINY, ABOUT), pytest.raises(ValueError, match="to which another process appends"):
        Log(path, TINY, ABOUT)
    with pytest.raises(ValueError, match="expected runs under this protocol"):
        Log(path, replace(TINY, steps=21), ABOUT)
    path.write_text(path.read_text() + "{}\n")
    with pytest.raises(ValueError, match="expected a record in line 3"):
        read_log(path)
    with pytest.raises(ValueError, match="found none at"):
        read_log(tmp_path / "none.jsonl")


def test_parts_go_side_by_side(tmp_path: Path) -> None:
    """Two logs hold the two parts, and together they are the whole."""
    parts = []
    for part in PARTS:
        with Log(tmp_path / f"{part}.jsonl", TINY, ABOUT | {"commit": part}) as log:
            run_all(log, (part,), invented, tell=lambda text: None)
        parts.append(read_log(tmp_path / f"{part}.jsonl"))
    whole, expected = merged(parts), all_invented(tmp_path)
    assert set(whole.runs) == set(expected.runs) and not set(parts[0].runs) & set(parts[1].runs)
    assert {whole.environments[result["environment"]]["commit"] for result in whole.runs.values()} == set(PARTS)
    parts[1].protocol = replace(TINY, steps=21)
    with pytest.raises(ValueError, match="expected runs under one protocol"):
        merged(parts)


def test_compact_file_keeps_the_runs(tmp_path: Path) -> None:
    results = all_invented(tmp_path)
    save(tmp_path / "teacher.json", results)
    kept = load(tmp_path / "teacher.json")
    assert (kept.protocol, kept.environments, list(kept.runs)) == (TINY, [ABOUT], list(results.runs))
    assert table(kept) == table(results)
    data = json.loads((tmp_path / "teacher.json").read_text())
    assert data["protocol"] == json.loads(json.dumps(asdict(TINY)))
    assert list(complaints(data)) == []
    tuned = [row for row in data["records"] if row["case"]["seed"] in TINY.tuning_seeds]
    assert tuned and all("ranks" not in row for row in tuned)
    data["records"][0]["case"].pop("rate")
    (tmp_path / "teacher.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match="results: expected runs in"):
        load(tmp_path / "teacher.json")


def test_table_shows_only_runs_that_exist(tmp_path: Path) -> None:
    """Without AdaLoRA's runs at one cell nothing stands there, nobody wins, and the verdicts are open."""
    results = all_invented(tmp_path)
    full = table(results)
    assert full.count("| 1 | 1 (8) |") == 2 and "2 of 2: **reached**" in full
    partial = Results(TINY, results.environments, {})
    assert "| 1 | 1 (8) |" not in table(partial) and table(partial).count("**open**") == 3
    partial.runs = {run: result for run, result in results.runs.items() if run.setting.method != "adalora"}
    row = next(line for line in table(partial).splitlines() if line.startswith("| 1 | 1 (8) |"))
    assert row.split("|")[6:9] == ["  ", "  ", "  "] and "1.000" in row
    # One candidate less, and no rate is chosen: final runs are not published.
    last = fixed.tuning_runs(TINY, ADALORA)[-1]
    partial.runs = {run: result for run, result in results.runs.items() if run != last}
    assert tuned_rate(partial, ADALORA) is None and "0 of 0: **open**" in table(partial)


@pytest.mark.parametrize("fault", ["a win lost", "ranks not found", "a win on the control", "diverged"])
def test_verdicts_notice(tmp_path: Path, fault: str) -> None:
    results = all_invented(tmp_path)
    assert [held for _, held in verdicts(results)] == [True, True, True]
    setting = replace(ADALORA, teacher="uniform") if fault == "a win on the control" else ADALORA
    rate = tuned_rate(results, setting)
    assert rate is not None
    planted = {
        "a win lost": {"loss": 0.5}, "ranks not found": {"correlation": 0.7}, "a win on the control": {"loss": 0.001},
        "diverged": {"loss": None, "correlation": None, "ranks": []},
    }[fault]  # fmt: skip
    results.runs[Run(setting, 1.0, rate, 10)] |= planted
    expected = {"ranks not found": [True, False, True], "a win on the control": [True, True, False]}
    assert [held for _, held in verdicts(results)] == expected.get(fault, [False, True, True])
    assert "**MISSED**" in table(results)


def test_a_budget_that_is_not_met_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: a schedule that never ranks."""
    monkeypatch.setattr(BudgetSchedule, "plan", lambda *_: StepPlan(budget=8, update=True))
    with pytest.raises(RuntimeError, match="expected a total rank of at most 8, got 20"):
        execute(TINY, Run(ADALORA, 1.0, 0.03, 10))


@pytest.mark.parametrize("method", fixed.METHODS)
def test_divergence_is_a_result(method: fixed.Method) -> None:
    setting = Setting(method, "varied", 1.0, AdaLora() if method == "adalora" else None)
    result = execute(TINY, Run(setting, 1.0, 1e9, 10))
    assert result["loss"] is None and result["ranks"] == [] and result["correlation"] is None
    json.dumps(result, allow_nan=False)


def test_proportional_shares() -> None:
    assert proportional((0, 1, 2, 5), 8) == [0, 1, 2, 5]
    for total in (1, 4, 9, 12):
        shares = proportional((0, 1, 2, 5), total)
        assert sum(shares) == total and shares == sorted(shares) and shares[0] == 0
        assert all(
            math.floor(total * r / 8) <= s <= math.ceil(total * r / 8)
            for r, s in zip(TINY.true_ranks, shares, strict=True)
        )
    with pytest.raises(ValueError, match="expected one above 0"):
        proportional((0, 0), 3)


def test_protocol_refuses_what_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match=r"the same whole rank, got 0\.7"):
        replace(TINY, budgets=(0.7, 1.0))
    with pytest.raises(ValueError, match="expected none of tuning_seeds among them"):
        replace(TINY, tuning_seeds=(10,))


def test_committed_table_is_made_from_the_committed_runs() -> None:
    folder = command.RESULTS
    results = load(folder / "teacher.json")
    assert (folder / "teacher.md").read_text(encoding="utf-8") == table(results) + "\n", "run collect"
    assert results.protocol == Protocol(), "the protocol changed after the runs"
