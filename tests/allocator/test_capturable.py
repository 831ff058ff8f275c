"""With the schedule on the device: the ordinary numbers bit for bit, no host read, the same launches at every step."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from adalora_kernels import AdaLoraAdamW, RankAllocator, SVDLinear, compute_orth_regu
from adalora_kernels.ops.allocation import mask_to_budget

END, TOTAL, STEPS = 16, 24, 28
SETTINGS: dict[str, Any] = {"lora_r": 4, "target_rank": 2, "init_warmup": 2, "final_warmup": TOTAL - END,
                            "mask_interval": 3, "beta1": 0.85, "beta2": 0.85, "total_step": TOTAL}  # fmt: skip
CASES: list[dict[str, Any]] = [{"variant": v} for v in ("original", "peft", "paper")]
CASES += [{"metric": "mag"}, {"variant": "paper", "reduction": "sum"}, {"variant": "peft", "mask_interval": 5}]
BACKENDS = ("reference", "native")


def named(case: dict[str, Any]) -> str:
    return "-".join(map(str, case.values()))


def network(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    first, second = (SVDLinear(k, n, r=r, dtype=dtype) for k, n, r in ((8, 10, 4), (10, 6, 5)))
    return nn.Sequential(first, nn.Tanh(), second)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def adapters(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if "lora_" in name]


def backward(model: nn.Sequential, step: int, scale: float = 1.0, overflow: bool = False) -> None:
    """Gradients of this step; every seventh time one parameter gets none."""
    dtype = model[0].weight.dtype
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(12, 8, generator=generator, dtype=torch.float64).to(dtype)
    model.zero_grad()
    ((((model(x) - torch.sin(2 * x[:, :6])) ** 2).mean() + compute_orth_regu(model, 0.1)) * scale).backward()
    if step % 7 == 3:
        model[2].lora_B.grad = None
    if overflow:
        model[0].lora_A.grad[0, 0] = torch.inf


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(trained(model), lr=0.05, momentum=0.9)


def pair(case: dict[str, Any], backend: str | None = None) -> list[tuple[nn.Sequential, RankAllocator]]:
    """The same model twice: with an ordinary allocator, and with a capturable one."""
    models = network(), network()
    settings = SETTINGS | case | {"backend": backend}
    return [(m, RankAllocator(m, **settings, capturable=c)) for m, c in zip(models, (False, True), strict=True)]


def assert_same(a: RankAllocator, b: RankAllocator, whole: bool, about: object = None) -> None:
    """Masks, scores and parameters; ``whole``: and all else, which writes back what the device notes."""
    assert torch.equal(a.importance.live, b.importance.live), about
    assert torch.equal(a.importance.scores, b.importance.scores), about
    for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True):
        assert torch.equal(p, q), about
    if not whole:
        return
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        same = torch.equal(value, theirs[name]) if isinstance(value, Tensor) else value == theirs[name]
        assert same, (about, name, value, theirs[name])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=named)
def test_equals_the_ordinary_path(case: dict[str, Any], backend: str) -> None:
    """A whole schedule and some, with steps that lack a gradient."""
    runs = [(model, allocator, sgd(model)) for model, allocator in pair(case, backend)]
    for _, allocator, optimizer in runs:
        allocator.attach(optimizer)
    for step in range(STEPS):
        for model, _, optimizer in runs:
            backward(model, step)
            optimizer.step()
        assert_same(runs[0][1], runs[1][1], whole=step in (5, END + 1, STEPS - 1), about=step)
    assert 0 < sum(runs[1][1].live_ranks().values()) <= 4
    assert runs[1][1].global_step == STEPS - 1 and runs[1][1].next_step == STEPS


@pytest.mark.parametrize("case", CASES[:4], ids=named)
def test_driven_by_calls_it_answers_alike(case: dict[str, Any]) -> None:
    """By the caller's steps, some of them left out; budget and threshold are the ordinary ones."""
    runs = [(model, allocator, sgd(model)) for model, allocator in pair(case)]
    for step in (*range(7), *range(9, END), *range(END + 2, STEPS), 400):
        answers = []
        for model, allocator, optimizer in runs:
            backward(model, step)
            if allocator.pre_step:
                allocator.update_importance(model, step) if step < END or allocator.clock else None
            optimizer.step()
            answers.append(allocator.update_and_mask(model, step))
        (budget, threshold), (on_device, other) = answers
        assert isinstance(on_device, Tensor) and isinstance(other, Tensor)
        assert budget == on_device.item(), step
        assert torch.isnan(other) if threshold is None else torch.equal(threshold, other), step
        assert_same(runs[0][1], runs[1][1], whole=False, about=step)
    assert_same(runs[0][1], runs[1][1], whole=True)
    assert runs[1][1].next_step == 401


