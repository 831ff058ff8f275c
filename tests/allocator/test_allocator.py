"""RankAllocator against the original's algorithm: in lockstep in fp32, free-running in fp64; and its edges."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adalora_kernels import RankAllocator, SVDLinear, compute_orth_regu
from adalora_kernels.allocator import Triplet, find_triplets
from adalora_kernels.testing.original import OriginalAllocator

BACKENDS = ("reference", "native")
SETTINGS: dict[str, Any] = {"lora_r": 6, "target_rank": 2, "init_warmup": 15, "final_warmup": 60, "mask_interval": 5,
                            "beta1": 0.85, "beta2": 0.85}  # fmt: skip


def network(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for k, n, r in ((24, 40, 6), (40, 33, 5), (33, 40, 8), (40, 10, 6)):
        layers += [SVDLinear(k, n, r=r, lora_alpha=8, dtype=dtype), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def batch(step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(16, 24, generator=generator, dtype=torch.float64)
    target = torch.sin(x[:, :10] * 2) + 0.3 * x[:, 10:20]
    return x.to(dtype), target.to(dtype)


def loss_of(model: nn.Module, step: int, dtype: torch.dtype) -> Tensor:
    x, target = batch(step, dtype)
    return (model(x) - target).square().mean() + compute_orth_regu(model, 0.1)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)


def keyed(t: Triplet) -> list[tuple[tuple[str, str], nn.Parameter]]:
    return [((t.name, kind), p) for kind, p in zip("AEB", t.parameters, strict=True)]


def copies(model: nn.Module, grads: bool = False) -> dict[tuple[str, str], Tensor]:
    return {
        key: (p.grad if grads else p).detach().clone()  # type: ignore[union-attr]
        for t in find_triplets(model)
        for key, p in keyed(t)
    }


def averages(allocator: RankAllocator) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
    layout = allocator.importance.layout
    average, uncertainty = allocator.importance.current()
    keys = [(t.name, kind) for t in allocator.triplets for kind in "AEB"]
    spans = [slice(*pair) for pair in pairwise(layout.offsets)]
    return {key: (average[span], uncertainty[span]) for key, span in zip(keys, spans, strict=True)}


def oracle_of(model: nn.Module, total_step: int) -> OriginalAllocator:
    names = [t.name for t in find_triplets(model)]
    return OriginalAllocator(names, 15, 60, 5, total_step, 2 * len(names))


@pytest.mark.parametrize("backend", BACKENDS)
def test_lockstep_with_the_original_fp32(backend: str, record_property: Any) -> None:
    """One training of 200 steps; at every step the oracle gets copies of the same parameters and gradients."""
    total_step, ties, ranked = 200, 0, 0
    model = network()
    allocator = RankAllocator(model, **SETTINGS, total_step=total_step, backend=backend)
    oracle, optimizer = oracle_of(model, total_step), adam(model)
    for step in range(total_step):
        loss_of(model, step, torch.float32).backward()
        optimizer.step()
        params, grads = copies(model), copies(model, grads=True)
        budget, threshold = allocator.update_and_mask(model, step)
        want_budget, want_threshold, want_live = oracle.step(step, params, grads)
        assert budget == want_budget and (threshold is None) == (want_threshold is None)
        for key, (average, uncertainty) in averages(allocator).items():
            torch.testing.assert_close(average, oracle.average[key].reshape(-1), rtol=2e-6, atol=1e-30)
            torch.testing.assert_close(uncertainty, oracle.uncertainty[key].reshape(-1), rtol=2e-6, atol=1e-12)
        if threshold is not None and want_threshold is not None:
            ranked += 1
            torch.testing.assert_close(threshold.item(), want_threshold, rtol=1e-5, atol=0)
            live = torch.tensor([flag for row in allocator.get_rank_pattern().values() for flag in row])
            differs = live != torch.cat([want_live[n] for n in oracle.names])
            near = (allocator.importance.scores / want_threshold - 1).abs() < 1e-5
            assert not (differs & ~near).any(), f"step {step}"
            ties += int(differs.sum())
            assert int(live.sum()) <= budget
            for t in allocator.triplets:
                if not differs.any():
                    assert torch.equal(t.lora_E, params[t.name, "E"])
        optimizer.zero_grad()
    record_property("measured", f"{ranked} rankings, {ties} triplets differ, each within 1e-5 of its threshold")
    assert ranked == (140 - 15) // 5 + 59
    assert sum(allocator.live_ranks().values()) == 8


@pytest.mark.parametrize("variant", ("original", "paper"))
@pytest.mark.parametrize("backend", BACKENDS)
def test_free_running_fp64(backend: str, variant: str) -> None:
    """Two trainings of 300 steps, ours and the oracle's, in fp64: identical masks at every step."""
    total_step = 300
    ours, theirs = network(torch.float64), network(torch.float64)
    allocator = RankAllocator(ours, **SETTINGS, total_step=total_step, backend=backend, variant=variant)
    assert allocator.importance.averages.dtype == torch.float64
    oracle = oracle_of(theirs, total_step)
    optimizers = adam(ours), adam(theirs)
    for step in range(total_step):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            loss_of(model, step, torch.float64).backward()
            if allocator.pre_step and model is ours:
                allocator.update_importance(ours, step)
            before = copies(theirs)
            optimizer.step()
        allocator.update_and_mask(ours, step)
        shared = {key: p.detach() for t in find_triplets(theirs) for key, p in keyed(t)}
        oracle.step(step, shared, copies(theirs, grads=True), before if allocator.pre_step else None)
        for a, b in zip(find_triplets(ours), find_triplets(theirs), strict=True):
            assert torch.equal(a.lora_E == 0, b.lora_E == 0), f"step {step}, {a.name}"
    torch.testing.assert_close(loss_of(ours, 0, torch.float64), loss_of(theirs, 0, torch.float64), rtol=1e-9, atol=0)


