"""Layers shrunk to their live rank: the same outputs, the same training, and what it refuses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adalora_kernels import RankAllocator, explain
from adalora_kernels.testing.tolerances import assert_within_budget
from tests.allocator.test_allocator import SETTINGS, adam, assert_unchanged, batch, network, snapshot

END = 30


def settled(
    dtype: torch.dtype = torch.float32, variant: str = "original", optimizer: Any = adam, steps: int = END + 5
) -> tuple[nn.Sequential, RankAllocator, torch.optim.Optimizer]:
    """Trained into the final phase without an orthogonality term, in which dead rows count."""
    model = network(dtype)
    allocator = RankAllocator(
        model, **(SETTINGS | {"target_rank": 1, "final_warmup": 20, "total_step": END + 20}), variant=variant
    )
    optimizer = optimizer(model)
    allocator.attach(optimizer)
    train(model, optimizer, range(steps))
    return model, allocator, optimizer


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> Tensor:
    for step in steps:
        x, target = batch(step, next(model.parameters()).dtype)
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
    return loss.detach()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2, momentum=0.9)


def adamax(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adamax([p for p in model.parameters() if p.requires_grad], lr=1e-3)


@pytest.mark.parametrize("variant", ("original", "peft", "paper"))
def test_outputs_and_gradients_stay_within_the_error_budget(variant: str) -> None:
    model, allocator, _ = settled(variant=variant)
    x, _ = batch(0, torch.float32)
    pattern = allocator.get_rank_pattern()
    exact, before = copy.deepcopy(model).double(), copy.deepcopy(model)
    ranks = allocator.compact()
    assert sum(ranks.values()) == 4 and 0 in ranks.values()
    outputs = [m(x.to(next(m.parameters()).dtype)) for m in (model, before, exact)]
    assert_within_budget("output", *outputs)
    for m, y in zip((model, before, exact), outputs, strict=True):
        m.zero_grad()
        y.square().sum().backward()
    for t in allocator.triplets:
        rows = torch.tensor(pattern[t.parameter_names[1]])
        if not rows.any():
            continue
        for kind in ("lora_A", "lora_E", "lora_B"):
            grads = [m.get_submodule(t.name).get_parameter(kind).grad for m in (model, before, exact)]
            keep = (slice(None), rows) if kind == "lora_B" else rows
            assert_within_budget(kind, grads[0], grads[1][keep], grads[2][keep])


@pytest.mark.parametrize("optimizer", (adam, sgd, adamax))
@pytest.mark.parametrize("variant", ("original", "peft", "paper"))
def test_training_goes_on_as_it_would_have(variant: str, optimizer: Any) -> None:
    """fp64, no orthogonality term and no clipping, in both of which dead rows count."""
    model, allocator, its_optimizer = settled(torch.float64, variant, optimizer)
    other, uncompacted, other_optimizer = settled(torch.float64, variant, optimizer)
    parameters = [p for t in allocator.triplets for p in t.parameters]
    ranks = allocator.compact()
    assert all(p is q for t, q in zip(allocator.triplets, parameters[::3], strict=True) for p in t.parameters[:1])
    losses = [train(m, o, range(END + 5, END + 40)) for m, o in ((model, its_optimizer), (other, other_optimizer))]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-11, atol=0)
    assert allocator.live_ranks() == uncompacted.live_ranks() == ranks
    assert allocator.get_rank_pattern() == uncompacted.get_rank_pattern()
    for mine, theirs in zip(allocator.triplets, uncompacted.triplets, strict=True):
        rows = torch.tensor(uncompacted.get_rank_pattern()[theirs.parameter_names[1]])
        torch.testing.assert_close(mine.lora_A.detach(), theirs.lora_A.detach()[rows], rtol=1e-9, atol=1e-12)


def test_layer_without_rank_is_the_frozen_linear() -> None:
    model, allocator, optimizer = settled()
    ranks = allocator.compact()
    name = next(name for name, rank in ranks.items() if rank == 0)
    layer = model.get_submodule(name)
    x = torch.randn(3, layer.in_features)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert not any(p.requires_grad for p in (layer.lora_A, layer.lora_E, layer.lora_B))
    assert f"{name}" in str(explain(model)) and layer.ranknum.item() in (5.0, 6.0, 8.0)
    train(model, optimizer, range(END + 5, END + 10))
    assert RankAllocator(model, **SETTINGS, total_step=200).triplets == allocator.triplets


def test_a_graph_that_is_still_alive_does_no_harm() -> None:
    model, allocator, optimizer = settled()
    x, _ = batch(0, torch.float32)
    alive = model(x).square().mean()
    alive.backward(retain_graph=True)
    allocator.compact(optimizer)
    assert all(p.grad is None or p.grad.shape == p.shape for p in model.parameters())
    optimizer.step()
    train(model, optimizer, range(1))
    assert alive.isfinite()


def test_once_is_enough() -> None:
    model, allocator, _ = settled()
    ranks, pattern = allocator.compact(), allocator.get_rank_pattern()
    before = snapshot(model, allocator)
    assert allocator.compact() == ranks and allocator.get_rank_pattern() == pattern
    assert_unchanged(before, model, allocator)
    assert [len(row) for row in pattern.values()] == [6, 5, 8, 6]


class TestRefused:
    def check(self, message: str, allocator: RankAllocator, *args: Any, **kwargs: Any) -> None:
        before = snapshot(allocator.model, allocator)
        with pytest.raises(ValueError, match=message):
            allocator.compact(*args, **kwargs)
        assert_unchanged(before, allocator.model, allocator)
        assert allocator.kept is None

    def test_before_the_final_phase(self) -> None:
        _, allocator, _ = settled(steps=END)
        self.check(
            r"^step: expected the final phase, that is, a ranking at or after step 30; got to step 29", allocator
        )

    def test_captured(self) -> None:
        _, allocator, _ = settled()
        allocator.captured = True
        self.check(r"^model: expected compact\(\) before steps are captured", allocator)

    def test_another_optimizer(self) -> None:
        _, allocator, _ = settled()
        self.check(r"^optimizer: expected the one that trains the adapters", allocator, adam(network()))

    def test_state_of_another_shape(self) -> None:
        model, allocator, _ = settled()
        factored = torch.optim.Adafactor([p for p in model.parameters() if p.requires_grad])
        train(model, factored, range(1))
        self.check(r"^optimizer: expected state of the parameters' shapes, but 'row_var' of 0", allocator, factored)

    def test_hooks_and_partitions(self) -> None:
        model, allocator, _ = settled()
        handle = model[0].lora_A.register_post_accumulate_grad_hook(lambda p: None)
        self.check(r"^model: expected parameters without hooks, but 0\.lora_A has some", allocator)
        handle.remove()
        model[2].lora_E.ds_id = 3
        self.check(r"^model: expected plain parameters, but 2\.lora_E is sharded or partitioned", allocator)

    def test_wrapped(self, tmp_path: Path) -> None:
        from torch.distributed import destroy_process_group, init_process_group
        from torch.distributed.fsdp import fully_shard

        model, allocator, _ = settled()
        sharded, of_sharded, _ = settled()
        init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            wrapper = nn.parallel.DistributedDataParallel(model)
            self.check(r"^model: expected no DistributedDataParallel around it", allocator)
            del wrapper
            mesh = torch.distributed.init_device_mesh("cpu", (1,))
            fully_shard(sharded, mesh=mesh)
            with pytest.raises(ValueError, match=r"^model: expected plain parameters, but 0\.lora_A is sharded"):
                of_sharded.compact()
        finally:
            destroy_process_group()

    def test_an_optimizer_that_was_not_given_fails_at_its_next_step(self) -> None:
        model, allocator, optimizer = settled()
        assert allocator.attached
        allocator.attach(optimizer).detach()
        allocator.compact()
        with pytest.raises(RuntimeError):
            train(model, optimizer, range(1))

    def test_the_state_of_another_model(self) -> None:
        _, allocator, _ = settled()
        other = RankAllocator(network()[:3], **SETTINGS, total_step=100)
        allocator.compact()
        with pytest.raises(ValueError, match=r"^like: expected the state of a model that had this one's layers"):
            other.compact(like=allocator.state_dict())


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("variant", ("original", "peft"))
def test_not_before_the_end_of_a_schedule_that_was_prolonged(variant: str, capturable: bool) -> None:
    """As for a training that is resumed for more steps: what was final is pruned further."""
    model = network()
    settings = SETTINGS | {"target_rank": 2, "final_warmup": 20, "total_step": END + 20}
    allocator = RankAllocator(model, **settings, variant=variant, capturable=capturable)
    optimizer = adam(model)
    allocator.attach(optimizer)
    train(model, optimizer, range(END + 2))
    assert allocator.state_dict()["settled"]
    allocator.set_total_step(END + 40)
    allocator.target_rank = 3  # of all three layers
    train(model, optimizer, range(END + 2, END + 10))
    with pytest.raises(ValueError, match=f"expected the final phase, that is, a ranking at or after step {END + 20}"):
        allocator.compact()
    train(model, optimizer, range(END + 10, END + 23))
    assert sum(allocator.compact().values()) == 3


@pytest.mark.parametrize("capturable", [False, True])
def test_not_after_a_step_that_has_masked_nothing(capturable: bool) -> None:
    """Prolonged by one step, the schedule has T - t_f where it doesn't rank, and E is free to leave 0 there."""
    model = network()
    settings = SETTINGS | {"target_rank": 2, "final_warmup": 20, "total_step": END + 20}
    allocator = RankAllocator(model, **settings, capturable=capturable)
    optimizer = adam(model)
    allocator.attach(optimizer)
    train(model, optimizer, range(END + 1))
    allocator.set_total_step(END + 21)
    train(model, optimizer, range(END + 1, END + 2))
    with pytest.raises(ValueError, match=f"expected the final phase, that is, a ranking at or after step {END + 1}"):
        allocator.compact()
    train(model, optimizer, range(END + 2, END + 3))
    assert sum(allocator.compact().values()) == 8
