"""A run that continues from a checkpoint equals the run that never stopped, bit for bit, at any step."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from adalora_kernels import RankAllocator
from tests.allocator.test_allocator import SETTINGS, adam, assert_unchanged, loss_of, network, snapshot

TOTAL, END = 60, 40
CASES: list[dict[str, Any]] = [{"variant": variant} for variant in ("original", "peft", "paper")]
CASES += [{"metric": "mag"}, {"variant": "paper", "reduction": "sum"}]


def advance(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step, torch.float32).backward()
        if step % 7 == 3:
            model[2].lora_B.grad = None  # its averages then go on from the other half of the pair
        optimizer.step()


def through_a_file(*owners: Any) -> list[dict[str, Any]]:
    file = io.BytesIO()
    torch.save([owner.state_dict() for owner in owners], file)
    file.seek(0)
    states: list[dict[str, Any]] = torch.load(file, weights_only=True)
    return states


def fresh(case: dict[str, Any], seed: int = 0) -> tuple[nn.Module, RankAllocator]:
    model = network(seed=seed)
    return model, RankAllocator(model, **(SETTINGS | {"final_warmup": TOTAL - END, "total_step": TOTAL} | case))


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case.values()))
@pytest.mark.parametrize("stop", (1, 23, END, END + 1, 55))
def test_continued_run_equals_the_run_that_never_stopped(case: dict[str, Any], stop: int) -> None:
    model, allocator = fresh(case)
    optimizer = adam(model)
    allocator.attach(optimizer)
    advance(model, optimizer, range(stop))
    states = through_a_file(model, optimizer, allocator)
    advance(model, optimizer, range(stop, TOTAL + 5))

    again, allocator_again = fresh(case, seed=9)
    optimizer_again = adam(again)
    allocator_again.attach(optimizer_again)
    for owner, state in zip((again, optimizer_again, allocator_again), states, strict=True):
        owner.load_state_dict(state)
    advance(again, optimizer_again, range(stop, TOTAL + 5))
    assert_unchanged(snapshot(model, allocator), again, allocator_again)
    assert allocator.global_step == allocator_again.global_step == TOTAL + 4


@pytest.mark.parametrize("variant", ("original", "peft", "paper"))
@pytest.mark.parametrize("optimizer_of", (adam, lambda m: torch.optim.SGD(m.parameters(), lr=1e-3, momentum=0.9)))
def test_continued_after_compaction(variant: str, optimizer_of: Callable[[nn.Module], torch.optim.Optimizer]) -> None:
    model, allocator = fresh({"variant": variant})
    optimizer = optimizer_of(model)
    allocator.attach(optimizer)
    advance(model, optimizer, range(END + 5))
    allocator.compact()
    advance(model, optimizer, range(END + 5, END + 10))
    states = through_a_file(model, optimizer, allocator)
    advance(model, optimizer, range(END + 10, TOTAL))

    again, allocator_again = fresh({"variant": variant}, seed=9)
    before = snapshot(again, allocator_again)
    with pytest.raises(ValueError, match=r"^state: expected that of layers compacted alike; .* compact\(like=state\)"):
        allocator_again.load_state_dict(states[2])
    assert_unchanged(before, again, allocator_again)
    optimizer_again = optimizer_of(again)
    allocator_again.attach(optimizer_again)
    assert allocator_again.compact(like=states[2]) == allocator.live_ranks()
    for owner, state in zip((again, optimizer_again, allocator_again), states, strict=True):
        owner.load_state_dict(state)
    advance(again, optimizer_again, range(END + 10, TOTAL))
    assert_unchanged(snapshot(model, allocator), again, allocator_again)
    assert allocator.get_rank_pattern() == allocator_again.get_rank_pattern()
