"""How much a whole step of the budget engine launches: kernels, copies and fills, whatever the number of layers.

A stub stands for the driver, so the kernels are compiled and their launches counted, not made. Every operator of
PyTorch that would run on the device counts too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

triton = pytest.importorskip("triton")

from adalora_kernels import AdaLoraAdamW, RankAllocator, SVDLinear  # noqa: E402
from adalora_kernels.allocator.fused import FUSED  # noqa: E402
from adalora_kernels.backends import select  # noqa: E402
from adalora_kernels.backends import triton as backend  # noqa: E402
from adalora_kernels.backends.triton import launch  # noqa: E402
from adalora_kernels.ops.orthogonality import orthogonality_loss  # noqa: E402
from adalora_kernels.reference.adamw import Importance  # noqa: E402
from adalora_kernels.reference.importance import TripletLayout  # noqa: E402
from tests.backends.triton.stub_driver import Count, StubDriver, stub_driver  # noqa: E402

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set in this process")

MOST = 6
NO_WORK = {"aten.empty.memory_format", "aten.slice.Tensor", "aten.view.default", "aten.detach.default"}  # on the device


class Operators(TorchDispatchMode):
    """Names of the operators that are called, but for those that only make tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(function) not in NO_WORK:
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


class Model:
    """The tensors of so many layers, and one step on them."""

    def __init__(self, layers: int) -> None:
        self.layout = TripletLayout(((4, 8, 12),) * layers)
        self.shapes = [shape for r, k, n in self.layout.shapes for shape in ((r, k), (r, 1), (n, r))]
        self.params = [torch.zeros(s) for s in self.shapes]
        elements, rank = self.layout.total_elements, self.layout.total_rank
        self.importance = Importance(
            torch.zeros(2, 2, elements), torch.zeros(1, dtype=torch.int32), torch.zeros(rank), 0.85, 0.85, False
        )
        self.live = torch.ones(rank, dtype=torch.bool)
        self.moments, self.steps = torch.zeros(2, elements), torch.zeros(3 * layers)
        self.groups = torch.zeros(3 * layers, dtype=torch.int64)
        self.scale = torch.ones(1, dtype=torch.float64)

    def step(self, grads: list[Tensor], settings: Tensor | None, budget: int) -> None:
        """Orthogonality forward and backward, AdamW and importance or importance alone, masking."""
        lora_A, lora_B = self.params[::3], self.params[2::3]
        value, slopes = backend.orthogonality(lora_A, lora_B, 0.1, False)
        backend.orthogonality_gradients(lora_A, lora_B, slopes, value, [*grads[::3], *grads[2::3]], True)
        i = self.importance
        if settings is None:
            finite = backend.importance_update(self.layout, self.params, grads, *i[:5])
        else:
            state = self.moments, self.steps, self.groups, settings, self.scale
            finite = backend.adamw_update(self.layout, self.params, grads, *state, i)
        backend.mask_to_budget(i.scores, self.params[1::3], budget, self.live, finite)


@pytest.fixture(scope="module")
def stub() -> Iterator[StubDriver]:
    """One for all tests, since compiled kernels keep the driver that they were compiled with."""
    with pytest.MonkeyPatch.context() as patch, stub_driver() as driver:
        patch.setattr(launch, "_shapes", {})
        yield driver


def counted(stub: StubDriver, step: Callable[[], None]) -> tuple[int, list[str]]:
    """Kernels and operators of one step."""
    stub.launches.clear()
    with Operators() as operators:
        step()
    return len(stub.launches), operators.names


