"""What the ranks of a world run, and the one process that they are held to."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # DistributedDataParallel and fully_shard import it, which takes seconds
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from adalora_kernels import AdaLoraAdamW, RankAllocator, SVDLinear, compute_orth_regu
from adalora_kernels.allocator import find_triplets

FP64 = torch.float64
BATCH = 16
LOCKSTEP = "{rankings} rankings, {ties} triplets differ, each within 1e-5 of its threshold"


class Branches(nn.Module):
    """Two branches over a trunk, of which a step may use one; layers of several ranks."""

    def __init__(self, dtype: torch.dtype = FP64) -> None:
        super().__init__()
        torch.manual_seed(0)
        make = lambda k, n, r: SVDLinear(k, n, r=r, lora_alpha=8, dtype=dtype)  # noqa: E731
        self.trunk = nn.Sequential(make(12, 18, 6), nn.Tanh(), make(18, 15, 5), nn.Tanh())
        self.left, self.right = make(15, 10, 7), make(15, 10, 3)
        for i, layer in enumerate(m for m in self.modules() if isinstance(m, SVDLinear)):
            nn.init.constant_(layer.lora_E, 0.1 + 0.05 * i)

    def forward(self, x: Tensor, use: str = "both") -> Tensor:
        hidden = self.trunk(x)
        outputs = [getattr(self, name)(hidden) for name in ("left", "right") if use in (name, "both")]
        return sum(outputs[1:], outputs[0])


def data(step: int, dtype: torch.dtype = FP64) -> tuple[Tensor, Tensor]:
    """The global batch of a step."""
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(BATCH, 12, generator=generator, dtype=FP64)
    return x.to(dtype), torch.sin(2 * x[:, :10]).to(dtype)


def share(step: int, dtype: torch.dtype = FP64) -> tuple[Tensor, Tensor]:
    """This rank's part of it."""
    x, target = data(step, dtype)
    rank, size = dist.get_rank(), dist.get_world_size()
    return x[rank::size], target[rank::size]


def adapter_grads(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for t in find_triplets(model) for p in t.parameters if p.grad is not None]


SCHEDULE: dict[str, Any] = {"lora_r": 6, "target_rank": 2, "init_warmup": 5, "final_warmup": 12, "mask_interval": 3,
                            "beta1": 0.85, "beta2": 0.85, "total_step": 50}  # fmt: skip


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def adapters(model: nn.Module) -> list[Tensor]:
    return [whole(p) for t in find_triplets(model) for p in t.parameters]


def wrapped(model: Branches, how: str) -> tuple[nn.Module, nn.Module]:
    """The model as it is called, and as it holds the adapters."""
    if how == "plain":
        return model, model
    if how.startswith("ddp"):
        return DistributedDataParallel(model, gradient_as_bucket_view=how == "ddp views"), model
    options: dict[str, Any] = {}
    if how == "fsdp hybrid":
        options["mesh"] = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    if how == "fsdp columns":  # of A; rows of the others
        options["shard_placement_fn"] = lambda p: Shard(1) if p.dim() == 2 and p.shape[1] in (12, 18) else None
    if how != "fsdp root":
        for layer in (m for m in model.modules() if isinstance(m, SVDLinear) and m is not model.right):
            fully_shard(layer, **options)
    return fully_shard(model, **options), model


def set_sync(model: nn.Module, sync: bool) -> None:
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = sync  # what no_sync() sets
    elif hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(sync)


def train(
    how: str, variant: str = "original", micro: int = 1, term_first: bool = False, late: bool = False,
    settings: dict[str, Any] | None = None, steps: int = 50, fuse: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """A run in fp64: the pattern after each step, and what is there at the end."""
    rows = share if dist.is_initialized() and how != "plain" else data
    model = Branches()
    options = SCHEDULE | {"variant": variant} | (settings or {})
    early = None if late else RankAllocator(model, **options)
    called, held = wrapped(model, how)
    allocator = early or RankAllocator(held, **options)
    if fuse:
        allocator.fuse_backward()
    optimizer = torch.optim.AdamW([p for p in held.parameters() if p.requires_grad], lr=5e-3)
    allocator.attach(optimizer)
    patterns = []
    for step in range(steps):
        for i in range(micro):
            set_sync(called, i == micro - 1)
            x, target = rows(step * micro + i)
            term = compute_orth_regu(held, 0.1, squared=variant == "paper") if term_first and i == 0 else 0.0
            loss = (called(x) - target).square().mean() / micro + term
            if not term_first and i == micro - 1:
                loss = loss + compute_orth_regu(held, 0.1, squared=variant == "paper", accumulate=fuse)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        patterns.append(allocator.importance.live.clone())
    return {"patterns": torch.stack(patterns), "params": adapters(held), "state": allocator.state_dict()}


def train_with(how: str, options: dict[str, Any]) -> dict[str, Any]:
    """``train``, with the options that mean something to one process as well."""
    if how == "plain":
        options = {name: value for name, value in options.items() if name not in ("term_first", "late")}
    return train(how, **options)


def ddp_gradients(modes: list[dict[str, Any]], steps: int = 4) -> None:
    """The orthogonality term's gradient, added when the backward has ended, comes after DDP's reduction."""
    for mode in modes:
        options = {key: value for key, value in mode.items() if key not in ("micro", "use", "term_at", "to_none")}
        use, micro = mode.get("use", "both"), mode.get("micro", 1)
        found = []
        for accumulate in (False, True):
            model = Branches()
            wrapped = DistributedDataParallel(model, **options)
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
            grads = []
            for step in range(steps):
                for i in range(micro):
                    x, target = share(step * micro + i)
                    # What no_sync() sets. A static graph is looked at in the first backward, which must not be in it.
                    first = step == 0 and "static_graph" in mode
                    wrapped.require_backward_grad_sync = first or i == micro - 1
                    loss = (wrapped(x, use) - target).square().mean() / micro
                    if i == mode.get("term_at", micro - 1):
                        loss = loss + compute_orth_regu(model.trunk, 0.5, accumulate=accumulate)
                    loss.backward()
                grads.append(adapter_grads(model))
                optimizer.step()
                optimizer.zero_grad(set_to_none=mode.get("to_none", True))
            found.append(grads)
        for want, got in zip(*found, strict=True):
            assert want
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-15)


