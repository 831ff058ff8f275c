"""Settings that every test shares."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

# Files whose tests take longest, most of them a process each.
LONGEST = ("test_second_triton.py", "test_kernels.py", "test_gpu.py", "test_tune.py")


def pytest_configure(config: pytest.Config) -> None:
    """Two workers on two cores: one thread each, or they spin against each other."""
    if os.environ.get("PYTEST_XDIST_WORKER"):
        torch.set_num_threads(1)
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # and the processes that tests start


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest comes first, so that workers who share the rest end at the same time."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print what tests measured and left with ``record_property("measured", text)``, also from other processes."""
    reports = terminalreporter.getreports("passed")
    for report in reports:
        for name, text in report.user_properties:
            if name == "measured":
                terminalreporter.write_line(f"{report.nodeid.split('::')[-1]}: {text}")


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Every test draws the same numbers, alone or among others."""
    torch.manual_seed(0)
