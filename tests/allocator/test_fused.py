"""Importance inside the backward: the bits of the launch where that is legal, and the launch where it is not."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from adalora_kernels import AdaLoraAdamW, RankAllocator, SVDLinear, compute_orth_regu, explain, svd_linear_group

SETTINGS: dict[str, Any] = {"lora_r": 6, "target_rank": 2, "init_warmup": 3, "final_warmup": 4, "mask_interval": 2,
                            "beta1": 0.85, "beta2": 0.85, "total_step": 16, "variant": "paper"}  # fmt: skip
STEPS = 16
FUSED = "fused into the backward"


class Network(nn.Module):
    """Three adapted layers; one of them may run twice, or not at all."""

    def __init__(self, runs: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = SVDLinear(24, 40, r=6, lora_alpha=8), SVDLinear(40, 40, r=5)
        self.last = SVDLinear(40, 10, r=6)
        self.runs = runs

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        for _ in range(self.runs):
            h = torch.tanh(self.second(h))
        return self.last(h)


def loss_of(model: nn.Module, step: int, orthogonality: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 24, generator=generator)
    loss = (model(x) - torch.sin(x[:, :10] * 2)).square().mean()
    if orthogonality:
        loss = loss + compute_orth_regu(model, 0.01, squared=True, accumulate=True)
    return loss


def train(
    fuse: bool, backend: str, backward: Callable[[nn.Module, int], None], runs: int = 1, swept: bool = False
) -> tuple[nn.Module, RankAllocator, set[str]]:
    """A whole schedule; the outcomes are those of the steps that took gradients."""
    model = Network(runs)
    allocator = RankAllocator(model, **SETTINGS, backend=backend)
    if fuse:
        allocator.fuse_backward()
    params = [p for p in model.parameters() if p.requires_grad]
    if swept:
        optimizer: torch.optim.Optimizer = AdaLoraAdamW(params, lr=5e-3, allocator=allocator, backend=backend)
    else:
        optimizer = torch.optim.AdamW(params, lr=5e-3)
        allocator.attach(optimizer)
    outcomes = set()
    for step in range(STEPS):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
        if fuse and step < 12:
            outcomes.add(explain(allocator)[0].reason.split("last step: ")[1])
    return model, allocator, outcomes


def assert_same(backward: Callable[[nn.Module, int], None], backend: str, **options: Any) -> set[str]:
    plain, apart, _ = train(False, backend, backward, **options)
    model, fused, outcomes = train(True, backend, backward, **options)
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(fused.importance.current(), apart.importance.current(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(fused.importance.scores, apart.importance.scores)
    assert fused.get_rank_pattern() == apart.get_rank_pattern()
    return outcomes


def one_backward(model: nn.Module, step: int) -> None:
    loss_of(model, step).backward()


def without_term(model: nn.Module, step: int) -> None:
    """Bare, since of a module that runs twice the term is added between the two gradients: another rounding."""
    loss_of(model, step, orthogonality=False).backward()


@pytest.mark.parametrize("swept", [False, True])
def test_fused_has_the_bits_of_the_launch(swept: bool) -> None:
    """All steps fused, the orthogonality term among the gradients."""
    assert assert_same(one_backward, "native", swept=swept) == {FUSED}


def test_fused_by_the_reference() -> None:
    assert assert_same(without_term, "reference") == {FUSED}


def test_accumulated_gradients_are_taken_at_the_last_micro_batch() -> None:
    def backward(model: nn.Module, step: int) -> None:
        for part in range(3):
            (loss_of(model, 100 * step + part, orthogonality=part == 0) / 3).backward()

    assert assert_same(backward, "native") == {FUSED}


def no_layer(model: Network, step: int) -> None:
    runs, model.runs = model.runs, int(step % 2)
    one_backward(model, step)
    model.runs = runs


def clipped(model: nn.Module, step: int) -> None:
    one_backward(model, step)
    nn.utils.clip_grad_norm_(model.parameters(), 0.01)


def hooked(model: nn.Module, step: int) -> None:
    if step == 0:
        model.second.lora_B.register_hook(lambda g: g * 0.5)
    without_term(model, step)


def scaled(model: nn.Module, step: int) -> None:
    (loss_of(model, step) * 8).backward()
    for p in model.parameters():
        if p.grad is not None:
            p.grad.div_(8)


def cleared(model: nn.Module, step: int) -> None:
    """A micro-batch that is thrown away."""
    without_term(model, step + 50)
    model.zero_grad()
    without_term(model, step)


def changed(model: nn.Module, step: int) -> None:
    """The parameter, not its gradient."""
    one_backward(model, step)
    with torch.no_grad():
        model.first.lora_A.mul_(1.01)


@pytest.mark.parametrize(
    ("backward", "runs", "because"),
    [
        (without_term, 2, "second ran twice in one backward"),
        (no_layer, 1, "second was not fused in this step"),
        (clipped, 1, "the gradient of first was written to after its backward"),
        (hooked, 1, "the gradient of second was written to after its backward"),
        (scaled, 1, "the gradient of first was written to after its backward"),
        (cleared, 1, "the gradient of first was cleared or written to between two backwards"),
        (changed, 1, "a parameter of first was written to after its backward"),
    ],
)
def test_where_it_is_not_legal_the_launch_does_it(backward: Any, runs: int, because: str) -> None:
    outcomes = assert_same(backward, "native", runs=runs)
    assert f"launched before the step: {because}" in outcomes, outcomes
    assert outcomes <= {FUSED, f"launched before the step: {because}"}


def test_overflow_leaves_no_trace() -> None:
    """Also where earlier layers were updated in the backward before the overflow was seen."""
    model = Network()
    allocator = RankAllocator(model, **SETTINGS)
    allocator.fuse_backward()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    allocator.attach(optimizer)
    for step in range(6):
        model.zero_grad()
        loss = loss_of(model, step, orthogonality=False)
        before = [t.clone() for t in (*allocator.importance.current(), allocator.importance.scores)]
        if step == 4:
            hidden = torch.ones(10)
            hidden[0] = torch.inf
            (model(torch.ones(1, 24)) * hidden).sum().backward()
        else:
            loss.backward()
        optimizer.step()
        if step == 4:
            after = (*allocator.importance.current(), allocator.importance.scores)
            assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
        # A gradient that is NaN equals nothing, so from there on the launch finds the overflow.
        assert step >= 4 or explain(allocator)[0].reason.endswith(FUSED)


@pytest.mark.parametrize("swept", [False, True])
def test_what_a_grad_scaler_unscales_behind_autograds_back_is_noticed(swept: bool) -> None:
    """Its unscaling leaves the version of a gradient as it was."""
    scores = []
    for scale in (1.0, 1024.0):
        model = Network()
        allocator = RankAllocator(model, **SETTINGS)
        allocator.fuse_backward()
        params = [p for p in model.parameters() if p.requires_grad]
        if swept:
            optimizer: torch.optim.Optimizer = AdaLoraAdamW(params, lr=1e-3, allocator=allocator)
        else:
            optimizer = torch.optim.SGD(params, lr=1e-3)
            allocator.attach(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
        for step in range(4):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, step)).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        scores.append(allocator.importance.scores)
    torch.testing.assert_close(scores[1], scores[0], rtol=1e-4, atol=0)


def test_beside_checkpointing() -> None:
    """Also of a model that isn't fused itself."""
    outcomes = set()
    model, other = Network(), Network()
    allocator = RankAllocator(model, **SETTINGS)
    allocator.fuse_backward()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    allocator.attach(optimizer)
    for step in range(3):
        for each in (other, model):
            each.zero_grad()
            x = torch.randn(4, 24, generator=torch.Generator().manual_seed(step))
            torch.utils.checkpoint.checkpoint(each, x, use_reentrant=False).square().mean().backward()
        optimizer.step()
        outcomes.add(explain(allocator)[0].reason.split("last step: ")[1])
    assert outcomes == {FUSED}


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_the_term_reaches_layers_whose_backward_runs_within_another(micro_batches: int) -> None:
    """Reentrant checkpointing starts a backward within the backward that has the term."""
    gradients = []
    for fuse in (False, True):
        model = Network()
        if fuse:
            allocator = RankAllocator(model, **SETTINGS)
            allocator.fuse_backward()
        for i in range(micro_batches):
            x = torch.randn(4, 24, generator=torch.Generator().manual_seed(i), requires_grad=True)
            y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=True)
            (y.square().mean() + compute_orth_regu(model, 0.1, squared=True, accumulate=True)).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_siblings_beside_checkpointing() -> None:
    """Layers of one node, whose saved parameters are aliases then."""
    torch.manual_seed(0)
    model = nn.ModuleList([SVDLinear(24, 10, r=4), SVDLinear(24, 10, r=5)])
    allocator = RankAllocator(model, **SETTINGS)
    allocator.fuse_backward()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    allocator.attach(optimizer)

    def forward(x: Tensor) -> Tensor:
        rows = [(m.weight, m.lora_A, m.lora_E, m.lora_B, m.bias) for m in model]
        return torch.stack(svd_linear_group(x, rows)).square().mean()

    torch.utils.checkpoint.checkpoint(forward, torch.randn(4, 24), use_reentrant=False).backward()
    optimizer.step()
    assert explain(allocator)[0].reason.endswith(FUSED)