class Regression(nn.Module):
    """A model that computes its loss, for PEFT to adapt."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(12, 18, dtype=FP64), nn.Linear(18, 10, dtype=FP64)

    def forward(self, x: Tensor, target: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.second(torch.tanh(self.first(x))) - target).square().mean()}


def train_peft(how: str, steps: int = 40) -> dict[str, Any]:
    """A patched PEFT model, whose orthogonality term is in its own loss."""
    from peft import AdaLoraConfig, get_peft_model

    from adalora_kernels.integrations import peft as integration

    config = AdaLoraConfig(
        target_modules=["first", "second"], init_r=6, target_r=2, tinit=5, tfinal=15, deltaT=3, total_step=steps
    )
    model = get_peft_model(Regression(), config).double()
    integration.patch_model(model)
    torch.manual_seed(1)
    for t in find_triplets(model):
        nn.init.normal_(t.lora_A, std=0.2)
        nn.init.normal_(t.lora_B, std=0.2)
    called: nn.Module = model
    if how == "ddp":
        called = DistributedDataParallel(model)
    elif how != "plain":
        if how == "fsdp":
            fully_shard(model.base_model.model.first)
        called = fully_shard(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    patterns = []
    for step in range(steps):
        x, target = data(step) if how == "plain" else share(step)
        called(x, target)["loss"].backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        patterns.append(model.base_model.rank_allocator().importance.live.clone())
    return {"patterns": torch.stack(patterns), "params": adapters(model), "rank_pattern": config.rank_pattern}


def lockstep(how: str, variant: str, steps: int = 50) -> dict[str, int]:
    """A run in fp32; at every step an allocator of one process gets copies of its whole parameters and gradients."""
    fp32 = torch.float32
    model, mirror = Branches(fp32), Branches(fp32)
    called, held = wrapped(model, how)
    ours, oracle = (RankAllocator(m, **SCHEDULE, variant=variant) for m in (held, mirror))
    optimizer = torch.optim.AdamW([p for p in held.parameters() if p.requires_grad], lr=5e-3)
    copies = [p for t in oracle.triplets for p in t.parameters]
    ties = rankings = 0

    def copy() -> None:
        for p, theta in zip(copies, (p for t in ours.triplets for p in t.parameters), strict=True):
            p.data, p.grad = whole(theta), None if theta.grad is None else whole(theta.grad)

    for step in range(steps):
        x, target = share(step, fp32)
        ((called(x) - target).square().mean() + compute_orth_regu(held, 0.1)).backward()
        if ours.pre_step:
            copy()
            oracle.update_importance(mirror, step)
            ours.update_importance(held, step)
        optimizer.step()
        copy()
        _, threshold = oracle.update_and_mask(mirror, step)
        ours.update_and_mask(held, step)
        mine, theirs = ours.importance, oracle.importance
        torch.testing.assert_close(mine.current(), theirs.current(), rtol=1e-6, atol=1e-30)
        torch.testing.assert_close(mine.scores, theirs.scores, rtol=2e-6, atol=1e-30)
        if threshold is not None:
            rankings += 1
            differs = mine.live != theirs.live
            near = (theirs.scores / threshold - 1).abs() < 1e-5
            assert not (differs & ~near).any(), f"step {step}"
            ties += int(differs.sum())
        if torch.equal(mine.live, theirs.live):
            assert all(map(torch.equal, adapters(held), copies)), f"step {step}: E"
        optimizer.zero_grad()
    return {"rankings": rankings, "ties": ties, "live": int(ours.importance.live.sum())}


def disagree(check: bool) -> tuple[str, list[str]]:
    """Rank 1 looks away at one step: what is said about that, and which layers' masks have come apart."""
    model = Branches()
    called = DistributedDataParallel(model)
    allocator = RankAllocator(model, **SCHEDULE)
    allocator.check_ranks = check
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    allocator.attach(optimizer)
    message = ""
    for step in range(30):
        x, target = share(step)
        (called(x) - target).square().mean().backward()
        if step == 8 and dist.get_rank() == 1:
            model.left.lora_A.grad *= 1e4
        try:
            optimizer.step()
        except RuntimeError as error:
            message = str(error)
            break
        optimizer.zero_grad()
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, allocator.get_rank_pattern())
    return message, [name for name in ranks[0] if ranks[0][name] != ranks[1][name]]


