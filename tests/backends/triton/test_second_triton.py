"""What compiles and launches under this Triton does under the one that pairs with torch 2.11, in processes of its own.

``make test`` names the folder that holds it in ADALORA_SECOND_TRITON; ``make setup`` installs it there.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = os.environ.get("ADALORA_SECOND_TRITON", "")
HERE = Path(__file__).parent
LONGEST = HERE / "test_compile.py"
REST = [
    HERE / "test_launch.py",
    HERE / "test_recorded_launches.py",
    *sorted(path for path in HERE.glob("test_compile*.py") if path != LONGEST),
]

pytestmark = pytest.mark.skipif(not FOLDER, reason="ADALORA_SECOND_TRITON names no folder")


def child(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Python with the second Triton before all else."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(FOLDER).absolute()), environment.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=900, check=False
    )


def test_it_is_another_version() -> None:
    found = child("-c", "import triton; print(triton.__version__)")
    assert found.stdout.startswith("3.6."), found.stdout + found.stderr


@pytest.mark.parametrize("files", [[LONGEST], REST], ids=["longest", "rest"])
def test_under_the_second_triton(files: list[Path]) -> None:
    """Every test of the files passes; where one fails, the report is the child's."""
    done = child("-m", "pytest", "-p", "no:cacheprovider", "-q", "--tb=short", *map(str, files))
    report = done.stdout + done.stderr
    if done.returncode != 0:
        pytest.fail(f"exited with {done.returncode}:\n{report}", pytrace=False)
    assert re.search(r"\d+ passed", report) and "skipped" not in report, report
