"""What the ranks of a world run with the Trainer."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from torch import Tensor

from tests.integrations.trainer_runs import END, STEPS, Run, assert_equal, run


def resumed(folder: Path) -> list[tuple[list[list[bool]], list[Tensor]]]:
    """``resumed_under_ddp``, and ``resumed_under_deepspeed`` where that is installed; imports take long."""
    found = [resumed_under_ddp(folder / "ddp")]
    if find_spec("deepspeed") is not None:
        AcceleratorState._reset_state(reset_partial_state=True)
        found.append(resumed_under_deepspeed(folder / "deepspeed"))
    return found


def resumed_under_ddp(folder: Path) -> tuple[list[list[bool]], list[Tensor]]:
    """Pattern and parameters in the end, which a run resumed on the way repeats."""
    whole = _run(folder, saves=(5,))
    dist.barrier()
    assert len(list(folder.glob("checkpoint-*/adalora_state.safetensors*"))) == 1
    assert_equal(_run(folder / "again", resume=folder / "checkpoint-5", seed=7), whole, 5)
    return list(whole.pattern.values()), whole.after[STEPS]


def resumed_under_deepspeed(folder: Path) -> tuple[list[list[bool]], list[Tensor]]:
    """As ``resumed_under_ddp``, with ZeRO-2."""
    import deepspeed.comm.torch

    deepspeed.comm.torch.build_shm_op = lambda: None  # would compile an all-reduce that only inference uses
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
    }
    whole = _run(folder, saves=(END + 1,), deepspeed=config)
    dist.barrier()
    assert whole.allocator.importance.updates == 0  # reset at T - t_f
    assert_equal(_run(folder, resume=folder / f"checkpoint-{END + 1}", seed=7, deepspeed=config), whole, END + 1)
    return list(whole.pattern.values()), whole.after[STEPS]


def _run(folder: Path, **options: Any) -> Run:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # nobody connects: the group is there already
    torch.manual_seed(0)
    return run(folder, **options)
