"""DeepSpeed ZeRO-1, 2 and 3, where gradients are gone before the engine's step returns."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import worlds

# Imported by the jobs alone: every worker collects this file, and the import takes long.
pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")

# stage, variant, clipping, micro-batches; parameters below the threshold are kept whole by stage 3
TWO = (((1, "peft", 0.5, 2), {}), ((2, "original"), {}), ((3, "paper", 0.5, 2), {}))
FOUR = (((3, "original"), {"stage3_param_persistence_threshold": 0}),)


@pytest.mark.parametrize(("size", "cases"), ((2, TWO), (4, FOUR)))
def test_lockstep_with_one_process(size: int, cases: Any, tmp_path: Path, record_property: Any) -> None:
    from tests.distributed import zero_jobs

    for found in worlds.run(size, tmp_path / "world", zero_jobs.in_turn, cases, timeout=120.0):
        assert all(case["live"] == 8 and case["rankings"] > 5 for case in found)
    record_property(
        "measured", f"{sum(case['ties'] for case in found)} triplets differ, all within 1e-5 of a threshold"
    )


def test_accelerate(tmp_path: Path) -> None:
    """Its ``backward`` makes the engine's step, and its optimizer's step does nothing."""
    from tests.distributed import zero_jobs

    for mine, theirs in worlds.run(2, tmp_path / "world", zero_jobs.both_ways, timeout=120.0):
        assert torch.equal(mine, theirs) and mine[-1].sum() == 8