def trained(steps: int = 3, **settings: Any) -> tuple[nn.Sequential, RankAllocator]:
    model = network()
    allocator = RankAllocator(model, **(SETTINGS | {"total_step": 200} | settings))
    optimizer = adam(model)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, step, torch.float32).backward()
        optimizer.step()
        allocator.update_and_mask(model, step)
    return model, allocator


def snapshot(model: nn.Module, allocator: RankAllocator) -> list[Tensor]:
    state = allocator.importance
    return [p.detach().clone() for p in model.parameters()] + [
        t.clone() for t in (*state.current(), state.scores, state.live)
    ]


def assert_unchanged(before: list[Tensor], model: nn.Module, allocator: RankAllocator) -> None:
    for a, b in zip(before, snapshot(model, allocator), strict=True):
        assert torch.equal(a, b)


class TestEdges:
    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("bad", (float("nan"), float("inf")))
    def test_overflow_step_leaves_no_trace(self, backend: str, bad: float) -> None:
        model, allocator = trained(31, backend=backend)
        loss_of(model, 31, torch.float32).backward()
        model[-1].lora_B.grad.view(-1)[-1] = bad
        before = snapshot(model, allocator)
        allocator.update_and_mask(model, 35)
        assert_unchanged(before, model, allocator)
        model.zero_grad()
        loss_of(model, 32, torch.float32).backward()
        _, threshold = allocator.update_and_mask(model, 40)
        assert threshold is not None and threshold.isfinite() and 0 < sum(allocator.live_ranks().values()) < 25

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_parameter_without_a_gradient_keeps_its_averages(self, backend: str) -> None:
        model, allocator = trained(5, backend=backend)
        before = averages(allocator)
        model.zero_grad()
        loss_of(model, 5, torch.float32).backward()
        model[0].lora_A.grad = None
        allocator.update_and_mask(model, 5)
        after = averages(allocator)
        assert torch.equal(before["0", "A"][0], after["0", "A"][0])
        assert not torch.equal(before["0", "B"][0], after["0", "B"][0])

    def test_target_above_initial_rank_is_nothing_to_prune(self) -> None:
        model, allocator = trained(80, target_rank=50, init_warmup=5, final_warmup=20, total_step=60)
        assert all(allocator.live_ranks()[t.name] == t.lora_A.shape[0] for t in allocator.triplets)
        assert all((t.lora_E != 0).all() for t in find_triplets(model))

    def test_update_before_backward(self) -> None:
        model = network()
        allocator = RankAllocator(model, **SETTINGS, total_step=200)
        before = snapshot(model, allocator)
        with pytest.raises(ValueError, match=r"^model: expected gradients, found none; call update_and_mask after"):
            allocator.update_and_mask(model, 0)
        assert_unchanged(before, model, allocator)

    def test_model_without_adalora_layers(self) -> None:
        with pytest.raises(ValueError, match=r"^model: expected layers with lora_A, lora_E and lora_B, found none"):
            RankAllocator(nn.Linear(3, 4), **SETTINGS)
        with pytest.raises(ValueError, match=r"^model: expected layers"):
            compute_orth_regu(nn.Linear(3, 4))

    @pytest.mark.parametrize(
        ("name", "value"),
        (("beta1", 0.0), ("beta2", 1.0), ("lora_r", -1), ("target_rank", -1), ("init_warmup", -1),
         ("final_warmup", -2), ("tb_writter_loginterval", 0), ("mask_interval", 0), ("total_step", 75),
         ("variant", "papper"), ("metric", "ipd"), ("reduction", "median"), ("lora_r", "4"), ("target_rank", "2"),
         ("init_warmup", "2"), ("final_warmup", None), ("mask_interval", 1.5), ("beta1", "x"), ("beta2", torch.nan),
         ("total_step", "90"), ("total_step", 90.5), ("target_rank", 1.1), ("adapter", 3), ("tb_writter", 3),
         ("tb_writter_loginterval", "x"), ("backend", 3)),
    )  # fmt: skip
    def test_bad_settings(self, name: str, value: Any) -> None:
        with pytest.raises((TypeError, ValueError), match=f"^{name}: expected"):
            RankAllocator(network(), **(SETTINGS | {name: value}))

    def test_total_step_comes_later(self) -> None:
        allocator = RankAllocator(network(), **SETTINGS)
        with pytest.raises(ValueError, match=r"^total_step: expected the number of optimizer steps, got None"):
            allocator.update_and_mask(allocator.model, 0)
        with pytest.raises(ValueError, match=r"^total_step: expected more than"):
            allocator.set_total_step(75)
        assert allocator.total_step is None
        allocator.set_total_step(76)
        assert allocator.schedule.total_step == 76

    def test_settings_that_are_whole_in_another_kind(self) -> None:
        """As shares of T come out."""
        settings = SETTINGS | {"lora_r": 4.0, "init_warmup": 0.1 * 101, "mask_interval": 5.0, "total_step": 101.0}
        schedule = RankAllocator(network(), **settings, variant="peft").schedule
        assert (schedule.total_step, schedule.budget(10), schedule.budget(101)) == (101, 4 * 4, 4 * 2)
        assert all(type(schedule.budget(step)) is int for step in range(102))

    def test_negative_step(self) -> None:
        model, allocator = trained(1)
        with pytest.raises(ValueError, match=r"^step: expected at least 0"):
            allocator.update_and_mask(model, -1)

    def test_steps_are_integers_of_any_kind(self) -> None:
        model, allocator = trained(1)
        for step in ("3", 2.5):
            with pytest.raises(TypeError, match=r"^step: expected an integer, the optimizer step counted from 0, got"):
                allocator.update_and_mask(model, step)
        loss_of(model, 1, torch.float32).backward()
        allocator.update_and_mask(model, torch.tensor(3))
        assert type(allocator.global_step) is int and allocator.next_step == 4

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_gradient_whose_importance_overflows_leaves_no_trace(self, backend: str) -> None:
        model, allocator = trained(31, backend=backend)
        loss_of(model, 31, torch.float32).backward()
        model[0].lora_A.grad[0] = 3e38
        before = snapshot(model, allocator)
        allocator.update_and_mask(model, 35)
        assert_unchanged(before, model, allocator)

    def test_layer_frozen_in_mid_training_is_not_pruned_in_silence(self) -> None:
        model, allocator = trained(31)
        model.zero_grad()
        model[2].requires_grad_(False)
        loss_of(model, 31, torch.float32).backward()
        before = snapshot(model, allocator)
        with pytest.raises(ValueError, match=r"^model: expected every adapted layer to train, but 2\.lora_E is frozen"):
            allocator.update_and_mask(model, 35)
        assert_unchanged(before, model, allocator)
        assert [t.name for t in RankAllocator(model, **SETTINGS, total_step=200).triplets] == ["0", "4", "6"]

    def test_failed_update_of_another_model_leaves_the_first_bound(self) -> None:
        model, allocator = trained(3)
        other = copy.deepcopy(model)
        other.zero_grad()
        for step in (-1, 3):
            with pytest.raises(ValueError, match=r"^(step|model): expected"):
                allocator.update_and_mask(other, step)
            assert allocator.model is model and allocator.triplets[0].lora_A is model[0].lora_A

    def test_backend_that_cannot_run_is_refused_at_once(self) -> None:
        with pytest.raises(RuntimeError, match="backend 'triton' can't run importance"):
            RankAllocator(network(), **SETTINGS, backend="triton")

    def test_layer_of_rank_zero(self) -> None:
        model = nn.Sequential(SVDLinear(8, 6, r=4), nn.Tanh(), SVDLinear(6, 3, r=0))
        allocator = RankAllocator(model, **(SETTINGS | {"target_rank": 2, "total_step": 100}))
        assert [t.name for t in allocator.triplets] == ["0"]
        model(torch.randn(5, 8)).sum().backward()
        allocator.update_and_mask(model, 20)
        assert sum(allocator.live_ranks().values()) <= 4

    def test_pruned_triplet_can_come_back(self) -> None:
        """E is free between masking steps: no mask is kept in the forward."""
        model, _ = trained(41)
        pruned = [t.lora_E == 0 for t in find_triplets(model)]
        assert any(p.any() for p in pruned)
        model.zero_grad()
        loss_of(model, 41, torch.float32).backward()
        for t, dead in zip(find_triplets(model), pruned, strict=True):
            assert t.lora_E.grad is not None and (t.lora_E.grad[dead] != 0).all()

    def test_another_copy_of_the_model(self) -> None:
        model, allocator = trained(31)
        other = copy.deepcopy(model)
        other.zero_grad()
        loss_of(other, 31, torch.float32).backward()
        allocator.update_and_mask(other, 35)
        assert allocator.model is other
        with pytest.raises(ValueError, match=r"^model: expected the layers that this allocator was made for"):
            allocator.update_and_mask(nn.Sequential(SVDLinear(8, 6, r=4)), 36)
        assert allocator.model is other

    def test_wrapped_model_shares_its_parameters(self) -> None:
        model, allocator = trained(3)
        wrapped = nn.ModuleDict({"module": model})
        model.zero_grad()
        loss_of(model, 3, torch.float32).backward()
        allocator.update_and_mask(wrapped, 3)
        assert allocator.triplets[0].name == "module.0"
        assert allocator.triplets[0].lora_A is model[0].lora_A

    def test_tied_layer_counts_once(self) -> None:
        layer = SVDLinear(8, 8, r=4)
        assert len(find_triplets(nn.Sequential(layer, layer))) == 1


