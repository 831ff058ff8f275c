"""The tuner, walked with Triton's interpreter on the CPU; and what it makes of records."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from adalora_kernels.backends.triton import measured, sources
from adalora_kernels.backends.triton.tiles import Tile
from benchmarks import tiling, tune
from benchmarks.gpu.apart import Failed, Here
from benchmarks.gpu.layers import Case
from benchmarks.gpu.machine import Machine
from benchmarks.records import complaints, write

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
    assert any("microseconds" in c for record in held["records"] for c in record["candidates"][1:])
    assert list(complaints(held)) == []
    ((key, table),) = measured.read(json.loads((tmp_path / "measured.json").read_text())).items()
    assert key[0] == "0.0" and table.tile("one_pass", "half", 16) and table.evidence == ("dry-tuning.json",)
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 0 and "tiles tried" not in again.stdout, again.stdout + again.stderr
    assert "Every kernel is recorded." in again.stdout


def test_steps_change_one_field() -> None:
    tile = Tile(128, 256, 0, 8, 3)
    found = tiling.neighbours(tile)
    changed = [[f for f in vars(tile) if getattr(tile, f) != getattr(other, f)] for other in found]
    assert all(len(fields) == 1 for fields in changed) and len(found) == len(set(found))
    assert [fields[0] for fields in changed] == ["block_m"] * 2 + ["block_n"] + ["num_warps"] + ["num_stages"] * 2


def test_ranks_that_share_a_tile_are_one_entry() -> None:
    tiles = {16: [1], 32: [2], 64: [2], 128: [3]}
    records = [{"case": {"kernel": "k", "rank": r, "source": "s"}, "tile": t} for r, t in tiles.items()]
    entries = tune.tile_entries(records)
    assert [(entry["max_rank"], entry["tile"]) for entry in entries] == [(16, [1]), (64, [2]), (128, [3])]
    assert {entry["source"] for entry in entries} == {"s"}


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
        {"direction": direction, "point": point, "plan": "quick", "source": sources.fingerprint_of_all()}
        for direction in ("forward", "backward")
    ]
    del records[0]["microseconds"]["triton:quick"], records[1]["microseconds"]["triton:/slow"]  # withheld
    assert [entry["plan"] for entry in tune.plan_entries(records)] == ["slow", "quick"]


def test_hopeless_tiles_are_not_compiled() -> None:
    fine = [Tile(128, 256, 64, 8, 4), Tile(128, 64, 256, 8, 3), Tile(64, 0, 64, 8, 4), Tile(256, 256, 0, 4, 5)]
    assert not any(map(tiling.hopeless, fine))
    assert tiling.hopeless(Tile(256, 256, 256, 8, 5)) and tiling.hopeless(Tile(256, 256, 256, 4, 1))


def climb_of(case: dict[str, Any], first: Tile) -> tiling.Climb:
    problem = Case(1, 1, 1, 16, "float32")
    return tiling.Climb(case, {problem: []}, {problem: []}, first, first, {}, {first: {}})


def test_the_search_goes_on_from_what_is_faster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Step by step to the fastest; not by way of a candidate that fails, and no tile is tried twice."""
    first, bad = Tile(64, 64, 32, 8, 3), Tile(64, 64, 32, 8, 4)
    tried: list[Tile] = []

    def attempt(case: dict[str, Any], tile: Tile, machine: Machine) -> dict[str, Any]:
        tried.append(tile)
        if tile == bad:
            raise Failed("it hangs")
        return {"registers": 1, "spills": 0}

    def compared(climb: tiling.Climb, tile: Tile, machine: Machine) -> bool:
        better = tile.block_m * tile.block_n > climb.best.block_m * climb.best.block_n
        climb.best = tile if better else climb.best
        return better

    monkeypatch.setattr(tiling, "begun", lambda case, machine: climb_of(case, first))
    monkeypatch.setattr(tiling, "attempt", attempt)
    monkeypatch.setattr(tiling, "compared", compared)
    (climb,) = tiling.climbed([{"kernel": "k"}], Machine("cuda", 1, tmp_path), [Here()])
    assert (climb.best.block_m, climb.best.block_n) == (256, 256)
    assert len(tried) == len(set(tried)) and climb.candidates[bad] == {"out": "Failed: it hangs"}


@dataclass(frozen=True)
class Clocked(Machine):
    """On which a candidate takes so many times the best one's time."""

    over: float = 1.0
    asked: list[int] = field(default_factory=list)

    def recorded(self, runs: Any, pool: Any = None) -> Any:
        return list

    def replays(self, graphs: Any) -> dict[str, list[float]]:
        self.asked.append(self.rounds)
        return {"best": [1.0] * self.rounds, "candidate": [self.over] * self.rounds}


