"""What must hold of a whole training step in a CUDA graph: the plain loop's losses, the budget, and no wait."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adalora_kernels import AdaLoraAdamW, RankAllocator, SVDLinear, compute_orth_regu
from adalora_kernels.allocator.graphed import CudaGraph, Recorder, record_step
from benchmarks.gpu.checks import Check, judged, sync_is_an_error
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.withheld import STEP
from benchmarks.step.rehearsal import Rehearsal


def training(
    machine: Machine, variant: str, swept: bool, capturable: bool
) -> tuple[nn.Module, torch.optim.Optimizer, RankAllocator]:
    """A model of two adapted layers, its optimizer, and its allocator; ``swept`` by AdaLoraAdamW, else by torch's."""
    torch.manual_seed(0)
    model = nn.Sequential(SVDLinear(64, 96, r=8), nn.Tanh(), SVDLinear(96, 64, r=8)).to(machine.device)
    allocator = RankAllocator(
        model, 8, 4, init_warmup=2, final_warmup=6, mask_interval=3, beta1=0.85, beta2=0.85, total_step=20,
        variant=variant, capturable=capturable,
    )  # fmt: skip
    params = [p for p in model.parameters() if p.requires_grad]
    if swept:
        return model, AdaLoraAdamW(params, lr=3e-3, allocator=allocator, capturable=capturable), allocator
    lr = torch.tensor(3e-3, device=machine.device) if capturable else 3e-3
    return model, torch.optim.AdamW(params, lr=lr, capturable=capturable), allocator


def batches(machine: Machine) -> list[dict[str, Tensor]]:
    """Those of 24 steps: the whole schedule of ``training``, and some more."""
    torch.manual_seed(1)
    given = torch.randn(24, 32, 64, device=machine.device)
    return [{"x": x, "target": torch.sin(2 * x)} for x in given]


def error_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """A loss."""
    return (model(batch["x"]) - batch["target"]).square().mean()


def plain_losses(machine: Machine, variant: str, swept: bool) -> list[float]:
    """Of an ordinary loop with an ordinary allocator."""
    model, optimizer, allocator = training(machine, variant, swept, capturable=False)
    if not swept:
        allocator.attach(optimizer)
    return [loop_step(model, optimizer, batch, variant).item() for batch in batches(machine)]


def loop_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor], variant: str) -> Tensor:
    """One step of an ordinary loop, and its loss."""
    optimizer.zero_grad()
    loss = error_of(model, batch) + compute_orth_regu(model, 0.1, squared=variant == "paper")
    loss.backward()
    optimizer.step()
    return loss.detach()


def check(variant: str, swept: bool, machine: Machine) -> list[Check]:
    """graphed_step: the losses of the plain loop to 1e-4, the budget kept, and no replay waits for the device."""
    recorder: Recorder = Rehearsal(may_wait=True) if machine.dry else CudaGraph()
    name = f"graphed_step, {'AdaLoraAdamW' if swept else 'AdamW'}, variant {variant}"
    if machine.dry and not swept:
        return [Check(name, "skipped", "torch has no capturable AdamW on a CPU")]
    with judged(name, STEP) as check:
        model, optimizer, allocator = training(machine, variant, swept, capturable=True)
        given = batches(machine)
        step = record_step(model, optimizer, allocator, given[0], error_of, 0.1, 3, recorder)
        machine.wait()
        with sync_is_an_error(machine):
            found = [step(batch).clone() for batch in given]
        want = plain_losses(machine, variant, swept)
        worst = max(abs(a.item() - b) / b for a, b in zip(found, want, strict=True))
        assert worst < 1e-4, f"losses differ by {worst:.1e} of the plain loop's"
        live = sum(allocator.live_ranks().values())
        assert allocator.global_step == len(given) - 1, f"counted to {allocator.global_step}"
        assert 0 < live <= 8, f"{live} triplets live, with a budget of 8"
    return check


def check_waits(swept: bool, machine: Machine) -> list[Check]:
    """A plain loop, forward to masking, over the whole schedule, with every call that waits for the device an error."""
    name = f"a training step, forward to masking, waits for nothing, {'AdaLoraAdamW' if swept else 'AdamW'}"
    if machine.dry:
        return [Check(name, "skipped", "the CPU has nothing to wait for")]
    with judged(name) as check:  # a step that waits is a slow one, and its time no less true
        model, optimizer, allocator = training(machine, "peft", swept, capturable=False)
        if not swept:
            allocator.attach(optimizer)
        given = batches(machine)
        for batch in given[:1]:  # which makes state
            loop_step(model, optimizer, batch, "peft")
        machine.wait()
        with sync_is_an_error(machine):
            for batch in given[1:]:
                loop_step(model, optimizer, batch, "peft")
        live = sum(allocator.live_ranks().values())
        assert 0 < live <= 8, f"{live} triplets live, with a budget of 8: nothing was masked"
    return check


__all__ = ["check", "check_waits"]
