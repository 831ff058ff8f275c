"""``adalora-kernels bench``: what it runs, and what it says where there is nothing to run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import adalora_kernels
from adalora_kernels.cli import bench
from adalora_kernels.cli.main import main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], Path]]:
    """Commands in place of their being run, which end with status 3."""
    commands: list[tuple[list[str], Path]] = []

    def run(command: list[str], cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
        commands.append((command, cwd))
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(bench.subprocess, "run", run)
    return commands


def test_measures_what_make_bench_does(ran: list[tuple[list[str], Path]]) -> None:
    assert main(["bench"]) == 3
    assert ran == [([sys.executable, "-m", bench.MEASURE], ROOT)]
    recipe = re.search(r"^bench:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert recipe and re.findall(r"-m (\S+)", recipe[1]) == [bench.MEASURE]


def test_report_is_written_where_the_user_stands(
    ran: list[tuple[list[str], Path]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "--report", "--results", "records"]) == 3
    assert ran[0][0][2:] == [
        bench.REPORT,
        f"--results={tmp_path / 'records'}",
        f"--output={tmp_path / 'benchmark-report'}",
    ]


def test_needs_a_checkout(ran: list[tuple[list[str], Path]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(adalora_kernels, "__file__", str(tmp_path / "adalora_kernels" / "__init__.py"))
    with pytest.raises(
        SystemExit, match=r"adalora-kernels bench: expected a source checkout.*clone the repository"
    ) as error:
        main(["bench"])
    assert "\n" not in str(error.value) and not ran


def test_folders_are_the_reports_alone(ran: list[tuple[list[str], Path]]) -> None:
    with pytest.raises(SystemExit, match=r"--output: expected it with --report alone"):
        main(["bench", "--output", "somewhere"])
    assert not ran
