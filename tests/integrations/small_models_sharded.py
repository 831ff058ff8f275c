"""What a rank runs where PEFT's model is sharded: an error's text, or how many triplets live at the end."""

from __future__ import annotations

import os
import traceback
from typing import Any

import torch
from torch.distributed.fsdp import fully_shard

from adalora_kernels.integrations.peft import patch_model
from tests.integrations.small_models import adapter_parameters, batch, build, live_total

STEPS = 20


_PEFTS = os.path.join("peft", "tuners", "adalora")


def outcomes(kind: str) -> tuple[str | int, str | int]:
    """Of unpatched PEFT and of ours; ``kind`` is a function of this module."""
    return tuple(_outcome(kind, patched) for patched in (False, True))


def _outcome(kind: str, patched: bool) -> str | int:
    model = build("llama", layers=1)
    if patched:
        patch_model(model)
    try:
        globals()[kind](model, patched)
    except (AssertionError, RuntimeError, TypeError) as error:
        called = [frame.line for frame in traceback.extract_tb(error.__traceback__) if _PEFTS in frame.filename]
        return f"{type(error).__name__}: {error}, in {called[-1] if called else None}"
    return live_total(model)


def fsdp(model: Any, patched: bool) -> None:
    """FSDP2 with decoder layers as units."""
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(adapter_parameters(model).values(), lr=1e-2)
    for step in range(STEPS):
        model(**batch(model, seed=step)).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()


def zero_2(model: Any, patched: bool) -> None:
    _zero(model, patched, stage=2)


def zero_3(model: Any, patched: bool) -> None:
    _zero(model, patched, stage=3, stage3_param_persistence_threshold=0)


def _zero(model: Any, patched: bool, **options: Any) -> None:
    """DeepSpeed's engine; its step is over when PEFT's allocator can be called."""
    import deepspeed
    import deepspeed.comm.torch

    deepspeed.comm.torch.build_shm_op = lambda: None  # would compile an all-reduce that only inference uses
    optimizer = torch.optim.AdamW(adapter_parameters(model).values(), lr=1e-2)
    config = {
        "train_micro_batch_size_per_gpu": 3, "zero_optimization": options, "zero_allow_untested_optimizer": True,
    }  # fmt: skip
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    if patched:
        model.base_model.rank_allocator().attach(engine)
    for step in range(STEPS):
        engine.backward(engine(**batch(model, seed=step)).loss)
        engine.step()
        if not patched:
            model.base_model.update_and_allocate(step)


def in_turn(kinds: tuple[str, ...]) -> dict[str, tuple[str | int, str | int]]:
    """``outcomes`` of each."""
    return {kind: outcomes(kind) for kind in kinds}
