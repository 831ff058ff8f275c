"""Random training programs, each run in several ways that must come to the same: what tests of one feature can't see.

A program is a model, a schedule and what happens at each step. The ways are who calls the allocator, where importance
is taken, who counts the steps, which optimizer steps, and whether the run was stopped and begun again from its states.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adalora_kernels import AdaLoraAdamW, RankAllocator, SVDLinear, compute_orth_regu

WIDTH = 6
CALLS = ("once", "twice", "sum", "checkpointed", "reentrant", "reentrant", "now and then")


class Event(NamedTuple):
    """One step: its micro-batches, whether one is thrown away before, and what befalls its gradients."""

    micro_batches: int = 1
    tokens: int = 3
    lost: bool = False
    skipped: bool = False
    overflow: bool = False
    without: int | None = None
    prolonged: int = 0
    compacted: bool = False


@dataclass(frozen=True)
class Program:
    """What to train, and how it goes; the layers are pairs of rank and a way to be called."""

    layers: list[tuple[int, str]]
    schedule: dict[str, Any]
    term: str
    cleared: bool
    scaled: bool
    events: list[Event]


@dataclass(frozen=True)
class Way:
    """One of the ways to run a program."""

    attached: bool = True
    fused: bool = False
    capturable: bool = False
    swept: bool = False
    stop: int | None = None


@st.composite
def programs(draw: st.DrawFn) -> Program:
    warmups = draw(st.integers(0, 3)), draw(st.integers(0, 4))
    schedule = {
        "lora_r": 5,
        "target_rank": draw(st.integers(0, 2)),
        "init_warmup": warmups[0],
        "final_warmup": warmups[1],
        "mask_interval": draw(st.integers(1, 3)),
        "beta1": 0.85,
        "beta2": draw(st.sampled_from((0.3, 0.85))),
        "total_step": sum(warmups) + draw(st.integers(1, 6)),
        "variant": draw(st.sampled_from(("original", "peft", "paper", "paper"))),
        "metric": draw(st.sampled_from(("ipt", "ipt", "mag"))),
        "reduction": draw(st.sampled_from(("mean", "sum"))),
    }
    scaled = draw(st.booleans())
    event = st.builds(
        Event,
        st.sampled_from((1, 1, 2, 3)),
        st.sampled_from((3, 8, 1)),
        st.sampled_from((False, False, False, True)),
        st.booleans(),
        st.sampled_from((False, scaled)),
        st.sampled_from((None, None, None, 0, 1, 2, 4)),
        st.sampled_from((0, 0, 0, 0, 2)),
        st.sampled_from((False, True)),
    )
    return Program(
        draw(st.lists(st.tuples(st.integers(2, 5), st.sampled_from(CALLS)), min_size=1, max_size=3)),
        schedule,
        draw(st.sampled_from(("none", "in the loss", "accumulated", "accumulated"))),
        draw(st.booleans()),
        scaled,
        draw(st.lists(event, min_size=schedule["total_step"] + 2, max_size=schedule["total_step"] + 2)),
    )


class Network(nn.Module):
    """Layers that are called once, more often, within a checkpoint, or not in each step; E starts away from 0."""

    def __init__(self, layers: list[tuple[int, str]]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(SVDLinear(WIDTH, WIDTH, r=r, lora_alpha=4, dtype=torch.float64) for r, _ in layers)
        self.calls = [call for _, call in layers]
        for layer in self.layers:
            for factor in (layer.lora_A, layer.lora_E, layer.lora_B):
                nn.init.normal_(factor, std=0.5)

    def forward(self, x: Tensor, skipped: bool) -> Tensor:
        for layer, call in zip(self.layers, self.calls, strict=True):
            if call in ("checkpointed", "reentrant"):
                x = checkpoint(layer, x, use_reentrant=call == "reentrant")
            elif call == "sum":
                x = layer(x) + layer(0.5 * x)
            elif not (call == "now and then" and skipped):
                x = layer(torch.tanh(layer(x)) if call == "twice" else x)
            x = torch.tanh(x)
        return x


class Run:
    """A program under way."""

    def __init__(self, program: Program, way: Way) -> None:
        self.program, self.way = program, way
        self.schedule, self.compacted, self.step = dict(program.schedule), False, 0
        self.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3, enabled=program.scaled)
        self._make()

    def _make(self) -> None:
        self.model = Network(self.program.layers)
        self.allocator = RankAllocator(self.model, **self.schedule, capturable=self.way.capturable)
        params = [p for p in self.model.parameters() if p.requires_grad]
        groups: list[Any] = [{"params": params[::2]}, {"params": params[1::2], "lr": 3e-2, "betas": (0.8, 0.9)}]
        self.optimizer: torch.optim.Optimizer
        if self.way.swept:
            self.optimizer = AdaLoraAdamW(groups, 1e-2, allocator=self.allocator, capturable=self.way.capturable)
        else:
            self.optimizer = torch.optim.AdamW(groups, lr=1e-2, fused=True)
            if self.way.attached:
                self.allocator.attach(self.optimizer)
        if self.way.fused:
            self.allocator.fuse_backward()

    def stop_and_begin_again(self) -> None:
        file = io.BytesIO()
        grads = [p.grad for p in self.model.parameters()]
        torch.save([owner.state_dict() for owner in (self.model, self.optimizer, self.allocator)], file)
        file.seek(0)
        states = torch.load(file, weights_only=True)
        self._make()
        if self.compacted:
            self.allocator.compact(self.optimizer, like=states[2])
        for owner, state in zip((self.model, self.optimizer, self.allocator), states, strict=True):
            owner.load_state_dict(state)
        for p, grad in zip(self.model.parameters(), grads, strict=True):
            p.grad = grad  # zeros, where those are kept

    def backward(self, number: int, event: Event) -> None:
        generator = torch.Generator().manual_seed(number)
        for i in range(event.micro_batches):
            x = torch.randn(event.tokens, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()
            loss = (self.model(x, event.skipped) - 0.5).square().mean() / event.micro_batches
            if i == 0 and self.program.term != "none":
                loss = loss + compute_orth_regu(self.model, 0.01, accumulate=self.program.term == "accumulated")
            self.scaler.scale(loss * (math.inf if event.overflow else 1.0)).backward()

    def advance(self, number: int, event: Event) -> list[Any]:
        """One step; what there is after it."""
        if number == self.way.stop:
            self.stop_and_begin_again()
        model, allocator = self.model, self.allocator
        if event.prolonged and not self.compacted:
            self.schedule["total_step"] += event.prolonged
            allocator.set_total_step(self.schedule["total_step"])
        for lost in (True, False) if event.lost else (False,):
            model.zero_grad(set_to_none=not self.program.cleared)
            self.backward(1000 * lost + number, event._replace(overflow=event.overflow and not lost))
        factors = [p for t in allocator.triplets for p in t.parameters if p.grad is not None]
        if event.without is not None and event.without + 1 < len(factors):
            factors[event.without].grad = None
        if factors:
            self._step()
        state = allocator.state_dict()
        if event.compacted and not self.compacted and state["settled"]:
            allocator.compact(self.optimizer)
            self.compacted, state = True, allocator.state_dict()
        assert all(t.isfinite().all() for t in (state["average"], state["uncertainty"], *model.parameters()))
        return [allocator.get_rank_pattern(), state["average"], state["uncertainty"], *model.parameters()]

    def _step(self) -> None:
        allocator, by_itself = self.allocator, self.way.attached or self.way.swept
        if not by_itself:
            self.scaler.unscale_(self.optimizer)
            if allocator.pre_step:
                allocator.update_importance(self.model, self.step)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        budget, _ = allocator.update_and_mask(self.model, self.step)
        state, plan = allocator.state_dict(), allocator.schedule.plan(self.step)
        assert state["global_step"] == self.step and state["next_step"] == self.step + 1
        assert int(budget) == plan.budget
        self.step += 1
        if not plan.update and (plan.rank or plan.reapply):  # no overflow keeps the final pattern from being made
            assert not state["updates"] or state["live"].sum() <= plan.budget
            singular_values = torch.cat([t.lora_E.view(-1) for t in allocator.triplets])
            assert not singular_values[~state["live"]].any()


def run(program: Program, way: Way) -> list[list[Any]]:
    under_way = Run(program, way)
    return [
        [value.clone() if isinstance(value, Tensor) else value for value in under_way.advance(number, event)]
        for number, event in enumerate(program.events)
    ]


def assert_equal(one: list[list[Any]], other: list[list[Any]], exact: bool) -> None:
    rtol, atol = (0.0, 0.0) if exact else (1e-7, 1e-10)
    for step, (mine, theirs) in enumerate(zip(one, other, strict=True)):
        assert mine[0] == theirs[0], f"pattern at step {step}"
        for a, b in zip(mine[1:], theirs[1:], strict=True):
            torch.testing.assert_close(a, b, rtol=rtol, atol=atol, msg=lambda m, at=step: f"step {at}: {m}")


@given(programs(), st.data())
@settings(deadline=None, max_examples=40, derandomize=True)
def test_every_way_comes_to_the_same(program: Program, data: st.DataObject) -> None:
    way = Way(fused=program.schedule["variant"] == "paper")
    usual = run(program, way)
    stop = data.draw(st.integers(1, len(program.events) - 1), "stop")
    assert_equal(run(program, replace(way, stop=stop)), usual, exact=True)
    # A term that meets the layers' gradients elsewhere rounds elsewhere, and so does a sweep.
    same = not way.fused or program.term != "accumulated"
    assert_equal(run(program, replace(way, attached=False, fused=False)), usual, exact=same)
    assert_equal(run(program, replace(way, swept=True)), usual, exact=False)
    if not program.scaled:
        assert_equal(run(program, replace(way, capturable=True)), usual, exact=same)
