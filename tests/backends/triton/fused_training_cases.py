"""Training with importance fused into the backward, through the public classes: run by ``test_kernels.py``.

To debug one: ``TRITON_INTERPRET=1 pytest tests/backends/triton/fused_training_cases.py -k <case>``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adalora_kernels import AdaLoraAdamW, RankAllocator, SVDLinear, compute_orth_regu, explain, svd_linear
from adalora_kernels.allocator.fused import FUSED
from adalora_kernels.backends.triton import group
from adalora_kernels.ops.svd_linear_group import GroupedLayer, svd_linear_group
from tests.backends.triton.backward_plan_cases import one_tile
from tests.backends.triton.kernel_cases import DEVICE, poisoned

__all__ = ["one_tile", "poisoned"]  # apply to every case here, too

STEPS = 2
SETTINGS: dict[str, Any] = {"lora_r": 4, "target_rank": 2, "init_warmup": 0, "final_warmup": 1, "mask_interval": 1,
                            "beta1": 0.85, "beta2": 0.85, "total_step": STEPS + 1, "variant": "paper"}  # fmt: skip
BEFORE = "launched before the step: "
MOVED = "a parameter of first was written to after its backward"
WRITTEN = "the gradient of {} was written to after its backward"
PLAIN = "{} is not contiguous, or accumulates in another dtype"
PLANS = ("one_gemm", "split", "blas")


class Dead(nn.Module):
    """A layer that has lost all its rank, still among those of the allocator."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.backend = backend
        self.register_buffer("weight", torch.eye(20))
        for name, shape in (("A", (0, 20)), ("E", (0, 1)), ("B", (20, 0))):
            self.register_parameter(f"lora_{name}", nn.Parameter(torch.empty(shape)))

    def forward(self, x: Tensor) -> Tensor:
        return svd_linear(x, self.weight, self.lora_A, self.lora_E, self.lora_B, backend=self.backend)


class Network(nn.Module):
    """Two adapted layers and a dead one; the first may run twice. Its layers take one backward plan."""

    def __init__(self, plan: str, runs: int, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        backend = f"triton:one_pass/{plan}"
        self.first = SVDLinear(20, 20, r=4, backend=backend)
        self.dead = Dead(backend)
        self.last = SVDLinear(20, 7, r=3, backend=backend)
        self.runs = runs
        self.to(DEVICE)
        for layer in (self.first, self.last):
            nn.init.normal_(layer.lora_E)
            for p in (layer.lora_A, layer.lora_E, layer.lora_B):
                p.data = p.data.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.runs):
            x = torch.tanh(self.first(x))
        return self.last(self.dead(x))


