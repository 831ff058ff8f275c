"""A checkpoint of a run whose parameters were sharded, taken up by one process: PEFT's file has the live rows."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from adalora_kernels.integrations.checkpoint import STATE_FILE
from tests.integrations.small_models import adapter_parameters
from tests.integrations.test_resume_files import STOP, adamw, advance, assert_same, everything, fresh, rewrite, save


def _without_factors(tensors: dict[str, torch.Tensor], content: dict[str, Any]) -> None:
    """As FSDP2 and ZeRO leave it."""
    for name in [name for name in tensors if "lora_" in name]:
        del tensors[name]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = fresh()
    optimizer = adamw(model)
    advance(model, optimizer, range(STOP))
    save(model, optimizer, tmp_path)
    return tmp_path


def test_live_rows_are_taken_up(checkpoint: Path) -> None:
    model, whole = fresh(seed=5), fresh(seed=5)
    whole.load_adapter(checkpoint, "default", is_trainable=True)
    rewrite(checkpoint / STATE_FILE, _without_factors)
    with pytest.warns(UserWarning, match="of sharded parameters, .* masked rows start without what they had learnt"):
        model.load_adapter(checkpoint, "default", is_trainable=True)
    found = everything(model)
    assert_same(found, everything(whole), but=tuple(name for name in found if "lora_" in name))
    ours, theirs = (m.base_model.rank_allocator() for m in (model, whole))
    assert not theirs.importance.live.all()
    offsets = ours.importance.layout.rank_offsets
    for mine, other, (start, end) in zip(ours.triplets, theirs.triplets, pairwise(offsets), strict=True):
        live = theirs.importance.live[start:end]
        for a, b, axis in zip(mine.parameters, other.parameters, (0, 0, 1), strict=True):
            rows = live.nonzero().flatten()
            assert torch.equal(a.index_select(axis, rows), b.index_select(axis, rows))
        assert not mine.lora_E[~live].any()


def test_files_of_two_steps_are_refused(checkpoint: Path) -> None:
    rewrite(checkpoint / STATE_FILE, _without_factors)
    later = fresh()
    advance(later, adamw(later), range(STOP + 4))
    later.save_pretrained(checkpoint)
    model = fresh(seed=5)
    before = everything(model)
    with pytest.raises(ValueError, match="of one and the same step, but they differ in which rows live"):
        model.load_adapter(checkpoint, "default", is_trainable=True)
    assert_same(everything(model), before)


def test_a_model_that_an_engine_holds(checkpoint: Path) -> None:
    """What is put into its parameters there, the engine's next step overwrites."""
    model = fresh(seed=5)
    before = everything(model)
    next(iter(adapter_parameters(model).values()))._hp_mapping = None  # as DeepSpeed leaves it
    with pytest.raises(ValueError, match="sharded or an engine's copy; call load_adapter before"):
        model.load_adapter(checkpoint, "default", is_trainable=True)
    assert_same(everything(model), before)
