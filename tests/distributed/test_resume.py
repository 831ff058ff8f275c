"""A rank is killed in mid-run: the run resumed from its checkpoint is the run that nothing happened to, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed import jobs, worlds


@pytest.mark.parametrize(
    ("how", "variant", "kill_at"),
    (("ddp", "original", 27), ("fsdp", "paper", 27), ("fsdp", "peft", 45)),  # 45 is in the final phase
)
def test_killed_and_resumed(how: str, variant: str, kill_at: int, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    want = worlds.run(2, tmp_path / "1", jobs.resumable, how, variant, whole, None)
    lost = worlds.run(2, tmp_path / "2", jobs.resumable, how, variant, broken, kill_at)
    assert lost[1] is None
    got = worlds.run(2, tmp_path / "3", jobs.resumable, how, variant, broken, None)
    for mine, theirs in zip(got, want, strict=True):
        start = mine["start"]
        assert start == kill_at // 10 * 10
        assert torch.equal(mine["patterns"], theirs["patterns"][start:])
        assert all(map(torch.equal, mine["params"], theirs["params"]))
        for name in ("average", "uncertainty", "scores", "live"):
            assert torch.equal(mine["state"][name], theirs["state"][name]), name


def test_a_checkpoint_fits_any_number_of_ranks(tmp_path: Path) -> None:
    """Saved by two ranks, continued by four: what one process would have, up to rounding."""
    folder = tmp_path / "run"
    folder.mkdir()
    worlds.run(2, tmp_path / "1", jobs.resumable, "fsdp", "original", folder, 27)
    got = worlds.run(4, tmp_path / "2", jobs.resumable, "fsdp", "original", folder, None)
    want = jobs.train("plain", term_first=True)
    for rank in got:
        assert torch.equal(rank["patterns"], want["patterns"][20:])
        torch.testing.assert_close(rank["params"], want["params"], rtol=1e-9, atol=1e-13)
