"""The examples run, reach their budget, and continue exactly where they were interrupted."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("accelerate")


@pytest.mark.parametrize("name", ["trainer_loop", "accelerate_loop", "plain_loop"])
@pytest.mark.filterwarnings("ignore:Could not find a config file")
def test_example(name: str, tmp_path: Path) -> None:
    module = import_module(f"tests.examples.{name}")
    whole, resumed = module.train(str(tmp_path)), module.train(str(tmp_path), resume=True)
    for (parameter, a), (_, b) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(a, b), parameter
    ranks = resumed.base_model.rank_allocator().live_ranks()
    assert sum(ranks.values()) == 3 * len(ranks)
    assert (
        (tmp_path / "checkpoint-8" if name == "trainer_loop" else tmp_path)
        .joinpath("adalora_state.safetensors")
        .is_file()
    )
    assert len(Path(str(module.__file__)).read_text().splitlines()) < 60
