"""Runs the case files in processes of their own: interpreted everywhere, compiled where there is a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

# File and selection of each child; the slowest in two, so that two workers share it.
GROUPS = {
    "layer": ("kernel_cases.py", "test_layer"),
    "kernels": ("kernel_cases.py", "not test_layer"),
    "backward_plans": ("backward_plan_cases.py", ""),
    "op": ("op_cases.py", ""),
    "engine": ("engine_cases.py", ""),
    "engine_matrices": ("engine_matrix_cases.py", ""),
    "forward_plans": ("forward_plan_cases.py", ""),
    "group": ("group_cases.py", ""),
    "fused_kernels": ("fused_kernel_cases.py", ""),
    "fused_training": ("fused_training_cases.py", ""),
}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("mode", ["interpreted", pytest.param("compiled", marks=needs_gpu)])
def test_kernel_cases(mode: str, group: str) -> None:
    """Every case of the group passes; where one fails, the report is the child's."""
    name, selection = GROUPS[group]
    environment = {key: value for key, value in os.environ.items() if key != "PYTEST_ADDOPTS"}
    environment["TRITON_INTERPRET"] = "1" if mode == "interpreted" else "0"
    options = ["-p", "no:cacheprovider", "-o", "addopts=", "-q", "-rA", "--tb=short", "-k", selection]
    child = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(Path(__file__).with_name(name))],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    report = child.stdout + child.stderr
    print(report)
    if child.returncode != 0:
        pytest.fail(f"{name} ({mode}, -k {selection!r}) exited with {child.returncode}:\n{report}", pytrace=False)
    assert re.search(r"\d+ passed", report), report
    assert "skipped" not in report, report
