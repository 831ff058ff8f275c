"""DistributedDataParallel: the same masks on every rank and as one process has, and the term's gradient after DDP's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import jobs, worlds

VARIANTS = ("original", "peft", "paper")
MODES: list[dict[str, Any]] = [
    {**mode, "gradient_as_bucket_view": views, "bucket_cap_mb": size}
    for views in (False, True)
    for size in (25, 0.0005)  # one bucket, or one for each matrix
    for mode in (
        {},
        {"static_graph": True},
        {"find_unused_parameters": True, "use": "left"},
        {"micro": 3},
        {"micro": 3, "term_at": 0},
        {"micro": 2, "static_graph": True},
        {"to_none": False},
    )
]


def assert_equal_runs(got: list[dict[str, Any]], want: dict[str, Any]) -> None:
    """Every rank has what one process has: masks at every step, and parameters and averages up to fp64's rounding."""
    for run in got:
        assert torch.equal(run["patterns"], want["patterns"])
        torch.testing.assert_close(run["params"], want["params"], rtol=1e-9, atol=1e-13)
        for name in ("average", "uncertainty", "scores"):
            torch.testing.assert_close(run["state"][name], want["state"][name], rtol=1e-9, atol=1e-15)
    pruned = want["patterns"].sum(1)
    assert pruned[0] == 21 and pruned[-1] == 8 and len(pruned.unique()) > 5


def test_the_terms_gradient_in_all_modes(tmp_path: Path) -> None:
    worlds.run(2, tmp_path / "world", jobs.ddp_gradients, MODES)


@pytest.mark.parametrize("variant", VARIANTS)
def test_free_running_equals_one_process(variant: str, tmp_path: Path) -> None:
    got = worlds.run(2, tmp_path / "world", jobs.train, "ddp", variant)
    assert_equal_runs(got, jobs.train("plain", variant))


@pytest.mark.parametrize("fuse", (False, True))
def test_accumulation_with_no_sync(fuse: bool, tmp_path: Path) -> None:
    """Four ranks; also where importance tries to run in the backward, before the reduction."""
    options = {"variant": "paper" if fuse else "original", "micro": 2, "fuse": fuse}
    got = worlds.run(4, tmp_path / "world", jobs.train_with, "ddp views", options)
    assert_equal_runs(got, jobs.train_with("plain", options))


@pytest.mark.parametrize("variant", VARIANTS)
def test_lockstep_with_one_process(variant: str, tmp_path: Path, record_property: Any) -> None:
    found = worlds.run(2, tmp_path / "world", jobs.lockstep, "ddp", variant)
    record_property("measured", jobs.LOCKSTEP.format(**found[0]))
    assert all(rank["live"] == 8 and rank["rankings"] > 10 for rank in found)


def test_peft_model(tmp_path: Path) -> None:
    want = jobs.train_peft("plain")
    for got in worlds.run(2, tmp_path / "world", jobs.train_peft, "ddp"):
        assert torch.equal(got["patterns"], want["patterns"]) and got["rank_pattern"] == want["rank_pattern"]
        torch.testing.assert_close(got["params"], want["params"], rtol=1e-9, atol=1e-13)
    assert want["patterns"][-1].sum() == 4


def test_ranks_that_disagree_are_told(tmp_path: Path) -> None:
    (message, apart), (other, _) = worlds.run(2, tmp_path / "checked", jobs.disagree, True)
    assert message == other
    assert message.startswith("masks: expected the same on every rank, but after step 9 ranks disagree about ")
    assert f"of {apart[0].removesuffix('.lora_E')}. " in message
    (message, apart), _ = worlds.run(2, tmp_path / "unchecked", jobs.disagree, False)
    assert message == "" and apart
