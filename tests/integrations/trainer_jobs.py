"""What the ranks of a world run with the Trainer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.integrations.trainer_runs import END, STEPS, Run, assert_equal, run


def resumed(folder: Path) -> list[tuple[list[list[bool]], list[Tensor]]]:
    """Under DDP and FSDP2, and under ZeRO-2 and 3 where DeepSpeed is installed; imports take long."""
    found = [resumed_under_ddp(folder / "ddp")]
    for case in (("FULL_STATE_DICT", "TRANSFORMER_BASED_WRAP", 5), ("SHARDED_STATE_DICT", "NO_WRAP", END + 1)):
        AcceleratorState._reset_state(reset_partial_state=True)
        found.append(resumed_under_fsdp(folder / case[0], *case))
    for stage in (2, 3) if find_spec("deepspeed") is not None else ():
        AcceleratorState._reset_state(reset_partial_state=True)
        found.append(resumed_under_deepspeed(folder / f"zero_{stage}", stage))
    return found


def resumed_under_ddp(folder: Path) -> tuple[list[list[bool]], list[Tensor]]:
    """Pattern and parameters in the end, which a run resumed on the way repeats."""
    whole = _run(folder, saves=(5,))
    dist.barrier()
    assert len(list(folder.glob("checkpoint-*/adalora_state.safetensors*"))) == 1
    assert_equal(_run(folder / "again", resume=folder / "checkpoint-5", seed=7), whole, 5)
    return list(whole.pattern.values()), whole.after[STEPS]


@contextmanager
def _fsdp_where_accelerate_has_none() -> Iterator[None]:
    """On a CPU accelerate ignores that FSDP was asked for: it notes here what it notes on a GPU."""
    original = AcceleratorState.__init__

    def note(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = note
    try:
        yield
    finally:
        AcceleratorState.__init__ = original


def resumed_under_fsdp(folder: Path, kind: str, wrap: str, stop: int) -> tuple[list[list[bool]], list[Tensor]]:
    """As ``resumed_under_ddp``, with FSDP2, a checkpoint of this kind and units of this."""
    settings = {
        "state_dict_type": kind,
        "auto_wrap_policy": wrap,
        "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
    }
    with _fsdp_where_accelerate_has_none():
        whole = _run(folder, saves=(stop,), fsdp=True, fsdp_config=settings)
        dist.barrier()
        resume = folder / f"checkpoint-{stop}"
        assert_equal(_run(folder, resume=resume, seed=7, fsdp=True, fsdp_config=settings), whole, stop)
    sharded = [t for t in whole.after[STEPS] if isinstance(t, DTensor)]
    assert len(sharded) == 9  # A, E and B of three layers
    whole_tensors = [t.full_tensor() if isinstance(t, DTensor) else t for t in whole.after[STEPS]]
    return list(whole.pattern.values()), whole_tensors


def resumed_under_deepspeed(folder: Path, stage: int) -> tuple[list[list[bool]], list[Tensor]]:
    """As ``resumed_under_ddp``, with ZeRO."""
    import deepspeed.comm.torch

    deepspeed.comm.torch.build_shm_op = lambda: None  # would compile an all-reduce that only inference uses
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    whole = _run(folder, saves=(END + 1,), deepspeed=config)
    dist.barrier()
    assert whole.allocator.importance.updates == 0  # reset at T - t_f
    assert_equal(_run(folder, resume=folder / f"checkpoint-{END + 1}", seed=7, deepspeed=config), whole, END + 1)
    return list(whole.pattern.values()), whole.after[STEPS][-4:]  # the parameters are each rank's own


def _run(folder: Path, **options: Any) -> Run:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # nobody connects: the group is there already
    torch.manual_seed(0)
    return run(folder, **options)
