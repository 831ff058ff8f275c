"""Layers on several devices: what they compute equals one device's bit for bit, wherever a checkpoint was made.

There is one device here, so what tells devices apart is exchanged for a mark on each layer's E: layers of one model
then fall in several buckets. That nothing meets what lies elsewhere, and that no step reads a number on the host, is
held with fake tensors, which have devices but no numbers.
"""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from adalora_kernels import AdaLoraAdamW, RankAllocator, explain
from adalora_kernels.allocator import find_triplets, triplets
from adalora_kernels.allocator.devices import SpreadState
from adalora_kernels.allocator.orthogonality import loss_of_devices
from tests.allocator.test_adamw import SETTINGS as FEW_STEPS
from tests.allocator.test_adamw import Network, backward, groups
from tests.allocator.test_allocator import SETTINGS, adam, loss_of, network

STEPS, END = 60, 40
OVERFLOWS = {8: (0, torch.inf), 17: (1, torch.nan), 25: (2, 3e38), 30: (3, -torch.inf)}
CASES: list[dict[str, Any]] = [{"variant": "original"}, {"variant": "peft", "backend": "reference"}]
CASES += [{"variant": "paper", "reduction": "sum"}, {"metric": "mag"}]


@pytest.fixture
def marks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers lie where their E is marked to."""
    monkeypatch.setattr(triplets, "place_of", lambda E: getattr(E, "mark", 0))


def spread(model: nn.Module, places: int) -> None:
    """Put the layers on so many devices, in turn."""
    for i, t in enumerate(find_triplets(model)):
        t.lora_E.mark = i % places  # type: ignore[attr-defined]


class Run:
    """One training of four layers on so many devices: where it has got to, and what every step has left."""

    def __init__(self, case: dict[str, Any], places: int, seed: int = 0) -> None:
        self.model = network(seed=seed)
        spread(self.model, places)
        self.allocator = RankAllocator(
            self.model, **(SETTINGS | {"final_warmup": STEPS - END, "total_step": STEPS} | case)
        )
        self.optimizer = adam(self.model)
        assert isinstance(self.allocator.importance, SpreadState) == (places > 1)
        self.trace: list[list[Tensor]] = []

    def train(self, steps: range) -> None:
        """With gradients missing of a matrix, of a whole device; and with overflows, which skip the step."""
        for step in steps:
            self.optimizer.zero_grad()
            loss_of(self.model, step, torch.float32).backward()
            layers = find_triplets(self.model)
            for p in layers[1].parameters if step % 11 == 5 else layers[1].parameters[2:] if step % 7 == 3 else ():
                p.grad = None
            overflow = step in OVERFLOWS
            if overflow:
                layer, value = OVERFLOWS[step]
                layers[layer].lora_A.grad[-1, -1] = value  # type: ignore[index]
                before = self.state()
            if self.allocator.pre_step:
                self.allocator.update_importance(self.model, step)
            if not overflow:
                self.optimizer.step()
            self.allocator.update_and_mask(self.model, step)
            if overflow:
                assert all(map(torch.equal, before, self.state())), step
            threshold = self.allocator.importance.threshold
            self.trace.append([*self.state(), torch.zeros(()) if threshold is None else threshold.clone()])

    def state(self) -> list[Tensor]:
        """Averages, scores, pattern and parameters."""
        importance = self.allocator.importance
        params = [p.detach().clone() for p in self.model.parameters()]
        return [*importance.current(), importance.scores.clone(), importance.live.clone(), *params]

    def continued(self, case: dict[str, Any], places: int) -> Run:
        """Another process's, from this one's checkpoint."""
        other, file = Run(case, places, seed=9), io.BytesIO()
        torch.save([owner.state_dict() for owner in (self.model, self.optimizer, self.allocator)], file)
        file.seek(0)
        owners = (other.model, other.optimizer, other.allocator)
        for owner, state in zip(owners, torch.load(file, weights_only=True), strict=True):
            owner.load_state_dict(state)
        other.trace = self.trace
        return other


def assert_same(one: list[list[Tensor]], other: list[list[Tensor]]) -> None:
    assert len(one) == len(other) == STEPS
    for step, (left, right) in enumerate(zip(one, other, strict=True)):
        assert all(map(torch.equal, left, right)), step


@pytest.mark.usefixtures("marks")
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case.values()))
def test_several_devices_equal_one(case: dict[str, Any]) -> None:
    """Free-running for the whole schedule; and stopped in the middle, after an overflow, on other devices each time."""
    one, three, moved = Run(case, 1), Run(case, 3), Run(case, 2)
    for run in (one, three):
        run.train(range(STEPS))
    for start, stop, places in ((0, 18, 1), (18, 43, 3), (43, STEPS, 1)):
        moved.train(range(start, stop))
        moved = moved.continued(case, places) if stop < STEPS else moved
    assert_same(one.trace, three.trace)
    assert_same(one.trace, moved.trace)
    ranks = one.allocator.live_ranks()
    assert ranks == three.allocator.live_ranks() and 0 < sum(ranks.values()) <= 8
    shrunk = one.allocator.compact(one.optimizer)
    assert shrunk == three.allocator.compact(three.optimizer) == ranks
    assert len(set(map(len, three.allocator.importance.pattern()))) > 1  # of unlike ranks
    for run in (one, three):
        run.train(range(STEPS, STEPS + 3))
    assert all(map(torch.equal, one.state(), three.state()))


@pytest.mark.usefixtures("marks")
@pytest.mark.parametrize("clip", (None, 0.5))
def test_adamw_sweeps_each_device(clip: float | None) -> None:
    """Clipping sums the gradients' squares device by device, which rounds otherwise; without it, bit for bit."""
    runs = []
    for places in (1, 2):
        model = Network(torch.float64)
        spread(model, places)
        allocator = RankAllocator(model, **FEW_STEPS)
        optimizer = AdaLoraAdamW(groups(model), lr=5e-3, allocator=allocator, max_grad_norm=clip)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
        scaler.scale(torch.ones(()))  # makes the scale
        for step in range(40):
            backward(model, step, torch.float64, scale=scaler.get_scale())
            if step in (6, 9):
                model.body[2 * (step == 6)].lora_B.grad[0, 0] = torch.inf
            if step == 20:  # another placement: averages and moments follow
                spread(model, 3 - places)
                allocator.bind(model)
            if step == 35:
                allocator.compact(optimizer)
            scaler.step(optimizer)
            scaler.update()
        assert isinstance(allocator.importance, SpreadState) == (places == 1)
        moments = [optimizer.state[p]["exp_avg"] for p in model.parameters() if p in optimizer.state]
        runs.append([*model.parameters(), *moments, *allocator.importance.current(), allocator.importance.live])
        assert sum(allocator.live_ranks().values()) == 4
    for one, other in zip(*runs, strict=True):
        torch.testing.assert_close(one, other, rtol=0 if clip is None else 1e-12, atol=0)


