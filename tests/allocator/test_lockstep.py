"""500 steps of three models in lockstep with the original's algorithm and PEFT's, in every variant that they have.

One training each, driven by an attached allocator; at every step the oracle gets copies of the same parameters and
gradients. Two free-running trainings can't be compared in fp32: one rounding moves a tie, and then everything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")

from adalora_kernels import RankAllocator
from adalora_kernels.reference.importance import magnitude_scores, triplet_scores
from adalora_kernels.testing.original import OriginalAllocator
from adalora_kernels.testing.tolerances import assert_within_budget
from tests.integrations.small_models import adapter_parameters, batch, build, twins

STEPS, START, END, INTERVAL, BETA = 500, 30, 400, 5, 0.85
SETTINGS: dict[str, Any] = {"init_r": 6, "target_r": 2, "tinit": START, "tfinal": STEPS - END, "deltaT": INTERVAL,
                            "total_step": STEPS, "layers": 1}  # fmt: skip
Factors = list[Tensor]
"""A, E, B of each layer in turn."""


def factors(allocator: RankAllocator) -> Factors:
    return [p.detach().clone() for t in allocator.triplets for p in t.parameters]


def gradients(allocator: RankAllocator) -> Factors:
    return [p.grad.clone() for t in allocator.triplets for p in t.parameters if p.grad is not None]


class Original:
    """The original's algorithm, and the paper's."""

    def __init__(self, allocator: RankAllocator, model: nn.Module) -> None:
        self.keys = [(t.name, kind) for t in allocator.triplets for kind in "AEB"]
        names = [t.name for t in allocator.triplets]
        options = {"metric": allocator.metric, "reduction": allocator.reduction}
        self.oracle = OriginalAllocator(names, START, STEPS - END, INTERVAL, STEPS, 2 * len(names), **options)

    def step(self, step: int, before: Factors, after: Factors, grads: Factors) -> tuple[Tensor | None, Factors]:
        scored = dict(zip(self.keys, before, strict=True)) if self.pre_step else None
        params = dict(zip(self.keys, after, strict=True))
        _, threshold, live = self.oracle.step(step, params, dict(zip(self.keys, grads, strict=True)), scored)
        return None if threshold is None else torch.cat(list(live.values())), after

    def averages(self) -> tuple[Tensor, Tensor]:
        average, uncertainty = (
            torch.cat([values[key].reshape(-1) for key in self.keys])
            for values in (self.oracle.average, self.oracle.uncertainty)
        )
        return average, uncertainty

    pre_step = False


class Paper(Original):
    pre_step = True


class Peft:
    """PEFT's own allocator over an unpatched copy of the model."""

    def __init__(self, allocator: RankAllocator, model: nn.Module) -> None:
        self.model = model
        self.names = [name for t in allocator.triplets for name in t.parameter_names]
        self.ranks = [f"{t.name}.lora_E.default" for t in allocator.triplets]

    def step(self, step: int, before: Factors, after: Factors, grads: Factors) -> tuple[Tensor | None, Factors]:
        params = dict(self.model.base_model.model.named_parameters())
        for name, value, grad in zip(self.names, after, grads, strict=True):
            params[name].data, params[name].grad = value, grad
        self.model.base_model.update_and_allocate(step)
        pattern = self.model.peft_config["default"].rank_pattern
        due = START < step <= END and step % INTERVAL == 0
        return torch.tensor([f for name in self.ranks for f in pattern[name]]) if due or step > END else None, after

    def averages(self) -> tuple[Tensor, Tensor]:
        allocator = self.model.base_model.rankallocator
        average, uncertainty = (
            torch.cat([values[name].reshape(-1) for name in self.names])
            for values in (allocator.exp_avg_ipt, allocator.exp_avg_unc)
        )
        return average, uncertainty


ORACLES: dict[str, type] = {"original": Original, "paper": Paper, "peft": Peft}
CASES = [(model, variant, "ipt", "mean") for model in ("perceptron", "deberta", "llama") for variant in ORACLES]
CASES += [("perceptron", "original", "mag", "mean"), ("perceptron", "paper", "ipt", "sum")]


@pytest.mark.parametrize(("architecture", "variant", "metric", "reduction"), CASES)
def test_lockstep(
    architecture: str, variant: str, metric: str, reduction: str, record_property: Callable[[str, object], None]
) -> None:
    unpatched, model = twins(build(architecture, **SETTINGS))
    if variant == "peft":
        allocator = model.base_model.rank_allocator()
    else:
        allocator = RankAllocator(
            model.base_model.model, 6, 2, START, STEPS - END, INTERVAL, BETA, BETA, STEPS,
            variant=variant, metric=metric, reduction=reduction,
        )  # fmt: skip
    oracle = ORACLES[variant](allocator, unpatched)
    optimizer = torch.optim.AdamW(adapter_parameters(model).values(), lr=5e-3)
    seen: dict[str, Factors] = {}
    optimizer.register_step_pre_hook(lambda *_: seen.update(before=factors(allocator), grads=gradients(allocator)))
    optimizer.register_step_post_hook(lambda *_: seen.update(after=factors(allocator)))
    allocator.attach(optimizer)

    layout = allocator.importance.layout
    exact = torch.zeros(2, layout.total_elements, dtype=torch.float64)
    ranked = ties = 0
    for step in range(STEPS):
        model.base_model(**batch(model, seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scored = [p.double() for p in seen["before" if allocator.pre_step else "after"]]
        if step < END:
            update(exact, scored, seen["grads"])
        theirs, params = oracle.step(step, seen["before"], seen["after"], seen["grads"])
        if step < END:
            for kind, name in enumerate(("sensitivity", "uncertainty")):
                mine = allocator.importance.current()[kind]
                assert_within_budget(f"{name} at step {step}", mine, oracle.averages()[kind], exact[kind])
        if theirs is None:
            continue
        ranked += 1
        live = allocator.importance.live
        differing = live != theirs
        if metric == "mag":
            scores = magnitude_scores(layout, [p.double() for p in seen["after"]], reduction)
        else:
            scores = triplet_scores(layout, *exact, reduction)
        threshold = scores.sort().values[live.numel() - allocator.schedule.budget(step) - 1]
        assert ((scores / threshold - 1).abs()[differing] <= 1e-5).all(), f"step {step}: no tie"
        ties += int(differing.sum())
        assert int(live.sum()) <= allocator.schedule.budget(step)
        if not differing.any():
            for mine, oracles in zip(factors(allocator), params, strict=True):
                assert torch.equal(mine, oracles), f"step {step}"
    record_property("measured", f"{ranked} rankings, {ties} triplets differ, each within 1e-5 of its threshold")
    assert ranked == (END - START) // INTERVAL + STEPS - 1 - END
    assert sum(allocator.live_ranks().values()) == 2 * len(allocator.triplets)


def update(exact: Tensor, params: Factors, grads: Factors) -> None:
    """Ī and Ū in fp64, in place."""
    flat = [torch.cat([t.reshape(-1).double() for t in tensors]) for tensors in (params, grads)]
    sensitivity = (flat[0] * flat[1]).abs()
    exact[0].mul_(BETA).add_(sensitivity, alpha=1 - BETA)
    exact[1].mul_(BETA).add_((sensitivity - exact[0]).abs(), alpha=1 - BETA)