def test_a_state_loaded_between_backward_and_step() -> None:
    """What the backward has left belongs to the averages of before."""
    scores = []
    for fuse in (False, True):
        model = Network()
        allocator = RankAllocator(model, **SETTINGS)
        if fuse:
            allocator.fuse_backward()
        allocator.attach(torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1))
        saved = allocator.state_dict()
        for step in range(3):
            model.zero_grad()
            without_term(model, step)
            if step == 2:
                allocator.load_state_dict(saved)
            allocator._attachment.optimizer.step()
        scores.append(allocator.importance.scores)
    assert torch.equal(*scores)


def test_a_backward_that_failed_leaves_nothing_behind() -> None:
    gradients = []
    for fail in (False, True):
        model = Network()
        allocator = RankAllocator(model, **SETTINGS)
        allocator.fuse_backward()
        if fail:
            hidden = model.first(torch.ones(2, 24))
            hidden.register_hook(lambda g: 1 / 0)
            lost = model.last(model.second(hidden)).sum() + compute_orth_regu(model, 0.5, accumulate=True)
            with pytest.raises(ZeroDivisionError):
                lost.backward()
            model.zero_grad()
        without_term(model, 0)
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("layers", [3, 2])
def test_terms_that_are_not_the_allocators_alone(layers: int) -> None:
    """Two terms in one backward, or one of more layers than the allocator has: each arrives once."""
    gradients = []
    for fuse in (False, True):
        model = Network()
        part = model if layers == 3 else nn.ModuleList([model.first, model.second])
        if fuse:
            RankAllocator(part, **SETTINGS).fuse_backward()
            allocator = RankAllocator(part, **SETTINGS)
            allocator.fuse_backward()
        (loss_of(model, 0) + compute_orth_regu(model, 0.3, accumulate=True)).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_the_model_can_die() -> None:
    model = Network()
    allocator = RankAllocator(model, **SETTINGS)
    allocator.fuse_backward()
    gone = weakref.ref(model)
    del model, allocator
    gc.collect()
    assert gone() is None


def test_copies_and_ends() -> None:
    model = Network()
    allocator = RankAllocator(model, **SETTINGS)
    allocator.fuse_backward()
    assert copy.deepcopy(allocator).fused is None
    allocator.fuse_backward(False)
    assert allocator.fused is None
    with pytest.raises(ValueError, match="variant: expected 'paper'"):
        RankAllocator(model, **{**SETTINGS, "variant": "peft"}).fuse_backward()
