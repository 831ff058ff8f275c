"""Measured plans and tiles go before calculated ones, where they belong to the device, the compiler and the call."""

from __future__ import annotations

import copy
import json
from functools import partial
from typing import Any

import pytest
import torch

from adalora_kernels.backends.triton import configurations, measured, plans, sources
from adalora_kernels.backends.triton.measured import Point
from adalora_kernels.backends.triton.problem import Problem
from adalora_kernels.backends.triton.tiles import Family, Tile, Width

BF16, FP32 = torch.bfloat16, torch.float32
OWN, V, ALL = sources.fingerprint("one_pass"), sources.fingerprint("v"), sources.fingerprint_of_all()
POINT = {"M": 8192, "K": 4096, "N": 4096, "R": 16, "width": "half", "adapter_bytes": 4}
CONTENT: dict[str, Any] = {
    "9.0": {
        "3.6": {
            "evidence": ["some-device-sweep.json"],
            "tiles": [
                {"kernel": "one_pass", "width": "half", "max_rank": 16, "tile": [128, 64, 32, 4, 5], "source": OWN},
                {"kernel": "one_pass", "width": "half", "max_rank": 64, "tile": [64, 64, 32, 4, 5], "source": OWN},
            ],
            "plans": [{"direction": "forward", "point": POINT, "plan": "slow", "source": ALL}],
        }
    }
}


