"""Whatever the schedule, the ranks, the gradients that are missing and the steps that overflow: the budget holds."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from adalora_kernels import RankAllocator, SVDLinear
from adalora_kernels.reference.importance import triplet_scores

WIDTH = 7
SIZES = st.integers(1, 6)
LAYERS = st.lists(st.tuples(st.integers(0, 6), SIZES, SIZES), min_size=1, max_size=4).filter(
    lambda layers: any(r for r, _, _ in layers)
)
OVERFLOWS = (torch.nan, torch.inf, -torch.inf, 3e38)


@st.composite
def schedules(draw: st.DrawFn) -> dict[str, Any]:
    warmups = draw(st.integers(0, 5)), draw(st.integers(0, 5))
    return {
        "lora_r": draw(st.integers(0, 6)),
        "target_rank": draw(st.integers(0, 7)),
        "init_warmup": warmups[0],
        "final_warmup": warmups[1],
        "mask_interval": draw(st.integers(1, 4)),
        "beta1": draw(st.floats(0.05, 0.95)),
        "beta2": draw(st.floats(0.05, 0.95)),
        "total_step": sum(warmups) + draw(st.integers(1, 12)),
        "variant": draw(st.sampled_from(("original", "peft", "paper"))),
        "metric": draw(st.sampled_from(("ipt", "ipt", "mag"))),
        "reduction": draw(st.sampled_from(("mean", "sum"))),
        "backend": draw(st.sampled_from(("reference", "native"))),
    }


@given(LAYERS, schedules(), st.sampled_from((torch.float32, torch.float64)), st.data())
@settings(deadline=None, max_examples=120, derandomize=True)
def test_the_budget_holds_whatever_comes(
    layers: list[tuple[int, int, int]], schedule: dict[str, Any], dtype: torch.dtype, data: st.DataObject
) -> None:
    torch.manual_seed(0)
    model = nn.ModuleList(SVDLinear(k, n, r=r, dtype=dtype) for r, k, n in layers)
    allocator = RankAllocator(model, **schedule)
    params = [p for t in allocator.triplets for p in t.parameters]
    optimizer = torch.optim.SGD(params, lr=0.1, fused=True)
    allocator.attach(optimizer)
    total = allocator.importance.layout.total_rank
    for step in range(schedule["total_step"] + 3):
        for p in params:
            p.grad = torch.randn_like(p)
        for i in data.draw(
            st.lists(st.integers(0, len(params) - 1), max_size=len(params)), "parameters without gradient"
        ):
            params[i].grad = None
        overflow = data.draw(st.sampled_from((None, None, None, *OVERFLOWS)), "overflow")
        present = [p.grad for p in params if p.grad is not None]
        if overflow is not None and present:
            data.draw(st.sampled_from(present), "where").view(-1)[-1] = overflow
        skipped = overflow is not None and bool(present)
        optimizer.found_inf, optimizer.grad_scale = torch.tensor(float(skipped)), None  # type: ignore[attr-defined]
        before, ended = state(allocator), step >= allocator.schedule.pruning_end
        values = [t.lora_E.detach().clone() for t in allocator.triplets]
        optimizer.step()

        budget, threshold = allocator.update_and_mask(model, step)
        assert 0 <= budget <= max(allocator.total_rank, allocator.target_rank)
        assert all(t.isfinite().all() for t in (*state(allocator), *params))
        live = allocator.importance.live
        if skipped and not ended:
            assert all(torch.equal(a, b) for a, b in zip(before, state(allocator), strict=True))
            assert all(torch.equal(a, t.lora_E) for a, t in zip(values, allocator.triplets, strict=True))
        elif threshold is not None:
            assert live.sum() <= budget
            average, uncertainty = allocator.importance.current()
            scores = triplet_scores(allocator.importance.layout, average, uncertainty, schedule["reduction"])
            if schedule["metric"] == "ipt" and average.any() and len(scores.unique()) == total:
                assert live.sum() == min(budget, total)
            for t, row in zip(allocator.triplets, allocator.importance.pattern(), strict=True):
                assert (t.lora_E[~torch.tensor(row)] == 0).all()
    assert sum(allocator.live_ranks().values()) == int(live.sum())


def state(allocator: RankAllocator) -> list[Tensor]:
    importance = allocator.importance
    return [*importance.current(), importance.scores.clone(), importance.live.clone()]


@given(LAYERS, schedules(), st.data())
@settings(deadline=None, max_examples=40, derandomize=True)
def test_whatever_remains_can_be_compacted(
    layers: list[tuple[int, int, int]], schedule: dict[str, Any], data: st.DataObject
) -> None:
    torch.manual_seed(0)
    model = nn.ModuleList(SVDLinear(k, n, r=r, dtype=torch.float64) for r, k, n in layers)
    allocator = RankAllocator(model, **schedule)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    allocator.attach(optimizer)

    def train(steps: range) -> list[Tensor]:
        for _ in steps:
            outputs = [layer(torch.randn(4, layer.in_features, dtype=torch.float64)) for layer in model]
            optimizer.zero_grad()
            torch.stack([y.square().sum() for y in outputs]).sum().backward()
            optimizer.step()
        torch.manual_seed(1)
        return [layer(torch.randn(4, layer.in_features, dtype=torch.float64)) for layer in model]

    before = train(range(allocator.schedule.pruning_end + 2))
    pattern = allocator.get_rank_pattern()
    ranks = allocator.compact()
    assert ranks == {name.removesuffix(".lora_E"): sum(row) for name, row in pattern.items()}
    for a, b in zip(before, train(range(0)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)
    if any(p.requires_grad and p.numel() for t in allocator.triplets for p in t.parameters):
        train(range(data.draw(st.integers(1, 4))))
    assert allocator.get_rank_pattern() == pattern