class Siblings(nn.Module):
    """Two layers that read one x, as one node of the graph."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k = (SVDLinear(20, n, r=4, backend="triton") for n in (12, 7))
        self.to(DEVICE)
        for layer in (self.q, self.k):
            nn.init.normal_(layer.lora_E)

    def forward(self, x: Tensor) -> Tensor:
        rows = [GroupedLayer(m.weight, m.lora_A, m.lora_E, m.lora_B, m.bias) for m in (self.q, self.k)]
        q, k = svd_linear_group(x, rows, backend="triton")
        return torch.tanh(q[:, :7] * k)


def loss_of(model: nn.Module, seed: int, orthogonality: bool = False) -> Tensor:
    x = torch.randn(16, 20, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    loss = (model(x.requires_grad_()) - torch.sin(3 * x[:, :7])).square().mean()
    if orthogonality:
        loss = loss + compute_orth_regu(model, 0.05, squared=True, accumulate=True)
    return loss


Backward = Callable[[Any, int], None]


def train(model: nn.Module, fuse: bool, backward: Backward, options: dict[str, Any]) -> tuple[RankAllocator, set[str]]:
    """A few steps with masks; the outcomes are those of the steps that took gradients."""
    swept = options.pop("swept", False)
    allocator = RankAllocator(model, **SETTINGS, backend="triton", **options)
    if fuse:
        allocator.fuse_backward()
    params = [p for p in model.parameters() if p.requires_grad]
    if swept:
        optimizer: torch.optim.Optimizer = AdaLoraAdamW(params, lr=5e-3, allocator=allocator, backend="triton")
    else:
        optimizer = torch.optim.AdamW(params, lr=5e-3)
        allocator.attach(optimizer)
    outcomes = set()
    for step in range(STEPS):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
        if fuse:
            outcomes.add(explain(allocator)[0].reason.split("last step: ")[1])
    return allocator, outcomes


def assert_same(backward: Backward, make: Callable[[], nn.Module], **options: Any) -> set[str]:
    models = make(), make()
    apart, _ = train(models[0], False, backward, dict(options))
    fused, outcomes = train(models[1], True, backward, dict(options))
    for p, q in zip(models[1].parameters(), models[0].parameters(), strict=True):
        torch.testing.assert_close(p, q)
    for ours, theirs in zip(fused.importance.current(), apart.importance.current(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5 if ours.shape == theirs.shape else 0, atol=1e-12)
    torch.testing.assert_close(fused.importance.scores, apart.importance.scores, rtol=1e-4, atol=1e-20)
    assert fused.importance.scores.any() and int(fused.importance.half) == int(apart.importance.half)
    assert torch.equal(fused.importance.live, apart.importance.live)
    return outcomes


def network(plan: str = "split", runs: int = 1, dtype: torch.dtype = torch.float32) -> Callable[[], nn.Module]:
    return lambda: Network(plan, runs, dtype)


def one_backward(model: nn.Module, step: int) -> None:
    loss_of(model, step).backward()


def with_term(model: nn.Module, step: int) -> None:
    loss_of(model, step, orthogonality=True).backward()


def accumulated(model: nn.Module, step: int) -> None:
    for part in range(2):
        (loss_of(model, 10 * step + part, orthogonality=part == 0) / 2).backward()


@pytest.mark.parametrize("plan", PLANS)
def test_every_plan(plan: str) -> None:
    assert assert_same(with_term, network(plan)) == {FUSED}


@pytest.mark.parametrize("options", [{"swept": True}, {"capturable": True}], ids=["AdaLoraAdamW", "capturable"])
def test_other_ways_to_step(options: dict[str, Any]) -> None:
    assert assert_same(with_term, network(), **options) == {FUSED}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_accumulated_gradients(dtype: torch.dtype) -> None:
    """Taken at every micro-batch, of which the last one counts."""
    assert assert_same(accumulated, network(dtype=dtype)) == {FUSED}


@pytest.mark.parametrize("stacked", [False, True], ids=["one by one", "stacked"])
def test_siblings(stacked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "_backward_pays", lambda *_: stacked)
    assert assert_same(with_term, Siblings) == {FUSED}


def clipped(model: nn.Module, step: int) -> None:
    one_backward(model, step)
    nn.utils.clip_grad_norm_(model.parameters(), 0.01)


def hooked(model: Network, step: int) -> None:
    if step == 0:
        model.last.lora_B.register_hook(lambda g: g * 0.5)
    one_backward(model, step)


def written_unseen(model: Network, step: int) -> None:
    one_backward(model, step)
    for p in (model.last.lora_A, model.last.lora_B):
        assert p.grad is not None
        p.grad.data.mul_(0.5)


def reduced(model: Network, step: int) -> None:
    """As a collective or a GradScaler does, of all, with no word to autograd."""
    one_backward(model, step)
    for p in model.parameters():
        if p.grad is not None:
            p.grad.data.mul_(0.25)


def changed(model: Network, step: int) -> None:
    """The parameter, not its gradient."""
    one_backward(model, step)
    with torch.no_grad():
        model.first.lora_A.mul_(1.5)


def left_out(model: Network, step: int) -> None:
    """The first layer gets no gradient in one of the steps."""
    if step == 1:
        model.last(torch.ones(2, 20, device=DEVICE)).square().mean().backward()
    else:
        one_backward(model, step)


def strided(model: Network, step: int) -> None:
    """A parameter that lies otherwise, which the last stage would misread."""
    if step == 0:
        model.first.lora_A.data = model.first.lora_A.data.t().contiguous().t()
    one_backward(model, step)


def widened(model: Network, step: int) -> None:
    """A gradient that is there in another layout."""
    model.last.lora_B.grad = torch.ones(3, 7, device=DEVICE).t()
    one_backward(model, step)


def term_last(model: nn.Module, step: int) -> None:
    """On top of gradients that are there."""
    one_backward(model, 10 * step)
    with_term(model, step)


def onto_zeros(model: nn.Module, step: int) -> None:
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    with_term(model, step)


UNSEEN = f"{FUSED}; {BEFORE}the gradient of {{}} was written to unseen"


@pytest.mark.parametrize(
    ("backward", "runs", "outcomes"),
    [
        (one_backward, 2, {f"{FUSED} but for 3 of 6 gradients; {BEFORE}first ran twice in one backward"}),
        (clipped, 1, {BEFORE + WRITTEN.format("first")}),
        (hooked, 1, {f"{FUSED} but for 1 of 6 gradients; {BEFORE}{WRITTEN.format('last')}"}),
        (written_unseen, 1, {UNSEEN.format("last")}),
        (reduced, 1, {UNSEEN.format("first and of 1 more")}),
        (changed, 1, {f"{FUSED} but for 1 of 6 gradients; {BEFORE}{MOVED}"}),
        (left_out, 1, {FUSED, f"{FUSED} but for 3 of 6 gradients; {BEFORE}first was not fused in this step"}),
        (strided, 1, {f"{FUSED} but for 3 of 6 gradients; {BEFORE}{PLAIN.format('first')}"}),
        (widened, 1, {f"{FUSED} but for 3 of 6 gradients; {BEFORE}{PLAIN.format('last')}"}),
        (term_last, 1, {f"{FUSED} but for 4 of 6 gradients; {BEFORE}{WRITTEN.format('first')}"}),
        (onto_zeros, 1, {f"{BEFORE}the orthogonality term came on top of gradients that were there"}),
    ],
)  # fmt: skip
def test_where_it_is_not_legal_the_launch_does_it(backward: Any, runs: int, outcomes: set[str]) -> None:
    assert assert_same(backward, network(runs=runs)) == outcomes


def test_layers_of_another_backend() -> None:
    """Importance on triton, the layers not: nothing is taken in their backward."""

    def plain() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(SVDLinear(20, 7, r=4, backend="reference")).to(DEVICE)

    assert assert_same(one_backward, plain) == {
        f"{BEFORE}the backward of 0 did not come to a last stage that takes importance"
    }


def test_overflow_leaves_no_trace() -> None:
    """Of the layer whose backward comes first; the other's gradients are finite."""
    model = Network("split", 1, torch.float32)
    allocator = RankAllocator(model, **SETTINGS, backend="triton")
    allocator.fuse_backward()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    allocator.attach(optimizer)
    for step in range(2):
        optimizer.zero_grad()
        state = allocator.importance
        before = [t.clone() for t in (*state.current(), state.scores, state.live, state.half)]
        if step == 1:
            hidden = torch.ones(20, device=DEVICE, requires_grad=True)
            (model.last(hidden * torch.ones(2, 1, device=DEVICE)) * torch.inf).sum().backward()
            with torch.enable_grad():
                model.first(torch.ones(2, 20, device=DEVICE)).sum().backward()
        else:
            one_backward(model, step)
        optimizer.step()
        assert allocator.fused is not None and allocator.fused.outcome == FUSED
    after = (*state.current(), state.scores, state.live, state.half)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_two_runs_agree_bit_for_bit() -> None:
    runs = []
    for _ in range(2):
        model = Network("one_gemm", 1, torch.float32)
        allocator, _ = train(model, True, with_term, {})
        runs.append((*allocator.importance.current(), allocator.importance.scores, *model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
