"""What importance adds to a backward: launched before the optimizer's step, or fused into each layer's backward.

Both are variant "paper" of the allocator on the same model, whose backward alone, without importance, is what they are
measured against. The forward is not timed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from adalora_kernels import RankAllocator, SVDLinear
from benchmarks.timing import Contestant, Sample, interleave

FUSED = "fused into the backward"  # as the allocator words it
WAYS = ("launched", "fused")


def build(layers: int, size: int, r: int) -> tuple[nn.Module, RankAllocator]:
    """A chain of layers of size × size at rank r with Λ away from zero, and its allocator."""
    torch.manual_seed(0)
    chain = [SVDLinear(size, size, r=r, lora_alpha=16) for _ in range(layers)]
    for layer in chain:
        nn.init.normal_(layer.lora_E)
    model = nn.Sequential(*chain)
    allocator = RankAllocator(
        model, lora_r=r, target_rank=r // 2, init_warmup=10, final_warmup=10, mask_interval=1, beta1=0.85, beta2=0.85,
        total_step=100, variant="paper",
    )  # fmt: skip
    return model, allocator


def take(allocator: RankAllocator) -> None:
    """Importance as an attached optimizer's step asks for it, which keeps what the backward has done of it."""
    if allocator.update(allocator.begin(0)) is None:
        raise AssertionError("the allocator took no gradients")
    if allocator.fused is not None and allocator.fused.outcome != FUSED:
        raise AssertionError(f"importance was to be {FUSED}, was {allocator.fused.outcome}")


def check_equal(allocator: RankAllocator, steps: dict[str, Contestant]) -> None:
    """From one state both ways must reach the same averages and scores, before any is timed."""
    state = allocator.importance
    kept = [t.clone() for t in (state.averages, state.half, state.scores)]
    reached: dict[str, list[Tensor]] = {}
    for way in WAYS:
        for now, before in zip((state.averages, state.half, state.scores), kept, strict=True):
            now.copy_(before)
        steps[way]()()
        reached[way] = [t.clone() for t in (*state.current(), state.scores)]
    for launched, fused in zip(*reached.values(), strict=True):
        if not torch.equal(launched, fused):
            raise AssertionError("launched and fused importance differ")


def measure(layers: int, size: int, m: int, r: int, threads: int, rounds: int) -> dict[str, Any]:
    """One case: so many layers of size × size at rank r, m tokens.

    Returns:
        A record: the case, the milliseconds of the backward alone and with importance either way, and what each way
        adds within a round.
    """
    torch.set_num_threads(threads)
    model, allocator = build(layers, size, r)
    x, g = torch.randn(m, size, requires_grad=True), torch.randn(m, size)

    def contestant(way: str) -> Contestant:
        def prepare() -> Callable[[], object]:
            allocator.fuse_backward(way == "fused")
            model.zero_grad()
            x.grad = None
            y = model(x)

            def run() -> None:
                y.backward(g)
                if way in WAYS:
                    take(allocator)

            return run

        return prepare

    steps = {way: contestant(way) for way in ("backward alone", *WAYS)}
    check_equal(allocator, steps)
    seconds = interleave(steps, rounds)
    alone = seconds["backward alone"]
    added = {way: [a - b for a, b in zip(seconds[way], alone, strict=True)] for way in WAYS}

    def milliseconds(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
        return {way: {q: 1e3 * v for q, v in vars(Sample.of(s)).items()} for way, s in times.items()}

    return {
        "benchmark": "importance in a backward",
        "case": {"layers": layers, "K": size, "N": size, "M": m, "R": r, "dtype": "float32", "threads": threads},
        "milliseconds": milliseconds(seconds),
        "added_to_backward": milliseconds(added),
        "rounds": rounds,
    }


__all__ = ["measure"]
