"""FSDP2: sharded parameters and gradients, held to what one process computes on the same global batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import jobs, worlds
from tests.distributed.test_ddp import VARIANTS, assert_equal_runs


@pytest.mark.parametrize(
    ("size", "how", "options"),
    (
        (2, "fsdp", {"variant": "original", "micro": 2, "term_first": True}),
        (2, "fsdp root", {"variant": "peft"}),
        (4, "fsdp", {"variant": "paper", "late": True}),  # layers of rank 3 leave a rank without any
        (4, "fsdp hybrid", {"settings": {"reduction": "sum"}}),
        (2, "fsdp columns", {"settings": {"metric": "mag"}, "late": True}),
    ),
)
def test_free_running_equals_one_process(size: int, how: str, options: dict[str, Any], tmp_path: Path) -> None:
    got = worlds.run(size, tmp_path / "world", jobs.train_with, how, options)
    assert_equal_runs(got, jobs.train_with("plain", options))


@pytest.mark.parametrize("variant", VARIANTS)
def test_lockstep_with_one_process(variant: str, tmp_path: Path, record_property: Any) -> None:
    found = worlds.run(2, tmp_path / "world", jobs.lockstep, "fsdp", variant)
    record_property("measured", jobs.LOCKSTEP.format(**found[0]))
    assert all(rank["live"] == 8 and rank["rankings"] > 10 for rank in found)


@pytest.mark.parametrize("how", ("fsdp", "fsdp root"))
def test_peft_model(how: str, tmp_path: Path) -> None:
    """PEFT's own orthogonality term raises here."""
    want = jobs.train_peft("plain")
    for got in worlds.run(2, tmp_path / "world", jobs.train_peft, how):
        assert torch.equal(got["patterns"], want["patterns"]) and got["rank_pattern"] == want["rank_pattern"]
        torch.testing.assert_close(got["params"], want["params"], rtol=1e-9, atol=1e-13)


def test_overflow_in_one_shard(tmp_path: Path) -> None:
    worlds.run(2, tmp_path / "world", jobs.overflow)


def test_one_sum_for_the_whole_model(tmp_path: Path) -> None:
    for counts in worlds.run(2, tmp_path / "world", jobs.collectives):
        assert counts == {"update": 1, "numbers": 21 + 1, "term": 1}


def test_what_is_refused(tmp_path: Path) -> None:
    worlds.run(2, tmp_path / "world", jobs.refusals)