@pytest.mark.parametrize("layers", [3, 72, 300])
@pytest.mark.parametrize("optimizer", ["any", "adamw"])
def test_a_step_of_any_model(optimizer: str, layers: int, stub: StubDriver) -> None:
    """After the first step, in which tables are made; at each all gradients move and the settings change."""
    model, kept = Model(layers), []
    for number in range(3):
        grads = [torch.zeros(s) for s in model.shapes]
        settings = torch.full((1, 5), 0.1 + number, dtype=torch.float64) if optimizer == "adamw" else None
        kept.append((grads, settings, model.layout.total_rank // 2 - number))
        kernels, operators = counted(stub, lambda: model.step(*kept[-1]))
        if number > 0:
            assert kernels == 4 and operators == ["aten.copy_.default"] * 2
            assert kernels + len(operators) <= MOST
    assert counted(stub, lambda: model.step(*kept[-1])) == (4, []), "nothing moved, so nothing is copied"


def test_a_step_without_ranking(stub: StubDriver) -> None:
    """The norm of all gradients and the pattern kept as it is: a launch each, and a copy for the norm's addresses."""
    model = Model(72)
    for number in range(3):
        grads = [torch.zeros(s) for s in model.shapes]
        kernels, operators = counted(stub, lambda grads=grads: backend.total_norm(grads))  # type: ignore[misc]
        assert kernels == 1 and (number == 0 or operators == ["aten.copy_.default"])
        kernels, operators = counted(stub, lambda: backend.zero_pruned(model.live, model.params[1::3]))
        assert kernels == 1 and (number == 0 or not operators)


WAITS = {"aten._local_scalar_dense.default", "aten.equal.default", "aten.nonzero.default", "aten.item.default"}


def whole_step(stub: StubDriver, fused: bool, orthogonality: bool, swept: bool) -> tuple[int, list[str]]:
    """Backward, optimizer, importance and masks of three layers under an allocator, when all is made and kept."""
    model = nn.Sequential(*(SVDLinear(16, 16, r=4, backend="triton") for _ in range(3)))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    settings = {"mask_interval": 1, "beta1": 0.85, "beta2": 0.85, "total_step": 9, "variant": "paper"}
    allocator = RankAllocator(model, 4, 2, 0, 1, backend="triton", **settings)
    allocator.fuse_backward(fused)
    params = [p for p in model.parameters() if p.requires_grad]
    if swept:
        optimizer: torch.optim.Optimizer = AdaLoraAdamW(params, lr=1e-3, allocator=allocator, backend="triton")
    else:
        optimizer = torch.optim.SGD(params, lr=1e-3, foreach=True)
        allocator.attach(optimizer)
    lora_A, lora_B = [layer.lora_A for layer in model], [layer.lora_B for layer in model]
    found: tuple[int, list[str]] = (0, [])
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(torch.ones(4, 16, requires_grad=True)).sum()
        if orthogonality:
            loss = loss + orthogonality_loss(lora_A, lora_B, 0.1, True, accumulate=True, backend="triton")

        def step(loss: Tensor = loss) -> None:
            loss.backward()
            optimizer.step()

        found = counted(stub, step)
    if allocator.fused is not None:
        assert allocator.fused.outcome == FUSED
    return found


@pytest.mark.parametrize("swept", [False, True], ids=["any optimizer", "AdaLoraAdamW"])
@pytest.mark.parametrize("orthogonality", [False, True], ids=["bare", "with the term"])
def test_importance_in_the_backward(
    swept: bool, orthogonality: bool, stub: StubDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more launches than before the step, and the term's gradients are none of their own. Nothing waits.

    AdaLoraAdamW's one sweep takes importance with it; beside a fused backward that is a launch of its own.
    """
    monkeypatch.setattr(select, "unavailable_reason", lambda backend, device_type: None)
    monkeypatch.setattr(stub, "launches", Count())
    select._select.cache_clear()
    apart, fused = (whole_step(stub, way, orthogonality, swept) for way in (False, True))
    select._select.cache_clear()
    assert fused[0] == apart[0] + swept - orthogonality
    assert not WAITS & {*fused[1]}
    more = Counter(fused[1]) - Counter(apart[1])
    assert not more or (swept and {*more} == {"aten.copy_.default"})
    assert len(fused[1]) <= len(apart[1]) + swept - orthogonality, "copies of addresses"
