"""The tuner, walked with Triton's interpreter on the CPU; and what it makes of records."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from adalora_kernels.backends.triton import measured
from adalora_kernels.backends.triton.tiles import Tile
from benchmarks import tune

ROOT = Path(__file__).parents[2]


def test_dry_run(tmp_path: Path) -> None:
    """Every kernel of every plan is tried, the table can be read, and a second run has nothing left to do."""
    command = [sys.executable, "-m", "benchmarks.tune", "--dry", "--results", str(tmp_path)]
    # What another commit measured counts as left: without git the commit is unknown, whoever commits meanwhile.
    environment = os.environ | {"GIT_DIR": str(tmp_path / "none")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    held = json.loads((tmp_path / "dry-tuning.json").read_text())
    assert {"one_pass", "gemm", "one_gemm", "x", "group_shrink", "group_x"} <= {
        record["case"]["kernel"] for record in held["records"]
    }
    assert all(len(record["candidates"]) >= 2 for record in held["records"])
    assert any(c["microseconds"] for record in held["records"] for c in record["candidates"][1:])
    ((key, table),) = measured.read(json.loads((tmp_path / "measured.json").read_text())).items()
    assert key[0] == "0.0" and table.tile("one_pass", "half", 16) and table.evidence == ("dry-tuning.json",)
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 0 and "the tile before" not in again.stdout, again.stdout + again.stderr


def test_steps_change_one_field() -> None:
    tile = Tile(128, 256, 0, 8, 3)
    found = tune.neighbours(tile)
    changed = [[f for f in vars(tile) if getattr(tile, f) != getattr(other, f)] for other in found]
    assert all(len(fields) == 1 for fields in changed) and len(found) == len(set(found))
    assert [fields[0] for fields in changed] == ["block_m"] * 2 + ["block_n"] + ["num_warps"] + ["num_stages"] * 2


def test_ranks_that_share_a_tile_are_one_entry() -> None:
    tiles = {16: [1], 32: [2], 64: [2], 128: [3]}
    records: list[dict[str, Any]] = [{"case": {"kernel": "k", "rank": r}, "tile": t} for r, t in tiles.items()]
    found = [(entry["max_rank"], entry["tile"]) for entry in tune.tile_entries(records)]
    assert found == [(16, [1]), (64, [2]), (128, [3])]


def test_the_fastest_plan_of_each_direction() -> None:
    case = {"K": 768, "N": 3072, "M": 1024, "R": 8, "adapter": "float32"}
    forward = {"frozen": 1, "peft": 2, "ours": 3, "triton:slow": 5, "triton:quick": 4}
    both = {"frozen": 1, "peft": 2, "ours": 3, "triton:/slow": 9, "triton:/quick": 8}
    records = [
        {"case": case, "direction": direction, "microseconds": {name: {"median": t} for name, t in times.items()}}
        for direction, times in (("forward", forward), ("forward + backward", both))
    ]
    point = {"M": 1024, "K": 768, "N": 3072, "R": 8, "width": "half", "adapter_bytes": 4}
    assert tune.plan_entries(records) == [
        {"direction": direction, "point": point, "plan": "quick"} for direction in ("forward", "backward")
    ]