@pytest.mark.parametrize("case", CASES[:3], ids=named)
def test_overflow_steps_under_a_scaler(case: dict[str, Any]) -> None:
    """Torch's fused optimizer hands over its found_inf: neither path waits for it."""
    runs = []
    for model, allocator in pair(case):
        optimizer = torch.optim.AdamW(trained(model), lr=5e-3, fused=True)
        allocator.attach(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=1000)
        scaler.scale(torch.ones(()))
        runs.append((model, allocator, optimizer, scaler))
    for step in range(STEPS):
        for model, _, optimizer, scaler in runs:
            overflow = step in (4, 6, END, END + 3)
            backward(model, step, scale=scaler.get_scale(), overflow=overflow)
            if overflow:  # something for the masks to zero, which from T - t_f on hang on no gradient
                model[0].lora_E.data += 0.1
            scaler.step(optimizer)
            scaler.update()
        assert_same(runs[0][1], runs[1][1], whole=step in (4, STEPS - 1), about=step)


@pytest.mark.parametrize("fused", [False, True])
def test_importance_in_the_backward(fused: bool) -> None:
    ordinary, capturable = [(m, a, sgd(m)) for m, a in pair({"variant": "paper"})]
    capturable[1].fuse_backward(fused)
    for _, allocator, optimizer in (ordinary, capturable):
        allocator.attach(optimizer)
    for step in range(STEPS):
        for model, _, optimizer in (ordinary, capturable):
            x = torch.randn(12, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
            model.zero_grad()
            (model(x) ** 2).sum().backward()
            optimizer.step()
        assert_same(ordinary[1], capturable[1], whole=step == STEPS - 1, about=step)
    if fused:
        assert "fused into the backward" in capturable[1].explain_importance()[2]


@pytest.mark.parametrize("case", CASES[:3], ids=named)
@pytest.mark.parametrize("stop", (1, END, END + 1))
@pytest.mark.parametrize("into", (False, True))
def test_resumes(case: dict[str, Any], stop: int, into: bool) -> None:
    """From a capturable run's checkpoint, by a capturable allocator and by an ordinary one."""

    def run(model: nn.Sequential, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            backward(model, step)
            optimizer.step()

    _, (model, allocator) = pair(case)
    optimizer = sgd(model)
    allocator.attach(optimizer)
    run(model, optimizer, range(stop))
    file = io.BytesIO()
    torch.save([owner.state_dict() for owner in (model, optimizer, allocator)], file)
    file.seek(0)
    run(model, optimizer, range(stop, STEPS))

    again = network(seed=5)
    continued = RankAllocator(again, **SETTINGS | case, capturable=into)
    optimizer = sgd(again)
    continued.attach(optimizer)
    for owner, state in zip((again, optimizer, continued), torch.load(file, weights_only=True), strict=True):
        owner.load_state_dict(state)
    run(again, optimizer, range(stop, STEPS))
    assert_same(allocator, continued, whole=True)


def test_starts_anew_after_a_reset() -> None:
    """Variant "peft" resets its averages at T - t_f without writing to them; a host that goes back finds zeros."""
    runs = [(model, allocator, sgd(model)) for model, allocator in pair({"variant": "peft"})]
    for _, allocator, optimizer in runs:
        allocator.attach(optimizer)
    for step in (*range(END + 3), *range(1, 5)):
        for model, allocator, optimizer in runs:
            if step == 1:
                allocator.expect(1)
            backward(model, step)
            optimizer.step()
    assert_same(runs[0][1], runs[1][1], whole=True)
    assert runs[1][1].importance.updates == 4


def test_a_longer_schedule_starts_anew_after_a_reset() -> None:
    runs = [(model, allocator, sgd(model)) for model, allocator in pair({"variant": "peft"})]
    for step in range(END + 8):
        for model, allocator, optimizer in runs:
            if step == 0:
                allocator.attach(optimizer)
            if step == END + 3:
                allocator.set_total_step(TOTAL + 12)
            backward(model, step)
            optimizer.step()
    assert_same(runs[0][1], runs[1][1], whole=True)


def test_a_pattern_holds_before_the_first_gradient() -> None:
    """A ranking without averages goes by the pattern that was loaded."""
    for model, allocator in pair({}):
        allocator.importance.live[0] = False
        model[0].lora_E.data.fill_(1.0)
        optimizer = sgd(model)
        allocator.attach(optimizer)
        for step in range(4):
            assert model[0].lora_E.all(), step
            optimizer.step()
        assert model[0].lora_E.flatten().tolist() == [0.0, 1.0, 1.0, 1.0]


def test_another_schedule_is_followed() -> None:
    runs = [(model, allocator, sgd(model)) for model, allocator in pair({})]
    for step in range(STEPS + 10):
        for model, allocator, optimizer in runs:
            if step == 5:
                allocator.set_total_step(TOTAL + 12)
            backward(model, step)
            optimizer.step()
            allocator.update_and_mask(model, step)
        assert_same(runs[0][1], runs[1][1], whole=False, about=step)


def test_compacts() -> None:
    runs = [(model, allocator, sgd(model)) for model, allocator in pair({})]
    for _, allocator, optimizer in runs:
        allocator.attach(optimizer)
    for step in range(STEPS):
        for model, allocator, optimizer in runs:
            if step == END + 3:
                allocator.compact()
            backward(model, step)
            optimizer.step()
    assert_same(runs[0][1], runs[1][1], whole=True)


class Launches(TorchDispatchMode):
    """Notes the operators, and refuses those that wait for the device."""

    WAIT = ("_local_scalar_dense", "equal", "nonzero", "is_nonzero", "unique", "masked_select", "_unique2")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in self.WAIT, f"{name} waits for the device"
        self.names.append(name)
        return func(*args, **(kwargs or {}))


def attached(model: nn.Module, allocator: RankAllocator) -> Callable[[], Any]:
    optimizer = sgd(model)
    allocator.attach(optimizer)
    return optimizer.step


def swept(model: nn.Module, allocator: RankAllocator) -> Callable[[], Any]:
    return AdaLoraAdamW(adapters(model), allocator=allocator, max_grad_norm=1.0, capturable=True).step


@pytest.mark.parametrize("make", (attached, swept))
@pytest.mark.parametrize("case", CASES, ids=named)
def test_every_step_launches_the_same_and_reads_nothing(case: dict[str, Any], make: Any) -> None:
    """The native extension reads what it needs in C++, where nothing waits; a device's kernels are as the reference."""
    _, (model, allocator) = pair(case, "reference")
    step_of = make(model, allocator)
    sequences = []
    for step in range(STEPS):
        backward(model, step + 1 if step % 7 == 3 else step)  # gradients of all parameters at every step
        if step == 0:
            step_of()  # lays out tables and moments
            continue
        with Launches() as seen:
            step_of()
        sequences.append(seen.names)
    assert len(sequences[0]) > 10 and all(names == sequences[0] for names in sequences)


def test_the_ordinary_path_differs_from_step_to_step() -> None:
    """That is, the test above can fail."""
    (model, allocator), _ = pair({}, "reference")
    step_of, sequences = attached(model, allocator), []
    for _ in range(4):
        backward(model, 0)
        with Launches() as seen:
            step_of()
        sequences.append(seen.names)
    assert sequences[0] != sequences[3]
    with pytest.raises(AssertionError, match="waits for the device"), Launches():
        torch.ones(1).item()


def groups(model: nn.Sequential) -> list[dict[str, Any]]:
    return [{"params": trained(model[0]), "lr": 3e-3}, {"params": trained(model[2]), "betas": (0.8, 0.99)}]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES[:3], ids=named)
def test_adamw_equals_the_ordinary_one(case: dict[str, Any], backend: str) -> None:
    """With clipping, a schedule of the learning rate, biases beside the adapters, and a checkpoint in between."""
    runs = []
    for (model, allocator), capturable in zip(pair(case, backend), (False, True), strict=True):
        options = {"max_grad_norm": 0.5, "backend": backend, "capturable": capturable}
        optimizer = AdaLoraAdamW(groups(model), lr=5e-3, allocator=allocator, **options)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.1 * step))
        runs.append((model, allocator, optimizer, scheduler))
    rates = [group["lr"] for group in runs[1][2].param_groups]
    for step in range(STEPS):
        for model, _, optimizer, scheduler in runs:
            backward(model, step)
            optimizer.step()
            scheduler.step()
        if step == 10:  # each goes on from the other's
            states = [copy.deepcopy(run[2].state_dict()) for run in runs]
            for run, state in zip(runs, states[::-1], strict=True):
                run[2].load_state_dict(state)
        assert_same(runs[0][1], runs[1][1], whole=step in (8, STEPS - 1), about=step)
    assert all(group["lr"] is rate for group, rate in zip(runs[1][2].param_groups, rates, strict=True))
    assert all(type(group["lr"]) is float for group in runs[0][2].param_groups)