@pytest.fixture(autouse=True)
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``CONTENT`` is what the file holds, and the triton in use is the one that it was measured with."""
    monkeypatch.setattr(measured, "tables", lambda: measured.read(CONTENT))
    monkeypatch.setattr(measured, "version", lambda _: "3.6.0")
    kept = (measured.table, measured._tile, plans.choose)
    for function in kept:
        function.cache_clear()
    yield
    for function in kept:
        function.cache_clear()


def problem(**changes: Any) -> Problem:
    usual = Problem(8192, 4096, 4096, 16, BF16, BF16, FP32, BF16, False, False, True, Family.HOPPER, (9, 0))
    return usual._replace(**changes)


def tile_of(kernel: str, capability: tuple[int, int] | None, width: Width, r: int, dropout: bool = False) -> Tile:
    return configurations.tile_of(kernel, Family.HOPPER, capability, width, r, dropout)


def test_tiles() -> None:
    assert tile_of("one_pass", (9, 0), Width.HALF, 8) == Tile(128, 64, 32, 4, 5)
    assert tile_of("one_pass", (9, 0), Width.HALF, 33) == Tile(64, 64, 32, 4, 5)


@pytest.mark.parametrize(
    "other",
    [
        ("one_pass", (9, 0), Width.HALF, 65), ("v", (9, 0), Width.HALF, 8), ("one_pass", None, Width.HALF, 8),
        ("one_pass", (8, 0), Width.HALF, 8), ("one_pass", (9, 0), Width.MIXED, 8),
        ("one_pass", (9, 0), Width.HALF, 8, True),
    ],
    ids=str,
)  # fmt: skip
def test_the_table_holds_where_nothing_was_measured(other: Any) -> None:
    """For another rank, kernel, device or width; and with dropout, which takes registers of its own."""
    kernel, _, *rest = other
    assert tile_of(*other) == configurations.lookup(kernel, Family.HOPPER, *rest)


def test_small_products_are_left_to_the_table() -> None:
    """A tile that was fastest where every multiprocessor had one, would leave most of them idle."""
    of = partial(configurations.tile_of, "one_pass", Family.HOPPER, (9, 0), Width.HALF, 16, programs=132)
    assert of(m=8192, n=4096) == Tile(128, 64, 32, 4, 5)
    assert of(m=1024, n=768) == configurations.lookup("one_pass", Family.HOPPER, Width.HALF, 16, False, 1024, 768, 132)
    with measured.trial("one_pass", (16, 16, 16, 4, 1)):
        assert of(m=16, n=16) == Tile(16, 16, 16, 4, 1)


def test_configurations_name_what_was_measured() -> None:
    found = [c for c in configurations.configurations() if c.capability is not None]
    assert [(c.family, c.width, c.max_rank, c.dropout) for c in found] == [
        (Family.HOPPER, Width.HALF, rank, False) for rank in (16, 64)
    ]
    assert {(c.kernel, c.capability, c.triton) for c in found} == {("one_pass", (9, 0), "3.6")}


def test_what_was_measured_with_other_kernels_is_left_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    """And explain says so; a tile of another kernel stays."""
    content = copy.deepcopy(CONTENT)
    entry = content["9.0"]["3.6"]
    entry["tiles"][0]["source"] = entry["plans"][0]["source"] = "0" * 12
    entry["tiles"].append({"kernel": "v", "width": "half", "max_rank": 16, "tile": [16, 16, 0, 4, 1], "source": V})
    monkeypatch.setattr(measured, "tables", lambda: measured.read(content))
    assert tile_of("one_pass", (9, 0), Width.HALF, 16) == Tile(64, 64, 32, 4, 5)  # the next higher rank's
    assert tile_of("v", (9, 0), Width.HALF, 16) == Tile(16, 16, 0, 4, 1)
    assert plan("forward") is None
    reason = plans.choose(problem()).reason
    assert "calculated, not measured (measured with other kernels, and left aside: forward plans, one_pass;" in reason


def test_launchers_and_explain_take_them() -> None:
    half = torch.empty(1, dtype=BF16)
    usual = configurations.choose("v", Width.HALF, 16, half)
    with measured.trial("v", (16, 16, 0, 4, 1)):
        assert configurations.choose("v", Width.HALF, 16, half) == Tile(16, 16, 0, 4, 1)
    assert configurations.choose("v", Width.HALF, 16, half) == usual
    choice = plans.Choice("one_pass", next(iter(plans.BACKWARD)), "")
    assert "one_pass 128×64×32, 4 warps, 5 stages" in plans.configuration(problem(), choice)


def test_another_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "version", lambda _: "3.7.1")
    assert measured.table((9, 0)) is None


def plan(direction: str, able: tuple[str, ...] = ("slow", "fast"), **changes: Any) -> tuple[str, str] | None:
    return plans._measured(direction, problem(**changes), able)


def test_the_plan_that_was_fastest_nearby() -> None:
    found = plan("forward")
    assert found is not None and found[0] == "slow"
    assert found[1] == "slow, measured fastest at M=8192, K=4096, N=4096, R=16 (some-device-sweep.json)"
    assert plan("forward", tokens=4096, rank=32) is not None
    assert plan("forward", need_x=False) is not None


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens": 1024}, {"rank": 128}, {"in_features": 768}, {"adapter_dtype": BF16}, {"compute_dtype": FP32},
        {"dropout": True}, {"weight_dtype": None}, {"capability": (10, 0)}, {"x_dtype": FP32}, {"tokens": 0},
    ],
    ids=str,
)  # fmt: skip
def test_nothing_like_it_was_measured(changes: dict[str, Any]) -> None:
    assert plan("forward", **changes) is None


def test_what_cannot_run_is_not_chosen() -> None:
    assert plan("forward", able=("fast",)) is None
    assert plan("backward") is None


def test_distance_is_in_factors_of_two() -> None:
    table = measured.read(CONTENT)["9.0", "3.6"]
    near, far = Point(8192 * 2, 4096 * 2, 4096, 16, "half", 4), Point(8192 * 2, 4096 * 2, 4096 * 2, 16, "half", 4)
    assert table.plan("forward", near, ("slow",)) == ("slow", Point(**POINT))
    assert table.plan("forward", far, ("slow",)) is None


def test_versions() -> None:
    assert measured.minor_version("3.6.0") == "3.6" and measured.minor_version("3.10.1+git1") == "3.10"
    assert list(measured.read(CONTENT)) == [("9.0", "3.6")]


def test_committed_table_names_plans_and_kernels_that_exist() -> None:
    """And nothing is in it that no record in benchmarks/results gives evidence of."""
    names = {"forward": plans.FORWARD, "backward": plans.BACKWARD}
    results = measured.PATH.parents[3] / "benchmarks" / "results"
    committed = measured.read(json.loads(measured.PATH.read_text())) if measured.PATH.exists() else {}
    for table in committed.values():
        assert table.evidence and all((results / name).exists() for name in table.evidence)
        assert all(name in names[direction] for (direction, _), name in table.plans.items())
    kernels = {c.kernel for c in configurations.configurations() if c.capability is None}
    for table in committed.values():
        assert all(
            kernel in kernels and len(by_rank) <= configurations.MOST for (kernel, _), by_rank in table.tiles.items()
        )
