"""Cells that exist, tables of the runs that exist, what must be beaten, and what is committed."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import records as schema
from benchmarks.paper import __main__ as command
from benchmarks.paper import cost, presets, publish, records, tables
from benchmarks.paper.methods import METHODS
from benchmarks.paper.standin import STAND_INS
from benchmarks.paper.tasks import TASKS
from benchmarks.paper.training import PRECISIONS
from benchmarks.step import models


def test_every_cell_has_a_method_and_a_task() -> None:
    names = {name: STAND_INS if name == "stand-ins" else TASKS for name in presets.TABLES}
    counted = {name: len(presets.cells(name)) for name in presets.TABLES}
    assert counted == {"ablation": 13, "glue": 96, "squad": 18, "stand-ins": 35, "summaries": 18}
    assert set(presets.methods()) == set(METHODS) and command.PRECISIONS == PRECISIONS
    for name, tasks in names.items():
        for cell in presets.cells(name):
            assert cell.task in tasks
            figures = tables.figures(
                tasks[cell.task],
                {"scores": {s: dict.fromkeys(tasks[cell.task].metrics, 0.0) for s in tasks[cell.task].evaluation}},
            )
            assert name == "stand-ins" or len(cell.paper) in (len(figures), 1)


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (("rte", "adalora", "9M"), "budget: expected one of 0.65%, 1.27M, 0.32M for rte and adalora"),
        (("rte", "adalora", None), "budget: expected one of 0.65%, 1.27M, 0.32M, got None"),
        (("xsum", "bitfit", None), "the paper's tables have no cell of xsum and bitfit"),
    ],
)
def test_cells_that_are_not_there(cell: tuple[str, str, str | None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        presets.find(*cell)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--task", "rte", "--method", "adalora", "--budget", "0.32M", "--data", "/none"], "found no folder"),
        (["keep", "--output", "/none"], "expected runs of the stand-ins, found none; make paper makes them"),
        (["cost", "--device", "tpu"], "device: expected cpu, or cuda where there is a GPU, got 'tpu'"),
    ],
)
def test_the_command_says_what_is_wrong_in_a_line(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks.paper", *arguments])
    assert command.main() == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_seeds_unless_told() -> None:
    cell = ["run", "--task", "rte", "--method", "lora"]
    counted = {name: command._parser().parse_args(told).seeds for name, told in (("run", cell), ("all", ["stand-ins"]))}
    assert counted == {"run": 1, "all": 3}


def test_processes_of_a_launcher_are_not_shared_out(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["benchmarks.paper", "stand-ins"])
    assert command.main() == 2 and "call it without torchrun" in capsys.readouterr().err


def test_tables_are_shown_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from benchmarks.paper.__main__ import main; "
        f"sys.argv = ['', 'table', 'glue', '--output', {str(tmp_path)!r}]; "
        "assert main() == 0; assert not {'torch', 'transformers', 'datasets', 'peft'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-S", "-c", code], check=True, cwd=Path(__file__).parents[3])


def record(task: str, method: str, seed: int, score: float, budget: str = "b", rate: float = 1e-3) -> dict[str, Any]:
    return {
        "task": task, "method": method, "budget": budget, "seed": seed, "trained_parameters": 1, "losses": [1.0],
        "scores": {"validation": {"accuracy": score}}, "baselines": {"validation": {"accuracy": 50.0}}, "seconds": 1.0,
        "preset": {"learning_rate": rate, "batch": 32}, "precision": "fp32",
        "setting": {"total_steps": 9, "initial_warmup": 1, "final_warmup": 2, "mask_interval": 3},
        "commit": "abc", "device": "cpu", "python": "3", "torch": "2", "transformers": "5", "peft": "0",
    }  # fmt: skip


def put(*held: dict[str, Any]) -> records.Records:
    return records.by_cell(held)


def test_the_table_shows_runs_that_exist_beside_the_paper(tmp_path: Path) -> None:
    assert "no run of it" in tables.table("glue", {})
    for seed, score in enumerate((86.0, 88.0)):
        folder = tmp_path / "rte" / "adalora-0.32M" / f"seed{seed}"
        folder.mkdir(parents=True)
        (folder / records.RECORD).write_text(json.dumps(record("rte", "adalora", seed, score, "0.32M")))
    shown = tables.table("glue", records.below(tmp_path))
    rows = shown.splitlines()
    assert any("| adalora | 0.32M | 1 |" in row and "87.00 ± 1.41" in row for row in rows)
    assert any(row.startswith("| | the paper's |") and "87.36" in row and "95.80" in row for row in rows)
    assert "2 runs; seeds 0, 1; commit abc; fp32 on cpu" in shown and "bitfit" not in shown
    assert "rte: 9 steps of 32, t_i 1, t_f 2, ΔT 3" in shown and "Learning rates: adalora 0.001" in shown


def heads() -> list[dict[str, Any]]:
    return [record("order", "head", seed, score) for seed, score in enumerate((59.0, 60.0, 61.0))]


def test_a_method_must_beat_both_rivals_by_two_standard_errors() -> None:
    lora = [record("order", "lora", seed, score) for seed, score in enumerate((69.0, 70.0, 71.0))]
    assert tables.not_beaten(put(*heads(), *lora)) == []
    bitfit = [record("order", "bitfit", seed, score) for seed, score in enumerate((60.0, 61.0, 62.0))]
    missed = tables.not_beaten(put(*heads(), *bitfit))
    assert len(missed) == 1 and "a head on the frozen model" in missed[0]
    full = [record("order", "full", seed, score) for seed, score in enumerate((40.0, 50.0, 45.0))]
    assert sum("order, full" in line for line in tables.not_beaten(put(*heads(), *full))) == 2
    assert "order, lora: 1 seed" in tables.not_beaten(put(*heads(), *lora[:1]))[0]


def test_what_is_committed_is_what_was_run_without_the_losses(tmp_path: Path) -> None:
    runs = [*heads(), record("order", "lora", 0, 70.0, rate=2e-3), record("order", "lora", 1, 71.0)]
    runs[1]["commit"] = "def"
    content = records.kept(put(*runs))
    assert not list(schema.complaints(content)) and "losses" not in json.dumps(content)
    assert len(content["environments"]) == 2 and len(content["records"]) == 3  # LoRA was run with two rates
    schema.write(tmp_path / "kept.json", content)
    back = records.committed(tmp_path / "kept.json")
    assert {key: [r["seed"] for r in held] for key, held in back.items()} == {
        ("order", "head", "b"): [0, 1, 2],
        ("order", "lora", "b"): [0, 1],
    }
    assert back["order", "head", "b"][1].items() >= {k: v for k, v in runs[1].items() if k != "losses"}.items()
    assert tables.not_beaten(back) == tables.not_beaten(put(*runs))


def test_cost_of_every_budget(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cost, "BATCH", {"cpu": {"sst2": (2, 8)}})
    monkeypatch.setattr(cost, "SMALL", [replace(models.SMALL[0], build=lambda: models._deberta(64, 1, 32))])
    monkeypatch.setattr(publish, "COST", tmp_path / "cost.json")
    monkeypatch.setattr(publish, "RUNS", tmp_path / "none.json")
    publish.keep_cost(cost.measured("cpu", rounds=2))
    found = schema.read(publish.COST)["records"]
    assert [(r["case"]["R"], r["case"]["target"]) for r in found] == [(2, 1), (4, 2), (12, 8)]
    for record in found:
        assert record["megabytes"]["ours"] <= record["megabytes"]["PEFT AdaLoRA"]
        assert min(times["p20"] for times in record["milliseconds"].values()) > 0
    shown = publish.cost_table()
    assert all(f"| SST-2, 2×8 | {budget} |" in shown for budget in ("0.08%", "0.16%", "0.65%"))
    assert "MNLI 1.10×, 1.11×, 1.11×; SST-2 1.18×, 1.16×, 1.16×" in shown  # the paper's


def test_readme_shows_what_is_committed() -> None:
    text = publish.README.read_text(encoding="utf-8")
    assert text == publish.with_section(text), "run: python -m benchmarks.paper keep"