def test_state_of_other_layers_is_refused() -> None:
    _, allocator = trained(3)
    other = RankAllocator(nn.Sequential(SVDLinear(8, 6, r=4)), **SETTINGS)
    with pytest.raises(ValueError, match=r"^state: expected the layers"):
        other.load_state_dict(allocator.state_dict())
    peft = RankAllocator(allocator.model, **SETTINGS, variant="peft")
    with pytest.raises(ValueError, match=r"^state: expected variant 'peft', got 'original'"):
        peft.load_state_dict(allocator.state_dict())
    magnitude = RankAllocator(allocator.model, **SETTINGS, metric="mag")
    with pytest.raises(ValueError, match=r"^state: expected metric 'mag', got 'ipt'"):
        magnitude.load_state_dict(allocator.state_dict())


@pytest.mark.parametrize(
    ("name", "value"),
    (
        ("live", torch.tensor([False])),
        ("live", torch.full((25,), torch.nan)),
        ("scores", torch.zeros(3)),
        ("uncertainty", torch.zeros(3)),
        ("average", None),
        ("average", "nan"),
        ("updates", "x"),
        ("settled", 1),
        ("global_step", None),
        ("next_step", 1.0),
        ("kept", [[True]]),
        ("shapes", []),
        ("live", "missing"),
        ("variant", "missing"),
    ),
)
def test_corrupt_state_changes_nothing(name: str, value: Any) -> None:
    model, allocator = trained(31)
    state = allocator.state_dict()
    if value == "missing":
        del state[name]
    elif value == "nan":
        state[name][3] = torch.nan
    else:
        state[name] = value
    before, step = snapshot(model, allocator), allocator.global_step
    with pytest.raises(ValueError, match=r"^state"):
        allocator.load_state_dict(state)
    assert_unchanged(before, model, allocator)
    assert allocator.global_step == step
    with pytest.raises(ValueError, match=r"^state: expected what state_dict\(\) returned"):
        allocator.load_state_dict({})


def test_tensorboard_scalars_have_the_original_names() -> None:
    class Writer:
        def __init__(self) -> None:
            self.seen: dict[str, float] = {}

        def add_scalar(self, name: str, value: float, step: int) -> None:
            self.seen[name] = float(value)

    writer = Writer()
    _, allocator = trained(21, tb_writter=writer, tb_writter_loginterval=20)
    budget = {f"Budget/{name}" for name in ("total_rank", "mask_threshold", "sum_param")}
    assert budget | {"Ranknum/0.lora_E", "Orth_regu_loss/0.lora_A", "Orth_regu_loss/6.lora_B"} <= set(writer.seen)
    assert "train/orth_regu_loss" in writer.seen
    assert writer.seen["Budget/total_rank"] == sum(allocator.live_ranks().values())
