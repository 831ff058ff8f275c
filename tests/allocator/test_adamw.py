"""AdaLoraAdamW against torch's AdamW with clipping and the allocator called after it."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adalora_kernels import AdaLoraAdamW, RankAllocator, SVDLinear, compute_orth_regu
from adalora_kernels.allocator import find_triplets

SETTINGS: dict[str, Any] = {"lora_r": 6, "target_rank": 2, "init_warmup": 5, "final_warmup": 12, "mask_interval": 3,
                            "beta1": 0.85, "beta2": 0.85, "total_step": 40}  # fmt: skip
STEPS = 40


class Network(nn.Module):
    """Two adapted layers and a head that is none."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            SVDLinear(24, 40, r=6, lora_alpha=8, dtype=dtype), nn.Tanh(), SVDLinear(40, 33, r=5, dtype=dtype)
        )
        self.head = nn.Linear(33, 4, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


def backward(model: nn.Module, step: int, dtype: torch.dtype, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 24, generator=generator, dtype=torch.float64).to(dtype)
    loss = (model(x) - torch.sin(x[:, :4] * 2)).square().mean() + compute_orth_regu(model, 0.1)
    model.zero_grad()
    (loss * scale).backward()


def groups(model: Network) -> list[dict[str, Any]]:
    adapters = [p for n, p in model.named_parameters() if "lora_" in n and p.requires_grad]
    return [
        {"params": adapters[:4], "lr": 3e-3},
        {"params": [*adapters[4:], *model.head.parameters()], "weight_decay": 0.1, "betas": (0.8, 0.99)},
    ]


def parts(model: Network) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in model.named_parameters()}


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("variant", ["original", "peft", "paper"])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_equals_torchs_adamw_and_the_allocator(backend: str, variant: str, clip: float | None) -> None:
    """Free-running in fp64 for the whole schedule: the same parameters, averages and masks."""
    dtype = torch.float64
    theirs = Network(dtype)
    ours = copy.deepcopy(theirs)
    beside = RankAllocator(theirs, **SETTINGS, variant=variant, backend=backend)
    inside = RankAllocator(ours, **SETTINGS, variant=variant, backend=backend)
    adamw = torch.optim.AdamW(groups(theirs), lr=5e-3)
    beside.attach(adamw)
    swept = AdaLoraAdamW(groups(ours), lr=5e-3, allocator=inside, max_grad_norm=clip, backend=backend)
    for step in range(STEPS):
        for model in (theirs, ours):
            backward(model, step, dtype)
        if step == 7:  # a layer that saw no gradient
            for model in (theirs, ours):
                model.body[2].lora_A.grad = None
        if clip is not None:
            nn.utils.clip_grad_norm_([p for g in adamw.param_groups for p in g["params"]], clip)
        adamw.step()
        swept.step()
        assert inside.live_ranks() == beside.live_ranks(), step
    for name, value in parts(ours).items():
        torch.testing.assert_close(value, parts(theirs)[name], rtol=1e-9, atol=1e-12)
    for a, b in zip(inside.importance.current(), beside.importance.current(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-18)
    assert sum(inside.live_ranks().values()) == 4


def test_checkpoints_are_torchs_in_both_directions() -> None:
    """Saved in mid-training and continued, by itself bit for bit, by torch's AdamW to rounding."""
    torch.manual_seed(0)
    whole = Network(torch.float32)
    allocator = RankAllocator(whole, **SETTINGS)
    optimizer = AdaLoraAdamW(groups(whole), lr=5e-3, allocator=allocator)
    for step in range(20):
        backward(whole, step, torch.float32)
        optimizer.step()
    saved = io.BytesIO()
    torch.save([whole.state_dict(), optimizer.state_dict(), allocator.state_dict()], saved)
    saved.seek(0)
    weights, moments, averages = torch.load(saved)
    resumed, foreign = Network(torch.float32), Network(torch.float32)
    for model in (resumed, foreign):
        model.load_state_dict(weights)
    again = RankAllocator(resumed, **SETTINGS)
    again.load_state_dict(averages)
    continued = AdaLoraAdamW(groups(resumed), lr=5e-3, allocator=again)
    continued.load_state_dict(copy.deepcopy(moments))  # torch's load_state_dict keeps the tensors it is given
    beside = RankAllocator(foreign, **SETTINGS)
    beside.load_state_dict(averages)
    adamw = torch.optim.AdamW(groups(foreign), lr=5e-3)
    adamw.load_state_dict(moments)
    beside.attach(adamw)
    for step in range(20, STEPS):
        for model, each in ((whole, optimizer), (resumed, continued), (foreign, adamw)):
            backward(model, step, torch.float32)
            each.step()
        if step == 20:
            for name, value in parts(foreign).items():
                torch.testing.assert_close(value, parts(whole)[name], rtol=1e-5, atol=1e-6)
    for name, value in parts(resumed).items():
        assert torch.equal(value, parts(whole)[name]), name
    assert again.get_rank_pattern() == allocator.get_rank_pattern()
    back = AdaLoraAdamW(groups(foreign), lr=5e-3, allocator=RankAllocator(foreign, **SETTINGS))
    back.load_state_dict(adamw.state_dict())
    for p, state in adamw.state.items():
        assert all(torch.equal(back.state[p][name], state[name]) for name in ("step", "exp_avg", "exp_avg_sq"))


def test_under_a_grad_scaler() -> None:
    """Scaled gradients are unscaled in the sweep; an overflow step leaves everything alone, and counts."""
    plain = Network(torch.float32)
    scaled = copy.deepcopy(plain)
    optimizers = [
        AdaLoraAdamW(groups(m), lr=5e-3, allocator=RankAllocator(m, **SETTINGS), max_grad_norm=0.5)
        for m in (plain, scaled)
    ]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    scaler.scale(torch.ones(()))  # makes the scale
    for step in range(8):
        backward(plain, step, torch.float32)
        backward(scaled, step, torch.float32, scale=scaler.get_scale())
        if step == 6:
            scaled.body[0].lora_B.grad[0, 0] = torch.inf
            before = {n: v.clone() for n, v in parts(scaled).items()}
            averages = [t.clone() for t in optimizers[1].allocator.importance.current()]
        else:
            optimizers[0].step()
        scaler.step(optimizers[1])
        scaler.update()
        if step == 6:
            assert all(torch.equal(v, before[n]) for n, v in parts(scaled).items())
            now = optimizers[1].allocator.importance.current()
            assert all(torch.equal(a, b) for a, b in zip(now, averages, strict=True))
            assert optimizers[1].allocator.next_step == 7 and scaler.get_scale() == 512.0
            optimizers[0].allocator.expect(7)
    for name, value in parts(scaled).items():
        torch.testing.assert_close(value, parts(plain)[name], rtol=1e-5, atol=1e-6)


def test_goes_on_after_compaction() -> None:
    """Shrunk in the final phase, the run is torch's AdamW's, shrunk likewise."""
    dtype = torch.float64
    theirs = Network(dtype)
    ours = copy.deepcopy(theirs)
    beside, inside = (RankAllocator(m, **SETTINGS) for m in (theirs, ours))
    adamw = torch.optim.AdamW(groups(theirs), lr=5e-3)
    beside.attach(adamw)
    swept = AdaLoraAdamW(groups(ours), lr=5e-3, allocator=inside)
    for step in range(STEPS):
        if step == 32:
            beside.compact(adamw)
            inside.compact(swept)
        for model, optimizer in ((theirs, adamw), (ours, swept)):
            backward(model, step, dtype)
            optimizer.step()
    assert sum(t.lora_E.shape[0] for t in find_triplets(ours)) == 4
    for name, value in parts(ours).items():
        torch.testing.assert_close(value, parts(theirs)[name], rtol=1e-9, atol=1e-12)


def test_adapters_in_16_bits_keep_moments_in_32() -> None:
    model = Network(torch.bfloat16)
    optimizer = AdaLoraAdamW(groups(model), lr=5e-3, allocator=RankAllocator(model, **SETTINGS))
    for step in range(12):
        backward(model, step, torch.bfloat16)
        optimizer.step()
    adapter = find_triplets(model)[0].lora_A
    assert optimizer.state[adapter]["exp_avg"].dtype is torch.float32 and optimizer.state[adapter]["exp_avg"].any()
    saved = copy.deepcopy(optimizer.state_dict())
    other = AdaLoraAdamW(groups(model), lr=5e-3, allocator=RankAllocator(model, **SETTINGS))
    other.load_state_dict(saved)
    assert torch.equal(other.state[adapter]["exp_avg"], optimizer.state[adapter]["exp_avg"])


def test_state_and_groups_that_users_exchange() -> None:
    """State cleared, replaced by copies (as offloading does), groups reordered: as torch's AdamW takes it."""
    dtype = torch.float64
    theirs = Network(dtype)
    ours = copy.deepcopy(theirs)
    beside, inside = (RankAllocator(m, **SETTINGS) for m in (theirs, ours))
    adamw = torch.optim.AdamW(groups(theirs), lr=5e-3)
    beside.attach(adamw)
    swept = AdaLoraAdamW(groups(ours), lr=5e-3, allocator=inside)
    for step in range(12):
        for model, optimizer in ((theirs, adamw), (ours, swept)):
            backward(model, step, dtype)
            optimizer.step()
            if step == 3:
                optimizer.state.clear()
            elif step == 6:
                for state in optimizer.state.values():
                    state.update({name: value.clone() for name, value in state.items()})
            elif step == 9:
                optimizer.param_groups.reverse()
    for name, value in parts(ours).items():
        torch.testing.assert_close(value, parts(theirs)[name], rtol=1e-9, atol=1e-12)


def test_a_parameter_without_dimensions_beside_the_adapters() -> None:
    model = Network(torch.float32)
    model.scale = nn.Parameter(torch.tensor(2.0))
    allocator = RankAllocator(model, **SETTINGS)
    optimizer = AdaLoraAdamW([p for p in model.parameters() if p.requires_grad], allocator=allocator, max_grad_norm=0.1)
    (model(torch.ones(2, 24)) * model.scale).square().mean().backward()
    optimizer.step()
    assert model.scale.item() != 2.0 and allocator.next_step == 1


@pytest.mark.parametrize("variant", ["original", "peft", "paper"])
def test_an_overflow_in_the_final_phase_leaves_no_triplet_above_the_budget(variant: str) -> None:
    """No gradient counts there, and peft makes its last pattern at the one step T - t_f."""
    model = Network(torch.float32)
    allocator = RankAllocator(model, **{**SETTINGS, "variant": variant, "mask_interval": 50})
    optimizer = AdaLoraAdamW(groups(model), allocator=allocator)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for step in range(30):
        backward(model, step, torch.float32, torch.inf if step in (28, 29) else scaler.get_scale())
        scaler.scale(torch.ones(()))
        scaler.step(optimizer)
        scaler.update()
    budget, _ = allocator.update_and_mask(model, 29)
    assert budget == 4 and sum(allocator.live_ranks().values()) == 4
    assert sum(int(t.lora_E.count_nonzero()) for t in allocator.triplets) == 4


def test_refuses() -> None:
    model = Network(torch.float32)
    allocator = RankAllocator(model, **SETTINGS)
    for option in ("amsgrad", "maximize", "capturable", "differentiable"):
        with pytest.raises(ValueError, match=f"{option}: expected False"):
            AdaLoraAdamW(groups(model), allocator=allocator, **{option: True})
    for norm in (0.0, "1"):
        with pytest.raises(ValueError, match="max_grad_norm: expected a positive number"):
            AdaLoraAdamW(groups(model), allocator=allocator, max_grad_norm=norm)
    with pytest.raises(ValueError, match="allocator: expected a RankAllocator"):
        AdaLoraAdamW(groups(model), allocator=None)  # type: ignore[arg-type]
    some = AdaLoraAdamW([model.body[0].lora_A, model.body[0].lora_B], allocator=allocator)
    backward(model, 0, torch.float32)
    with pytest.raises(ValueError, match="params: expected all adapters of the allocator"):
        some.step()
    optimizer = AdaLoraAdamW(groups(model), allocator=allocator)
    with pytest.raises(ValueError, match="optimizer: expected one without an allocator of its own"):
        allocator.attach(optimizer)
    with pytest.raises(TypeError, match=r"make a new one and load state_dict\(\)"):
        copy.deepcopy(optimizer)
    model.zero_grad()
    before = {n: v.clone() for n, v in parts(model).items()}
    with pytest.raises(ValueError, match=r"expected gradients of the adapters.*after backward\(\)"):
        optimizer.step()
    assert all(torch.equal(v, before[n]) for n, v in parts(model).items()) and allocator.next_step == 0


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    """A moment of one row would be broadcast to all of them."""
    model = Network(torch.float32)
    allocator = RankAllocator(model, **SETTINGS)
    optimizer = AdaLoraAdamW(groups(model), allocator=allocator)
    backward(model, 0, torch.float32)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())

    def moment(value: Tensor) -> dict[str, Any]:
        state = copy.deepcopy(before)
        state["state"][0]["exp_avg"] = value
        return state

    strange = torch.optim.SGD(groups(model), lr=0.1).state_dict()
    for state, message in (
        (moment(torch.ones(1, 24)), r"expected 'exp_avg' of parameter 0 as \[6, 24\], got \[1, 24\]"),
        (moment(torch.ones(3, 7)), r"expected 'exp_avg' of parameter 0 as \[6, 24\], got \[3, 7\]"),
        (strange, "expected that of an AdamW, found no 'betas'|found no 'eps'"),
        ({"state": {}}, r"expected what state_dict\(\) returned"),
        (None, r"expected what state_dict\(\) returned, got None"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(state)
    for i, saved in before["state"].items():
        assert all(torch.equal(value, saved[name]) for name, value in optimizer.state_dict()["state"][i].items())
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]
    backward(model, 1, torch.float32)
    optimizer.step()
    assert allocator.next_step == 2


def test_default_device() -> None:
    """Where new tensors lie by default is of no account."""
    ours = Network(torch.float32)
    same = copy.deepcopy(ours)
    optimizers = [
        AdaLoraAdamW(groups(m), lr=5e-3, allocator=RankAllocator(m, **SETTINGS), max_grad_norm=0.5)
        for m in (ours, same)
    ]
    for step in range(12):
        backward(ours, step, torch.float32)
        backward(same, step, torch.float32)
        with torch.device("meta"):
            optimizers[0].step()
        optimizers[1].step()
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), same.parameters(), strict=True))
