"""Importance in a backward: launched before the optimizer's step, or fused into the last stage of each layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adalora_kernels import RankAllocator, SVDLinear, compute_orth_regu
from adalora_kernels.allocator.fused import FUSED
from benchmarks.gpu.checks import Check, judged, sync_is_an_error
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.withheld import ENGINE
from benchmarks.timing import Sample

LAUNCHED = "launched before the step"
SIZES, DRY_SIZES = ((72, 768, 4096), (24, 4096, 1024)), ((2, 32, 8),)  # layers, K and N of each, tokens
RANK = 16


@dataclass
class Chain:
    """So many layers one after the other, their allocator, and what a backward begins with.

    Attributes:
        fused: whether the backward takes importance.
        term: whether the orthogonality term joins in.
    """

    model: nn.Module
    allocator: RankAllocator
    x: Tensor
    g: Tensor
    fused: bool
    term: bool

    def backward(self) -> None:
        """Forward and backward, from no gradients."""
        self.model.zero_grad()
        self.x.grad = None
        roots: list[Tensor] = [self.model(self.x)]
        grads: list[Tensor | None] = [self.g]
        if self.term:
            roots.append(compute_orth_regu(self.model, 0.1, squared=True, accumulate=True))
            grads.append(None)
        torch.autograd.backward(roots, grads)

    def step(self) -> None:
        """With importance, as an attached optimizer's step asks for it."""
        self.backward()
        self.allocator.update(self.allocator.begin(0))

    def reached(self) -> list[Tensor]:
        """Averages, scores and gradients."""
        state = self.allocator.importance
        return [
            *state.current(),
            state.scores.clone(),
            *(p.grad for p in self.model.parameters() if p.grad is not None),
        ]


def chain(machine: Machine, layers: int, size: int, tokens: int, fused: bool, term: bool) -> Chain:
    """Frozen weights, x and g in bf16, adapters in fp32, Λ away from zero."""
    torch.manual_seed(0)
    model = nn.Sequential(*(SVDLinear(size, size, r=RANK, lora_alpha=RANK, backend="triton") for _ in range(layers)))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if name.endswith("lora_E"):
            nn.init.normal_(parameter)
        if "lora_" not in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    model.to(machine.device)
    allocator = RankAllocator(model, RANK, RANK // 2, 10, 10, 1, 0.85, 0.85, 100, variant="paper", backend="triton")
    allocator.fuse_backward(fused)
    x, g = (torch.randn(tokens, size, device=machine.device, dtype=torch.bfloat16) for _ in range(2))
    return Chain(model, allocator, x.requires_grad_(), g, fused, term)


def check(term: bool, machine: Machine) -> list[Check]:
    """The averages, scores and gradients of the launch, twice, without a wait; and a write that nobody tells of."""
    layers, size, tokens = (DRY_SIZES if machine.dry else ((3, 256, 300),))[0]
    with judged(f"importance fused into the backward{', orthogonality too' if term else ''}", ENGINE) as check:
        ways = [chain(machine, layers, size, tokens, fused, term) for fused in (False, True)]
        for way in ways:
            way.step()
            with sync_is_an_error(machine):
                way.step()
        assert ways[1].allocator.fused is not None and ways[1].allocator.fused.outcome == FUSED
        compared(*ways)
        for way in ways:
            way.backward()
            for p in way.model.parameters():
                if p.grad is not None:
                    p.grad.data.mul_(0.5)
            way.allocator.update(way.allocator.begin(0))
        assert ways[1].allocator.fused.outcome != FUSED, "a write to the gradients was not noticed"
        compared(*ways)
    return check


def compared(launched: Chain, fused: Chain) -> None:
    """Both have come to the same, to rounding."""
    for ours, theirs in zip(fused.reached(), launched.reached(), strict=True):
        largest = float(theirs.abs().max())
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * largest)


def measure(machine: Machine, layers: int, size: int, tokens: int) -> dict[str, Any]:
    """Forward and backward alone, and with importance either way; each with and without the orthogonality term.

    The term's gradients are a launch of their own but where they are fused too, which may then take less than nothing.
    """
    runs: dict[str, Callable[[], object]] = {}
    for term in (False, True):
        named = ", orthogonality" if term else ""
        ways = {fused: chain(machine, layers, size, tokens, fused, term) for fused in (False, True)}
        runs[f"backward alone{named}"] = machine.recorded([ways[False].backward])
        runs[LAUNCHED + named], runs[FUSED + named] = (machine.recorded([ways[f].step]) for f in (False, True))
    seconds = machine.replays(runs)
    times = {name: {q: 1e6 * v for q, v in vars(Sample.of(values)).items()} for name, values in seconds.items()}
    case = {"layers": layers, "K": size, "N": size, "M": tokens, "R": RANK, "adapter": "float32"}
    return {"benchmark": "importance in a backward", "case": case, "microseconds": times, "rounds": machine.rounds}


def sizes(machine: Machine) -> tuple[tuple[int, int, int], ...]:
    """Of a record each."""
    return DRY_SIZES if machine.dry else SIZES


def of_size(machine: Machine, size: tuple[int, int, int]) -> dict[str, Any]:
    """The record of one."""
    return measure(machine, *size)


__all__ = ["check", "measure", "of_size", "sizes"]
