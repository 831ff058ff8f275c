"""The whole step as one call: everything but the capture itself, with a recorder that runs the step again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adalora_kernels import AdaLoraAdamW, RankAllocator, compute_orth_regu, graphed_step
from adalora_kernels.allocator.graphed import CudaGraph, GraphedStep, record_step
from tests.allocator.test_capturable import END, SETTINGS, STEPS, adapters, assert_same, network, trained


class RunsAgain:
    """A recorder whose replay is the run itself. Like a capture, to record computes nothing."""

    def __init__(self, fails: str = "") -> None:
        self.warm_ups, self.fails = 0, fails

    def obstacle(self, device: torch.device) -> str | None:
        return None

    def warm_up(self, run: Callable[[], Tensor], times: int) -> None:
        for _ in range(times):
            run()
            self.warm_ups += 1

    def record(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        if self.fails:
            run()
            raise RuntimeError(self.fails)
        result = torch.full((), torch.nan, dtype=torch.float64)
        return lambda: (result.copy_(run()), None)[1], result


class Regression(nn.Module):
    """A model that returns its loss, as those of transformers do; with dropout, and a buffer that training writes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network()
        self.norm = nn.BatchNorm1d(6, dtype=torch.float64)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor, labels: Tensor, reduction: str = "mean") -> dict[str, Tensor]:
        assert reduction == "mean"
        return {"loss": (self.norm(self.dropout(self.body(x))) - labels).square().mean()}


