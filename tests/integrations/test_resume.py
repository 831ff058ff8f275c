"""A Trainer run that was stopped and resumed is the run that never stopped, step by step and bit by bit."""

from __future__ import annotations

import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed import worlds
from tests.integrations.trainer_runs import STOPS, assert_equal, run


@pytest.mark.parametrize("optimizer", ["torch", "ours"])
def test_resumed_equals_never_stopped(optimizer: str, tmp_path: Path) -> None:
    whole = run(tmp_path, optimizer, saves=STOPS)
    for stop in STOPS:
        resumed = run(tmp_path / "again", optimizer, tmp_path / f"checkpoint-{stop}", seed=7)
        assert_equal(resumed, whole, stop)


def test_killed_in_a_process_of_its_own(tmp_path: Path) -> None:
    script = (
        "import sys, pathlib; from tests.integrations.trainer_runs import run; "
        "run(pathlib.Path(sys.argv[1]), saves=(6,), kill_at=8)"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    assert subprocess.run(command, check=False, capture_output=True).returncode == -signal.SIGKILL
    assert sorted(path.name for path in (tmp_path / "checkpoint-6").glob("adalora*")) == ["adalora_state.safetensors"]
    whole = run(tmp_path / "whole")
    assert_equal(run(tmp_path, resume=tmp_path / "checkpoint-6", seed=7), whole, 6)


def _assert_ranks_agree(first: tuple[Any, list[Tensor]], second: tuple[Any, list[Tensor]]) -> None:
    """Each has its own data."""
    assert first[0] == second[0] and sum(map(sum, first[0])) == 3 * len(first[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


def test_two_processes(tmp_path: Path) -> None:
    """DDP, where the main process writes; FSDP2; and DeepSpeed, whose engine steps in ``backward``."""
    from tests.integrations import trainer_jobs

    first, second = worlds.run(2, tmp_path / "world", trainer_jobs.resumed, tmp_path / "run", timeout=240.0)
    for ours, theirs in zip(first, second, strict=True):
        _assert_ranks_agree(ours, theirs)
    assert len(first) == 3 + 2 * (find_spec("deepspeed") is not None)
    for pattern, _ in first[1:]:  # every way shares the same sentences and adds up their gradients
        assert pattern == first[0][0]