def overflow() -> None:
    """A gradient that overflows in the shard of one rank leaves the averages and masks of all alone."""
    model = Branches()
    allocator = RankAllocator(model, **SCHEDULE)
    called, _ = wrapped(model, "fsdp")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(12):
        x, target = share(step)
        (called(x) - target).square().mean().backward()
        optimizer.step()
        if step == 9:
            before = allocator.state_dict()
            grad = model.right.lora_B.grad
            if dist.get_rank() == 1:
                grad.to_local()[-1, -1] = torch.inf
        allocator.update_and_mask(model, step)
        if step == 9:
            after = allocator.state_dict()
            for name in ("average", "uncertainty", "scores", "live"):
                assert torch.equal(before[name], after[name]), name
            assert not torch.equal(before["scores"], torch.zeros_like(before["scores"]))
        optimizer.zero_grad()
    assert torch.isfinite(allocator.state_dict()["average"]).all()
    assert not torch.equal(allocator.state_dict()["average"], after["average"])


def collectives() -> dict[str, int]:
    """How many all-reduces a step's importance, masks and orthogonality take, of how many numbers at most."""
    model = Branches()
    called, _ = wrapped(model, "fsdp")
    allocator = RankAllocator(model, **SCHEDULE)
    sizes: list[int] = []
    all_reduce = dist.all_reduce

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    x, target = share(0)
    (called(x) - target).square().mean().backward()
    dist.all_reduce = counted
    try:
        allocator.update_and_mask(model, 1)
        update = list(sizes)
        model.zero_grad()
        compute_orth_regu(model).backward()
        term = sizes[len(update) :]
    finally:
        dist.all_reduce = all_reduce
    return {"update": len(update), "numbers": sum(update), "term": len(term)}


def refusals() -> None:
    """What can't be done with sharded parameters says so."""
    model = Branches()
    allocator = RankAllocator(model, **SCHEDULE)
    called, _ = wrapped(model, "fsdp root")
    params = [p for p in model.parameters() if p.requires_grad]
    with pytest.raises(ValueError, match=r"^params: expected whole parameters, got DTensors"):
        AdaLoraAdamW(params, allocator=RankAllocator(model, **SCHEDULE))
    called.set_reshard_after_backward(False)
    x, target = share(0)
    (called(x) - target).square().mean().backward()
    with pytest.raises(ValueError, match=r"^accumulate: expected False under fully_shard"):
        compute_orth_regu(model, accumulate=True)
    with pytest.raises(ValueError, match=r"^model: expected compact\(\) before|^step: expected the final phase"):
        allocator.compact()
    sharded = RankAllocator(Branches(), **SCHEDULE)
    sharded.model, sharded.triplets = model, allocator.triplets
    called.reshard()
    sharded.begin(0)
    called.unshard()
    with pytest.raises(ValueError, match=r"^model: expected its sharded parameters, found gathered ones"):
        sharded.begin(1)


def resumable(how: str, variant: str, folder: Path, kill_at: int | None) -> dict[str, Any]:
    """A run that starts from the checkpoint in ``folder``, writes one every 10 steps, and may lose a rank."""
    torch.manual_seed(0)
    model = Branches()
    allocator = RankAllocator(model, **SCHEDULE, variant=variant)
    called, held = wrapped(model, how)
    optimizer = torch.optim.AdamW([p for p in held.parameters() if p.requires_grad], lr=5e-3)
    allocator.attach(optimizer)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    path, start = folder / "checkpoint.pt", 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        start = saved["step"]
        set_state_dict(
            held, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"], options=options
        )
        allocator.load_state_dict(saved["allocator"])
    patterns = []
    for step in range(start, SCHEDULE["total_step"]):
        x, target = share(step)
        ((called(x) - target).square().mean() + compute_orth_regu(held, 0.1)).backward()
        if step == kill_at and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.step()
        optimizer.zero_grad()
        patterns.append(allocator.importance.live.clone())
        if step % 10 == 9:
            of_model, of_optimizer = get_state_dict(held, optimizer, options=options)
            saved = {"step": step + 1, "model": of_model, "optimizer": of_optimizer}
            saved["allocator"] = allocator.state_dict()
            if dist.get_rank() == 0:
                torch.save(saved, path.with_suffix(".new"))
                path.with_suffix(".new").rename(path)
    state = allocator.state_dict()
    return {"start": start, "patterns": torch.stack(patterns), "params": adapters(held), "state": state}
