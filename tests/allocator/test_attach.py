"""The allocator inside the optimizer's step: with other callers, under a GradScaler, and what is said without it."""

from __future__ import annotations

import copy
import gc
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks, register_optimizer_step_post_hook

from adalora_kernels import RankAllocator, SVDLinear
from adalora_kernels.allocator.watch import PATIENCE
from tests.allocator.test_allocator import SETTINGS, adam, assert_unchanged, averages, loss_of, network, snapshot

VARIANTS = ("original", "peft", "paper")


def made(variant: str = "original", **settings: Any) -> tuple[nn.Sequential, RankAllocator]:
    model = network()
    return model, RankAllocator(model, **(SETTINGS | {"total_step": 200, "variant": variant} | settings))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step, torch.float32).backward()
        optimizer.step()


def by_hand(model: nn.Module, allocator: RankAllocator, steps: range) -> None:
    optimizer = adam(model)
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step, torch.float32).backward()
        if allocator.pre_step:
            allocator.update_importance(model, step)
        optimizer.step()
        allocator.update_and_mask(model, step)


@pytest.mark.parametrize("variant", VARIANTS)
def test_attached_equals_called_by_hand(variant: str) -> None:
    (ours, attached), (theirs, called) = made(variant, total_step=110), made(variant, total_step=110)
    optimizer = adam(ours)
    attached.attach(optimizer)
    train(ours, optimizer, range(70))
    by_hand(theirs, called, range(70))
    assert_unchanged(snapshot(theirs, called), ours, attached)
    assert attached.global_step == called.global_step == 69


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_caller_at_once_updates_once(variant: str) -> None:
    """Attached, as a callback would call, and by hand; also twice."""
    (ours, allocator), (theirs, called) = made(variant), made(variant)
    optimizer = adam(ours)
    assert allocator.attach(optimizer) is allocator.attach(optimizer)
    for step in range(60):
        train(ours, optimizer, range(step, step + 1))
        allocator.advance(ours, step)
        budget, threshold = allocator.update_and_mask(ours, step)
        assert budget == allocator.schedule.budget(step)
        assert (threshold is not None) == (step > 15 and step % 5 == 0)
    by_hand(theirs, called, range(60))
    assert_unchanged(snapshot(theirs, called), ours, allocator)


def test_callback_and_a_call_by_hand_update_once() -> None:
    (ours, allocator), (theirs, called) = made(), made()
    optimizer = adam(ours)
    for step in range(30):
        train(ours, optimizer, range(step, step + 1))
        if step % 2:
            allocator.update_and_mask(ours, step)
        allocator.advance(ours, step)
        allocator.advance(ours, step)
        if step % 2 == 0:
            allocator.update_and_mask(ours, step)
    by_hand(theirs, called, range(30))
    assert_unchanged(snapshot(theirs, called), ours, allocator)


def test_the_callers_count_is_the_schedules() -> None:
    model, allocator = made()
    optimizer, count = adam(model), iter(range(50, 60))
    with allocator.attach(optimizer, step=lambda: next(count)):
        train(model, optimizer, range(3))
    assert allocator.global_step == 52 and not allocator.attached
    allocator.attach(optimizer)
    train(model, optimizer, range(3, 4))
    assert allocator.global_step == 53
    before = snapshot(model, allocator)
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"^global_step: expected 53, which the attached optimizer .* got 90; leave"
        ):
            allocator.update_and_mask(model, 90)
    assert_unchanged(before, model, allocator)
    allocator.expect(90)
    train(model, optimizer, range(4, 5))
    allocator.update_and_mask(model, 90)
    assert allocator.global_step == 90


def test_detached_and_attached_again() -> None:
    model, allocator = made()
    first, second = adam(model), adam(model)
    handle = allocator.attach(first)
    with pytest.raises(ValueError, match=r"^optimizer: expected the one that is attached already"):
        allocator.attach(second)
    handle.detach()
    handle.detach()
    train(model, first, range(3))
    assert allocator.importance.updates == 0
    allocator.attach(second)
    train(model, second, range(3))
    assert allocator.importance.updates == 3