def test_adamw_takes_a_learning_rate_that_was_assigned() -> None:
    (_, _), (model, allocator) = pair({})
    optimizer = AdaLoraAdamW(adapters(model), lr=1.0, allocator=allocator, capturable=True)
    optimizer.param_groups[0]["lr"] = 0.0
    before = [p.detach().clone() for p in adapters(model)]
    backward(model, 0)
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(adapters(model), before, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_budget_on_the_device(backend: str) -> None:
    scores = torch.tensor([3.0, 1.0, 2.0, 2.0, 2.0, 0.0, 7.0])
    for budget in range(9):
        found = []
        for given in (budget, torch.tensor([budget], dtype=torch.int32), torch.tensor(budget)):
            E, live = [torch.ones(4, 1), torch.ones(3, 1)], torch.ones(7, dtype=torch.bool)
            threshold = mask_to_budget(scores, E, given, live, backend=backend)
            assert threshold.shape == ()
            found.append((threshold, live, *E))
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True)), budget
    empty = torch.zeros(0, dtype=torch.bool)
    assert mask_to_budget(torch.zeros(0), [], torch.zeros(1, dtype=torch.int32), empty, backend=backend) == -torch.inf


@pytest.mark.parametrize(
    "budget", (torch.ones(1), torch.ones(2, dtype=torch.int32), torch.ones(1, device="meta").int())
)
def test_refuses_a_budget(budget: Tensor) -> None:
    with pytest.raises(ValueError, match="budget: expected an int32 or int64 on cpu, got"):
        mask_to_budget(torch.ones(2), [torch.ones(2, 1)], budget, torch.ones(2, dtype=torch.bool))


def test_refuses() -> None:
    model = network()
    with pytest.raises(ValueError, match="tb_writter: expected None with capturable=True"):
        RankAllocator(model, **SETTINGS, tb_writter=object(), capturable=True)
    (_, ordinary), (model, allocator) = pair({})
    for one, capturable in ((ordinary, True), (allocator, False)):
        with pytest.raises(ValueError, match=f"capturable: expected {not capturable}, as its allocator has it"):
            AdaLoraAdamW(adapters(one.model), allocator=one, capturable=capturable)
    with pytest.raises(ValueError, match="step: expected at least 0, got -1"):
        allocator.expect(-1)
    optimizer = AdaLoraAdamW(adapters(model), allocator=allocator, capturable=True)
    with pytest.raises(ValueError, match=r"expected gradients of the adapters.*after backward\(\)"):
        optimizer.step()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    backward(model, 0)
    with pytest.raises(ValueError, match="capturable: expected False under a GradScaler"):
        scaler.step(optimizer)
    assert allocator.next_step == 0
