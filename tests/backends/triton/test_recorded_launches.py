"""Runs the cases that compare launches byte by byte in a process whose ``libcuda.so.1`` writes them down."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from tests.backends.triton.recording import built  # noqa: E402

CASES = Path(__file__).with_name("recorded_launch_cases.py")
# Triton 3.6 builds a launcher for every kernel: of what it is compared with, only that.
SELECTION = "every_byte" if triton.__version__.startswith("3.6.") else ""


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_recorded_launches(tmp_path: Path) -> None:
    """Every case passes; where one fails, the report is the child's."""
    environment = {name: value for name, value in built(tmp_path).items() if name != "PYTEST_ADDOPTS"}
    options = [
        "-p",
        "no:cacheprovider",
        "-o",
        "addopts=",
        "-q",
        "-rA",
        "--tb=short",
        f"--basetemp={tmp_path / 'child'}",
    ]
    child = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(CASES)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    report = child.stdout + child.stderr
    print(report)
    if child.returncode != 0:
        pytest.fail(f"{CASES.name} exited with {child.returncode}:\n{report}", pytrace=False)
    assert re.search(r"\d+ passed", report) and "skipped" not in report, report