@pytest.mark.parametrize(
    ("over", "value", "faster", "rounds"),
    [
        (0.9, 1.0, True, [3, 11, 3, 11]),
        (0.996, 1.0, False, [3, 11, 3, 11]),
        (1.5, 1.0, False, [3]),
        (0.5, 2.0, False, []),
    ],
    ids=["faster", "within the noise", "clearly slower", "wrong"],
)
def test_a_candidate_is_timed_in_turn_with_the_best(
    over: float, value: float, faster: bool, rounds: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As long as it may win; and one that computes something else never is."""
    monkeypatch.setattr(tiling, "call_of", lambda case, problem: lambda layer: (torch.full((2,), value),))
    first, other = Tile(64, 64, 32, 8, 3), Tile(64, 64, 32, 8, 4)
    climb = climb_of({"kernel": "gemm"}, first)
    problems: list[Any] = [Case(n, 1, 1, 16, "float32") for n in (1, 2)]
    climb.sets = {each: [None] for each in problems}
    climb.want, climb.graphs = {each: [torch.ones(2)] for each in problems}, dict.fromkeys(problems, list)
    climb.candidates[other] = {}
    machine = Clocked("cuda", 11, tmp_path, over)
    assert tiling.compared(climb, other, machine) is faster and machine.asked == rounds
    assert climb.best == (other if faster else first)
    assert climb.over_first == pytest.approx(over**2 if faster else 1.0)
    assert ("out" in climb.candidates[other]) is (value != 1.0)


def tuned(kernel: str, rank: int, tile: list[int], source: str) -> dict[str, Any]:
    case = {"kernel": kernel, "direction": "forward", "plan": "p", "rank": rank, "source": source}
    return {"benchmark": "tile", "case": case, "tile": tile, "environment": 0}


def test_the_table_takes_what_is_of_the_kernels_as_they_are(tmp_path: Path) -> None:
    """From every share; a newer folder goes before an older one; nothing that is stale or foreign."""
    own, all_of_them = sources.fingerprint("gemm"), sources.fingerprint_of_all()
    about = {"device": "a", "commit": "c", "python": "3", "torch": "2", "triton": "3.6.0", "capability": "9.0"}
    environments = [about | {"kernels": all_of_them}]
    new, old = tmp_path / "new", tmp_path / "old"
    write(new / "a-tuning-1-of-2.json", {"environments": environments, "records": [tuned("gemm", 16, [1] * 5, own)]})
    stale = [tuned("gemm", 64, [2] * 5, "other"), tuned("gemm", 32, [3] * 5, own), tuned("gemm", 16, [9] * 5, own)]
    write(old / "a-tuning-2-of-2.json", {"environments": environments, "records": stale})
    case = {"K": 768, "N": 768, "M": 1024, "R": 16, "adapter": "bfloat16"}
    layer = {"benchmark": "layer", "case": case, "direction": "forward"}
    layer["microseconds"] = {"frozen": {"median": 1.0}, "triton:published": {"median": 2.0}}
    write(old / "a.json", {"environment": environments[0], "records": [layer, {"benchmark": "importance", "case": {}}]})
    write(old / "b.json", {"environment": about | {"capability": "8.0", "kernels": "before"}, "records": [layer]})
    write(old / "cpu.json", {"environment": {"torch": "2"}, "records": [{"benchmark": "layer", "case": {}}]})
    ((key, entry),) = tune.entries([new, old]).items()
    assert key == ("9.0", "3.6") and entry["evidence"] == ["a-tuning-1-of-2.json", "a-tuning-2-of-2.json", "a.json"]
    assert [(t["max_rank"], t["tile"]) for t in entry["tiles"]] == [(16, [1] * 5), (32, [3] * 5)]
    assert [p["plan"] for p in entry["plans"]] == ["published"]
    ((_, table),) = measured.read({"9.0": {"3.6": entry}}).items()
    assert table.stale == () and table.tile("gemm", "half", 32) == (3,) * 5


def test_valuable_kernels_come_first(tmp_path: Path) -> None:
    cases = tune.kernels(Machine("cpu", 1, tmp_path))
    assert [case["kernel"] for case in cases][:3] == ["gemm", "one_gemm", "dx"]
    assert all(case["source"] == sources.fingerprint(case["kernel"]) for case in cases)


def test_parts_that_there_are_not() -> None:
    command = [sys.executable, "-m", "benchmarks.tune", "--part", "3/2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "expected table or i/n with 1 <= i <= n, got '3/2'" in done.stderr