def test_what_can_be_attached_to() -> None:
    model, allocator = made()
    with pytest.raises(TypeError, match=r"^optimizer: expected a torch.optim.Optimizer, got Sequential"):
        allocator.attach(model)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^step: expected a function that gives its number, got 3"):
        allocator.attach(adam(model), step=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^optimizer: expected one that trains the adapters, found none of 0's"):
        allocator.attach(torch.optim.SGD(nn.Linear(2, 2).parameters()))
    accelerate = pytest.importorskip("accelerate")
    wrapped = accelerate.Accelerator(cpu=True).prepare_optimizer(adam(model))
    allocator.attach(wrapped)
    train(model, wrapped, range(3))
    assert allocator.importance.updates == 3


def test_errors_come_before_the_optimizer_has_stepped() -> None:
    model, allocator = made()
    optimizer = adam(model)
    allocator.attach(optimizer)
    train(model, optimizer, range(20))
    model[2].requires_grad_(False)
    before = snapshot(model, allocator)
    loss_of(model, 20, torch.float32).backward()
    with pytest.raises(ValueError, match=r"^model: expected every adapted layer to train, but 2\.lora_E is frozen"):
        optimizer.step()
    assert_unchanged(before, model, allocator)


def test_a_step_without_gradients_counts_and_changes_nothing() -> None:
    model, allocator = made()
    optimizer = adam(model)
    allocator.attach(optimizer)
    train(model, optimizer, range(3))
    before = snapshot(model, allocator)
    optimizer.zero_grad()
    optimizer.step()
    assert_unchanged(before, model, allocator)
    assert allocator.global_step == 3 and allocator.importance.updates == 3


def test_closures() -> None:
    """The gradients are made within the step: fine after it, and too late for what reads them before it."""
    for variant in ("original", "paper"):
        model, allocator = made(variant)
        optimizer = torch.optim.LBFGS([p for p in model.parameters() if p.requires_grad], max_iter=2)
        allocator.attach(optimizer)

        def closure(model: nn.Module = model) -> Tensor:
            loss = loss_of(model, 0, torch.float32)
            model.zero_grad()
            loss.backward()
            return loss

        if variant == "original":
            optimizer.step(closure)
            assert allocator.importance.updates == 1
        else:
            with pytest.raises(ValueError, match=r"^closure: expected None, since variant 'paper'"):
                optimizer.step(closure)


def test_paper_by_hand_needs_the_call_before_the_step() -> None:
    model, allocator = made("paper")
    loss_of(model, 0, torch.float32).backward()
    before = snapshot(model, allocator)
    with pytest.raises(ValueError, match=r"^variant 'paper' scores the parameters before optimizer.step\(\)"):
        allocator.update_and_mask(model, 0)
    assert_unchanged(before, model, allocator)
    allocator.update_importance(model, 7)
    with pytest.raises(ValueError, match=r"expected update_importance\(model, 8\) before it"):
        allocator.update_and_mask(model, 8)
    assert allocator.update_and_mask(model, 7)[0] > 0 and allocator.global_step == 7
    with pytest.raises(ValueError, match=r"^variant: expected 'paper', which alone scores before the step"):
        made()[1].update_importance(model, 0)


def test_what_the_attached_optimizer_does_is_not_done_besides() -> None:
    model, allocator = made("paper")
    allocator.attach(adam(model))
    loss_of(model, 0, torch.float32).backward()
    before = snapshot(model, allocator)
    with pytest.raises(ValueError, match=r"^update_importance: the attached optimizer's step does it; leave"):
        allocator.update_importance(model, 0)
    assert_unchanged(before, model, allocator)


class WithHead(nn.Module):
    """Adapters, and a parameter that has none, whose gradient can overflow alone."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network()
        self.head = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.head


def scaled(model: nn.Module, fused: bool, **options: Any) -> tuple[torch.optim.Optimizer, torch.amp.GradScaler]:
    params = [p for p in model.parameters() if p.requires_grad]
    options = {"init_scale": 1024.0, "growth_interval": 1000} | options
    return torch.optim.AdamW(params, lr=5e-3, fused=fused), torch.amp.GradScaler("cpu", **options)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("fused", (False, True), ids=("unfused", "fused"))
@pytest.mark.parametrize("unscale_first", (False, True), ids=("", "unscaled"))
def test_loss_scale_leaves_no_trace(variant: str, fused: bool, unscale_first: bool) -> None:
    """The same training with and without a scale of 1024, which rounds nothing."""
    runs = []
    for enabled in (False, True):
        torch.manual_seed(0)
        model = WithHead()
        allocator = RankAllocator(model, **SETTINGS, total_step=200, variant=variant)
        optimizer, scaler = scaled(model, fused, enabled=enabled)
        allocator.attach(optimizer)
        for step in range(40):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, step, torch.float32)).backward()
            if unscale_first:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
        runs.append((model, allocator))
    (plain, expected), (model, allocator) = runs
    assert allocator.importance.updates == 40 and sum(allocator.live_ranks().values()) < 25
    assert_unchanged(snapshot(plain, expected), model, allocator)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("fused", (False, True), ids=("unfused", "fused"))
@pytest.mark.parametrize("where", ("head", "adapter"))
def test_overflow_under_a_scaler_leaves_no_trace(variant: str, fused: bool, where: str) -> None:
    """torch's fused AdamW calls its hooks on a step that it skips; also where the adapters' gradients are finite."""
    torch.manual_seed(0)
    model = WithHead()
    allocator = RankAllocator(model, **SETTINGS, total_step=200, variant=variant)
    optimizer, scaler = scaled(model, fused)
    allocator.attach(optimizer)
    stepped: list[int] = []
    optimizer.register_step_post_hook(lambda *_: stepped.append(1))
    for step in range(31):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step, torch.float32)).backward()
        if step in (20, 25, 30):  # masking steps, where every step is counted
            parameter = model.head if where == "head" else model.body[0].lora_B
            parameter.grad.view(-1)[0] = torch.inf
            before = snapshot(model, allocator)
        scaler.step(optimizer)
        scaler.update()
        if step in (20, 25, 30):
            assert_unchanged(before, model, allocator)
    assert len(stepped) == (31 if fused else 28) == allocator.next_step
    assert all(t.isfinite().all() for t in snapshot(model, allocator))


def test_what_is_refused_is_not_unscaled_first() -> None:
    """Or the step that is made again, when the cause is cured, would unscale a second time."""
    model, allocator = made()
    optimizer, scaler = scaled(model, fused=True)
    allocator.attach(optimizer)
    scaler.scale(loss_of(model, 0, torch.float32)).backward()
    before = [p.grad.clone() for t in allocator.triplets for p in t.parameters if p.grad is not None]
    allocator.total_step = None
    with pytest.raises(ValueError, match=r"^total_step"):
        scaler.step(optimizer)
    after = [p.grad for t in allocator.triplets for p in t.parameters]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_an_optimizer_that_takes_the_scaler_itself_is_refused() -> None:
    class Old(torch.optim.SGD):
        _step_supports_amp_scaling = True

        def step(self, closure: Any = None, *, grad_scaler: Any = None) -> None:  # type: ignore[override]
            super().step(closure)

    model, allocator = made()
    optimizer = Old([p for p in model.parameters() if p.requires_grad], lr=1.0)
    allocator.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model, 0, torch.float32)).backward()
    before = snapshot(model, allocator)
    with pytest.raises(ValueError, match=r"^optimizer: expected found_inf"), pytest.warns(FutureWarning):
        scaler.step(optimizer)
    assert_unchanged(before, model, allocator)


class TestWarning:
    def test_one_warning_where_nobody_calls(self) -> None:
        model, allocator = made()
        optimizer = adam(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            train(model, optimizer, range(PATIENCE - 1))
        with pytest.warns(
            UserWarning, match=r"^AdaLoRA: RankAllocator was made, and 10 .* allocator.attach\(optimizer"
        ):
            train(model, optimizer, range(1))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            train(model, optimizer, range(2 * PATIENCE))
        assert allocator.importance.updates == 0

    @pytest.mark.parametrize("how", ("attached", "called", "other model", "gone"))
    def test_none_where_it_is_called(self, how: str) -> None:
        model, allocator = made()
        optimizer = adam(network() if how == "other model" else model)
        if how == "attached":
            allocator.attach(optimizer)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            train(model, optimizer, range(1))
            if how == "called":
                allocator.update_and_mask(model, 0)
            if how == "gone":
                del allocator
                gc.collect()
            train(model, optimizer, range(2 * PATIENCE))

    def test_torch_has_one_hook_however_many_are_watched(self) -> None:
        model, allocator = made()
        before = len(_global_optimizer_post_hooks)
        made()
        by_hand(model, allocator, range(1))
        assert len(_global_optimizer_post_hooks) == before

    @pytest.mark.parametrize("how", ("nobody calls", "called there"))
    def test_beside_global_hooks_of_others(self, how: str) -> None:
        """Which torch walks over as ours runs, or as theirs calls the allocator."""
        model, allocator = made()
        steps: list[int] = []

        def count(*_: Any) -> None:
            steps.append(len(steps))
            if how == "called there":
                allocator.update_and_mask(model, steps[-1])

        handle = register_optimizer_step_post_hook(count)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                train(model, adam(model), range(PATIENCE + 2))
        finally:
            handle.remove()
        assert len(steps) == PATIENCE + 2


def test_a_copy_is_attached_to_nothing() -> None:
    model, allocator = made()
    optimizer = adam(model)
    allocator.attach(optimizer)
    train(model, optimizer, range(2))
    twin = copy.deepcopy(allocator)
    assert allocator.attached and not twin.attached
    before = averages(twin)["0", "A"][0].clone()
    train(model, optimizer, range(2, 4))
    assert torch.equal(averages(twin)["0", "A"][0], before)
    assert twin.triplets[0].lora_A is not allocator.triplets[0].lora_A


def test_layers_without_rank_are_no_obstacle() -> None:
    model = nn.Sequential(SVDLinear(8, 6, r=4), nn.Tanh(), SVDLinear(6, 3, r=0))
    allocator = RankAllocator(model, **(SETTINGS | {"total_step": 100}))
    optimizer = adam(model)
    allocator.attach(optimizer)
    for _ in range(60):
        optimizer.zero_grad()
        model(torch.randn(5, 8)).square().sum().backward()
        optimizer.step()
    assert allocator.live_ranks() == {"0": 2}
