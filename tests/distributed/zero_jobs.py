"""What the ranks of a world run under DeepSpeed."""

from __future__ import annotations

import os
from typing import Any

import deepspeed
import deepspeed.comm.torch
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from torch import nn

from adalora_kernels import RankAllocator, compute_orth_regu
from tests.distributed import jobs
from tests.distributed.jobs import BATCH, Branches, share

SCHEDULE = jobs.SCHEDULE | {"init_warmup": 3, "final_warmup": 6, "total_step": 25}
deepspeed.comm.torch.build_shm_op = lambda: None  # would compile an all-reduce that only inference uses


def lockstep(stage: int, variant: str, clip: float = 0.0, micro: int = 1, **options: Any) -> dict[str, Any]:
    """ZeRO in lockstep: at every step a single process makes it from copies of what DeepSpeed says it has."""
    model, mirror = Branches(torch.float32), Branches(torch.float32)
    ours, oracle = (RankAllocator(m, **SCHEDULE, variant=variant) for m in (model, mirror))
    trained = [p for p in model.parameters() if p.requires_grad]
    config = {
        "train_micro_batch_size_per_gpu": BATCH // dist.get_world_size(),
        "gradient_accumulation_steps": micro,
        "gradient_clipping": clip,
        "zero_optimization": {"stage": stage, **options},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(trained, lr=5e-3), config=config)
    ours.attach(engine)
    copies = [p for t in oracle.triplets for p in t.parameters]
    optimizer = torch.optim.AdamW([p for p in mirror.parameters() if p.requires_grad], lr=5e-3)
    params = [p for t in ours.triplets for p in t.parameters]
    ties = rankings = 0
    for step in range(SCHEDULE["total_step"]):
        for i in range(micro):
            x, target = share(step * micro + i, torch.float32)
            loss = (engine(x) - target).square().mean()
            if i == 0:
                loss = loss + micro * compute_orth_regu(model, 0.1)
            engine.backward(loss)
            if i == micro - 1:
                for p, copy in zip(params, copies, strict=True):
                    copy.data, copy.grad = safe_get_full_fp32_param(p).clone(), safe_get_full_grad(p).clone()
            engine.step()
        if clip:
            nn.utils.clip_grad_norm_(mirror.parameters(), clip)
        if oracle.pre_step:
            oracle.update_importance(mirror, step)
        optimizer.step()
        _, threshold = oracle.update_and_mask(mirror, step)
        mine, theirs = ours.importance, oracle.importance
        torch.testing.assert_close(mine.current(), theirs.current(), rtol=1e-4, atol=1e-12)
        if threshold is not None:
            rankings += 1
            differs = mine.live != theirs.live
            near = (theirs.scores / threshold - 1).abs() < 1e-5
            assert not (differs & ~near).any(), f"step {step}"
            ties += int(differs.sum())
        same = torch.equal(mine.live, theirs.live)
        for p, copy, name in zip(params, copies, (n for t in ours.triplets for n in t.parameter_names), strict=True):
            master = safe_get_full_fp32_param(p)
            with deepspeed.zero.GatheredParameters([p], enabled=stage == 3):
                assert torch.equal(p.data, master), f"step {step}: {name} of the model is not the optimizer's"
            if same:
                torch.testing.assert_close(master, copy.data, rtol=1e-4, atol=1e-6)
                assert torch.equal(master == 0, copy == 0), f"step {step}: {name}"
    return {"rankings": rankings, "ties": ties, "live": int(ours.importance.live.sum())}


def in_turn(cases: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> list[dict[str, int]]:
    """``lockstep`` of several cases; DeepSpeed takes long to import."""
    return [lockstep(*args, **options) for args, options in cases]


def both_ways() -> list[torch.Tensor]:
    """``patterns_of`` the engine and of accelerate."""
    return [patterns_of(direct) for direct in (True, False)]


def patterns_of(direct: bool) -> torch.Tensor:
    """The pattern after each step, where accelerate's ``backward`` makes the step, or where the engine is called."""
    from accelerate import Accelerator, DeepSpeedPlugin

    model = Branches(torch.float32)
    allocator = RankAllocator(model, **SCHEDULE)
    optimizer: Any = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    config = {
        "train_micro_batch_size_per_gpu": BATCH // dist.get_world_size(),
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
    }
    if direct:
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        allocator.attach(engine)
        assert allocator.attach(engine.optimizer) is allocator.attach(engine)
    else:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", ACCELERATE_USE_DEEPSPEED="true")  # nobody connects
        accelerator = Accelerator(cpu=True, deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
        engine, optimizer = accelerator.prepare(model, optimizer)
        allocator.attach(optimizer)
    patterns = []
    for step in range(SCHEDULE["total_step"]):
        x, target = share(step, torch.float32)
        loss = (engine(x) - target).square().mean() + compute_orth_regu(model, 0.1)
        if direct:
            engine.backward(loss)
            engine.step()
        else:
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        patterns.append(allocator.importance.live.clone())
    return torch.stack(patterns)