@pytest.mark.usefixtures("marks")
def test_attached_to_an_optimizer_that_unscales_by_itself() -> None:
    """It says that it skips a step, whatever the adapters' gradients are: no device counts that one."""
    runs = []
    for places in (1, 2):
        model = network()
        spread(model, places)
        allocator = RankAllocator(model, **FEW_STEPS)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=True)
        allocator.attach(optimizer)
        for step in range(20):
            optimizer.zero_grad()
            (loss_of(model, step, torch.float32) * 8).backward()
            found = torch.tensor(float(step in (7, 16)))
            optimizer.found_inf, optimizer.grad_scale = found, torch.tensor(8.0)  # type: ignore[attr-defined]
            before = allocator.importance.scores.clone()
            optimizer.step()
            assert torch.equal(allocator.importance.scores, before) == bool(found), step
        runs.append([*model.parameters(), *allocator.importance.current(), allocator.importance.live])
    assert all(map(torch.equal, *runs)) and not runs[0][-1].all()


@pytest.mark.usefixtures("marks")
def test_a_copy_and_a_later_placement_are_followed() -> None:
    run = Run({}, 1)
    run.train(range(22))
    before, allocator = run.state(), run.allocator
    spread(run.model, 2)
    assert not allocator.importance.lies_beside(allocator.parameters()[1::3])
    allocator.bind(run.model)
    assert isinstance(allocator.importance, SpreadState) and all(map(torch.equal, before, run.state()))
    assert "after the optimizer's step on each of 2 devices" in str(explain(allocator))
    held = allocator.importance
    allocator.bind(run.model)
    assert allocator.importance is held  # nothing has moved
    run.train(range(22, STEPS))
    whole = Run({}, 1)
    whole.train(range(STEPS))
    assert_same(run.trace, whole.trace)