def batch(step: int) -> dict[str, Any]:
    x = torch.randn(12, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
    return {"x": x, "labels": torch.sin(2 * x[:, :6]), "reduction": "mean"}


def swept(model: nn.Module, allocator: RankAllocator) -> AdaLoraAdamW:
    return AdaLoraAdamW(trained(model), lr=5e-3, allocator=allocator, max_grad_norm=1.0, capturable=True)


class CapturableSgd(torch.optim.SGD):
    """An optimizer of another kind that says that a graph can hold it; torch's own that do need a GPU."""

    def __init__(self, params: Any, lr: Tensor) -> None:
        super().__init__(params, lr)
        for group in self.param_groups:
            group["capturable"] = True


def sgd(model: nn.Module, allocator: RankAllocator) -> torch.optim.Optimizer:
    optimizer = CapturableSgd(trained(model), torch.tensor(0.05, dtype=torch.float64))
    for p in trained(model):
        optimizer.state[p]["seen"] = torch.zeros(1)  # as if it had made a step
    return optimizer


def made(make: Any = swept, **settings: Any) -> tuple[Regression, torch.optim.Optimizer, RankAllocator]:
    torch.manual_seed(3)
    model = Regression()
    allocator = RankAllocator(model, **SETTINGS | {"capturable": True} | settings)
    return model, make(model, allocator), allocator


def record(model: nn.Module, optimizer: Any, allocator: Any, sample: Any = None, **options: Any) -> GraphedStep:
    settings = {"loss": None, "orthogonality": 0.1, "warmup": 1, "recorder": RunsAgain()} | options
    return record_step(model, optimizer, allocator, batch(999) if sample is None else sample, **settings)


def everything(model: nn.Module, optimizer: torch.optim.Optimizer, allocator: RankAllocator) -> dict[str, Any]:
    states = (model.state_dict(), optimizer.state_dict(), allocator.state_dict())
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    return copy.deepcopy({"states": states, "grads": grads, "random": torch.get_rng_state()})


def assert_equal(a: Any, b: Any) -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        a, b = list(a.values()), list(b.values())
    if isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


@pytest.mark.parametrize("make", (swept, sgd))
@pytest.mark.parametrize("variant", ("original", "peft", "paper"))
def test_equals_the_loop(variant: str, make: Any) -> None:
    """Its warm-up leaves no trace: parameters, moments, averages, masks and dropout are those of the plain loop."""
    (model, optimizer, allocator), (ours, other, graphed) = (made(make, variant=variant) for _ in range(2))
    if make is sgd:
        allocator.attach(optimizer)
    step_of = record(ours, other, graphed)
    torch.manual_seed(7)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = model(**batch(step))["loss"] + compute_orth_regu(model, 0.1, squared=variant == "paper")
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    torch.manual_seed(7)
    for step in range(STEPS):
        assert step_of(batch(step)).item() == losses[step], step
        graphed.update_and_mask(ours, step)  # by habit: it is done already
    assert_same(allocator, graphed, whole=True)
    assert_equal(model.state_dict(), ours.state_dict())
    assert graphed.global_step == STEPS - 1 and sum(graphed.live_ranks().values()) <= 4


@pytest.mark.parametrize("make", (swept, sgd))
@pytest.mark.parametrize("advanced", (0, END + 2))
def test_leaves_all_as_it_was(make: Any, advanced: int) -> None:
    model, optimizer, allocator = made(make, variant="peft")
    if advanced:
        step_of = record(model, optimizer, allocator)
        for step in range(advanced):
            step_of(batch(step))
    before = everything(model, optimizer, allocator)
    recorder = RunsAgain()
    record(model, optimizer, allocator, recorder=recorder, warmup=4)
    assert recorder.warm_ups == 4
    after = everything(model, optimizer, allocator)
    if not advanced:  # the optimizer's own state of what is no adapter is there now, as it begins
        for entry in after["states"][1]["state"].values():
            assert all(not value.any() for value in entry.values())
        after["states"][1]["state"] = before["states"][1]["state"]
    assert_equal(before | {"grads": None}, after | {"grads": None})


@pytest.mark.parametrize("make", (swept, sgd))
@pytest.mark.parametrize(
    "because",
    (
        "operation would make the legacy stream depend on a capturing blocking stream",
        "called a synchronizing operation",
    ),
)
def test_a_failed_capture_leaves_all_as_it_was(make: Any, because: str) -> None:
    model, optimizer, allocator = made(make)
    model(**batch(5))["loss"].backward()
    before = everything(model, optimizer, allocator)
    with pytest.raises(RuntimeError, match=rf"graphed_step: the step waits.*gradient hook.*{because}"):
        record(model, optimizer, allocator, recorder=RunsAgain(because))
    assert_equal(before, everything(model, optimizer, allocator))
    assert not allocator.captured and not allocator.attached
    allocator.compact(like=allocator.state_dict())
    with pytest.raises(RuntimeError, match=r"^out of memory$"):
        record(model, optimizer, allocator, recorder=RunsAgain("out of memory"))


def test_compact_raises_afterwards() -> None:
    model, optimizer, allocator = made()
    step_of = record(model, optimizer, allocator)
    for step in range(END + 3):
        step_of(batch(step))
    with pytest.raises(ValueError, match=r"compact\(\) before steps are captured"):
        allocator.compact(optimizer)


def test_refuses_another_batch() -> None:
    model, optimizer, allocator = made()
    step_of = record(model, optimizer, allocator)
    before = everything(model, optimizer, allocator)
    good = batch(0)
    for change, message in (
        ({"x": good["x"][:3]}, r"batch\['x'\]: expected torch.float64 \[12, 8\].* got torch.float64 \[3, 8\]; pad it"),
        ({"labels": good["labels"].float()}, r"batch\['labels'\]: expected torch.float64.* got torch.float32"),
        ({"reduction": "sum"}, r"batch\['reduction'\]: expected 'mean', as in the sample, got 'sum'"),
        ({"x": 1.0}, r"batch\['x'\]: expected tensor"),
        ({"more": good["x"]}, r"batch: expected the sample's structure, without batch\['more'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            step_of(good | change)
    with pytest.raises(ValueError, match=r"expected the sample's structure, with batch\['labels'\]"):
        step_of({"x": good["x"], "reduction": "mean"})
    with pytest.raises(ValueError, match="structure"):
        step_of((good["x"], good["labels"]))
    assert_equal(before, everything(model, optimizer, allocator))


def test_batches_of_other_kinds() -> None:
    """A tuple, a list in a dict; and a loss of one's own."""
    x = batch(0)["x"]
    for sample, loss in (
        ((x, batch(0)["labels"]), None),
        ({"pair": [x, batch(0)["labels"]]}, lambda model, given: model(*given["pair"])["loss"]),
    ):
        model, optimizer, allocator = made()
        assert torch.isfinite(record(model, optimizer, allocator, sample, loss=loss)(sample))
    model, optimizer, allocator = made()
    step_of = record(model.body, optimizer, allocator, x, loss=lambda model, x: model(x).square().mean())
    assert torch.isfinite(step_of(x + 1))


def test_refuses_what_has_been_replaced() -> None:
    changes: list[tuple[str, Callable[[Any, Any, Any], Any]]] = [
        ("the allocator's schedule was", lambda model, optimizer, allocator: allocator.set_total_step(100)),
        ("the optimizer's state was", lambda model, optimizer, allocator: optimizer.load_state_dict(
            optimizer.state_dict())),
        ("a learning rate", lambda model, optimizer, allocator: optimizer.param_groups[0].update(lr=1e-4)),
        ("parameters were", lambda model, optimizer, allocator: setattr(
            model.body[0], "lora_A", nn.Parameter(model.body[0].lora_A.detach().clone()))),
    ]  # fmt: skip
    for message, change in changes:
        model, optimizer, allocator = made()
        step_of = record(model, optimizer, allocator)
        step_of(batch(0))
        change(model, optimizer, allocator)
        with pytest.raises(RuntimeError, match=f"{message}.*replaced since the step was captured"):
            step_of(batch(1))
        assert allocator.next_step == 1


def test_what_may_change_in_between() -> None:
    """The learning rate by its tensor, weights and the allocator's state by their load_state_dict, the step."""
    model, optimizer, allocator = made()
    step_of = record(model, optimizer, allocator)
    step_of(batch(0))
    saved = copy.deepcopy((model.state_dict(), allocator.state_dict()))
    step_of(batch(1))
    model.load_state_dict(saved[0])
    allocator.load_state_dict(saved[1])
    assert allocator.next_step == 1
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    scheduler.step()
    before = [p.detach().clone() for p in adapters(model)]
    step_of(batch(1))
    assert all(torch.equal(p, q) for p, q in zip(adapters(model), before, strict=True))
    allocator.expect(STEPS)
    step_of(batch(2))
    assert allocator.global_step == STEPS and sum(allocator.live_ranks().values()) <= 4


def refused(error: type[Exception], message: str, model: Any, optimizer: Any, allocator: Any, **options: Any) -> None:
    with pytest.raises(error, match=message):
        record(model, optimizer, allocator, **options)


def test_refuses_what_a_graph_cannot_hold() -> None:
    model, optimizer, allocator = made()
    with pytest.raises(ValueError, match="model: expected on a CUDA device, which alone has graphs, got cpu"):
        graphed_step(model, optimizer, allocator, batch(0))
    ordinary = RankAllocator(model, **SETTINGS)
    refused(ValueError, r"allocator: expected RankAllocator\(..., capturable=True\)", model, optimizer, ordinary)
    plain = torch.optim.AdamW(trained(model))
    refused(ValueError, "optimizer: expected capturable=True, got AdamW without it", model, plain, allocator)
    number = torch.optim.AdamW(trained(model), lr=1e-3, capturable=True)
    refused(ValueError, "optimizer: expected lr as a tensor on cpu.*got 0.001", model, number, allocator)
    new = CapturableSgd(trained(model), torch.tensor(0.1))
    refused(ValueError, "expected AdamW or Adam, or one that has made a step; got a new", model, new, allocator)
    another = RankAllocator(model, **SETTINGS, capturable=True)
    refused(ValueError, "allocator: expected the one that this AdaLoraAdamW was made with", model, optimizer, another)
    refused(TypeError, "model: expected a torch.nn.Module", 3, optimizer, allocator)
    refused(TypeError, "allocator: expected a RankAllocator", model, optimizer, None)
    refused(TypeError, "optimizer: expected a torch.optim.Optimizer", model, None, allocator)
    refused(ValueError, "warmup: expected at least 1, got 0", model, optimizer, allocator, warmup=0)
    refused(ValueError, "orthogonality: expected at least 0", model, optimizer, allocator, orthogonality=-1.0)
    for loss in (lambda model, given: model(**given), lambda model, given: given["x"]):
        refused(ValueError, "loss: expected a tensor of one element", model, optimizer, allocator, loss=loss,
                orthogonality=0.0)  # fmt: skip
    refused(ValueError, "loss: expected one for a model", model.body, optimizer, allocator, sample=batch(0)["x"])
    optimizer.grad_scale = torch.ones(())  # type: ignore[attr-defined]
    refused(ValueError, "optimizer: expected no GradScaler", model, optimizer, allocator)


def test_refuses_an_attachment_that_the_caller_counts() -> None:
    model, optimizer, allocator = made(sgd)
    allocator.attach(optimizer, step=lambda: 3)
    refused(ValueError, r"attached with attach\(optimizer, step=...\)", model, optimizer, allocator)
    assert allocator.attached
    model, optimizer, allocator = made(sgd, total_step=None)
    refused(ValueError, "total_step", model, optimizer, allocator)


class FakeCuda:
    """torch.cuda's streams and graphs as far as ``CudaGraph`` uses them."""

    class Stream:
        def wait_stream(self, other: object) -> None: ...

    class CUDAGraph:
        def replay(self) -> None: ...

    def __init__(self) -> None:
        self.mode, self.capturing = "default", False
        self.drawable = True  # torch's random generator

    def current_stream(self) -> FakeCuda.Stream:
        return self.Stream()

    @contextmanager
    def stream(self, stream: object) -> Iterator[None]:
        yield

    @contextmanager
    def graph(self, graph: object) -> Iterator[None]:
        self.capturing, self.drawable = True, False
        try:
            yield
            self.drawable = True
        finally:
            self.capturing = False

    def get_sync_debug_mode(self) -> str:
        return self.mode

    def set_sync_debug_mode(self, mode: str) -> None:
        self.mode = mode


@pytest.mark.parametrize("looks", ["outside of a capture", "always", "never"])
def test_what_waits_is_refused_only_if_the_capture_fails(looks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' models look at their mask on the host, but not while they are being captured."""
    cuda = FakeCuda()
    for name in ("Stream", "CUDAGraph", "current_stream", "stream", "graph", "get_sync_debug_mode",
                 "set_sync_debug_mode"):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))

    def run() -> Tensor:
        if cuda.capturing and looks == "always":
            raise RuntimeError("operation not permitted when stream is capturing")
        if cuda.mode == "error" and looks != "never":
            raise RuntimeError("called a synchronizing CUDA operation")
        return torch.ones(())

    recorder = CudaGraph()
    recorder.warm_up(run, 3)
    assert cuda.mode == "default"
    if looks == "always":
        with pytest.raises(RuntimeError, match="called a synchronizing") as caught:
            recorder.record(run)
        assert "not permitted" in str(caught.value.__cause__)
    else:
        assert recorder.record(run)[1] == 1
    assert cuda.drawable  # in torch only once a capture has ended well