@pytest.mark.usefixtures("marks")
def test_what_needs_one_device_says_so() -> None:
    model = network()
    spread(model, 2)
    with pytest.raises(
        ValueError, match=r"^model: expected its adapters on one device for capturable=True, .* on 0, 1$"
    ):
        RankAllocator(model, **SETTINGS, capturable=True)
    allocator = RankAllocator(model, **SETTINGS, variant="paper", total_step=100)
    with pytest.raises(ValueError, match=r"^model: expected its adapters on one device for fuse_backward\(\), "):
        allocator.fuse_backward()
    spread(model, 1)
    for options in ({"capturable": True}, {"variant": "paper"}):
        allocator = RankAllocator(model, **SETTINGS, **options, total_step=100)
        if not options.get("capturable"):
            allocator.fuse_backward()
        held = allocator.importance
        spread(model, 2)
        with pytest.raises(
            ValueError, match=r"^model: expected its adapters on one device for capturable=True or fuse_"
        ):
            allocator.bind(model)
        assert allocator.importance is held
        spread(model, 1)


def test_a_layer_lies_on_one_device() -> None:
    model = network()
    model[2].lora_B = nn.Parameter(model[2].lora_B.to("meta"))
    with pytest.raises(ValueError, match=r"^model: expected A, E and B of each layer .* those of 2 on cpu, meta; move"):
        RankAllocator(model, **SETTINGS)


@pytest.mark.parametrize(
    "case", [{"variant": "peft"}, {"variant": "paper", "metric": "mag"}], ids=["swept", "attached"]
)
def test_no_operator_reaches_across(case: dict[str, Any]) -> None:
    """One whose operands lie on two devices fails here, and so does a number's way to the host."""
    with FakeTensorMode():
        shapes = {"lora_A": (3, 6), "lora_E": (3, 1), "lora_B": (5, 3)}
        model = nn.ModuleList(
            nn.ParameterDict({name: torch.zeros(shape, device=device) for name, shape in shapes.items()})
            for device in ("cpu:0", "cpu:1", "cpu:0")
        )
        params = [*model.parameters(), nn.Parameter(torch.zeros(3, device="cpu:1"))]
        options = SETTINGS | {"init_warmup": 0, "final_warmup": 1, "mask_interval": 1, "total_step": 3}
        allocator = RankAllocator(model, **options, **case, backend="reference")
        if allocator.pre_step:
            optimizer: Any = torch.optim.SGD(params, foreach=False)
            allocator.attach(optimizer)
        else:
            backend = {"backend": "reference", "foreach": False}
            optimizer = AdaLoraAdamW(params, allocator=allocator, max_grad_norm=1.0, **backend)
        for _ in range(4):
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step()
        first, second = allocator.importance.per_device()
        assert [str(s.averages.device) for s in (first, second)] == ["cpu:0", "cpu:1"]
        assert [s.layout.total_rank for s in (first, second)] == [6, 3]
        importance, lora = allocator.importance, [[layer[name] for layer in model] for name in ("lora_A", "lora_B")]
        assert importance.threshold is not None
        here = [*importance.current(), importance.live, importance.scores, importance.threshold]
        here.append(loss_of_devices(*lora, 0.1, backend="reference"))
        assert {str(t.device) for t in here} == {"cpu:0"}
        with pytest.raises(DataDependentOutputException):
            allocator.live_ranks()
