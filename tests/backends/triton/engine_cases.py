"""The budget engine on Triton against its specification, case by case: run by ``test_kernels.py`` in its own process.

To debug one: ``TRITON_INTERPRET=1 pytest tests/backends/triton/engine_cases.py -k <case>``.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adalora_kernels import AdaLoraAdamW, RankAllocator, SVDLinear
from adalora_kernels.backends import triton as backend
from adalora_kernels.backends.triton.engine import sweep, tables
from adalora_kernels.backends.triton.engine.items import A_ROWS, items_of
from adalora_kernels.ops.orthogonality import orthogonality_loss
from adalora_kernels.reference import adamw, importance
from adalora_kernels.reference.importance import TripletLayout
from adalora_kernels.testing.tolerances import assert_within_budget
from tests.backends.triton.kernel_cases import DEVICE, poisoned

__all__ = ["poisoned"]
FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16

SETTINGS = [[3e-3, 0.02, 0.9, 0.999, 1e-8], [1e-2, 0.0, 0.8, 0.98, 1e-6]]
# Layers without rank, rows that end in mid-tile, several pieces of a row of A, several slabs of B.
RAGGED = ((12, 300, 70), (0, 5, 7), (3, 2500, 33), (5, 31, 2100))
EVEN = ((16, 320, 600), (4, 64, 8))  # loaded in fours
ONE = ((1, 70, 50), (1, 3, 9))
WIDE = ((130, 20, 9), (1, 1, 1))  # more triplets than an item of B takes


def random_like(shapes: list[tuple[int, int]], dtypes: tuple[torch.dtype, ...], seed: int) -> list[Tensor]:
    """Normal numbers; tensors take the dtypes in turn."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(s, generator=generator) for s in shapes]
    return [t.to(DEVICE, dtypes[(i + seed) % len(dtypes)]) for i, t in enumerate(drawn)]


class Run:
    """Parameters and all state of one optimizer, stepped by one implementation."""

    def __init__(
        self, shapes: tuple[tuple[int, int, int], ...], dtypes: tuple[torch.dtype, ...], pre_step: bool = False
    ) -> None:
        self.layout = TripletLayout(shapes)
        self.shapes = [shape for r, k, n in shapes for shape in ((r, k), (r, 1), (n, r))]
        self.params = random_like(self.shapes, dtypes, 0)
        self.wide(torch.float32, pre_step)

    def wide(self, dtype: torch.dtype, pre_step: bool) -> None:
        """Fresh state in ``dtype``."""
        elements, count = self.layout.total_elements, len(self.shapes)
        zeros = {"dtype": dtype, "device": DEVICE}
        self.moments = torch.zeros(2, elements, **zeros)
        self.steps = torch.zeros(count, device=DEVICE)
        self.groups = torch.arange(count, device=DEVICE) % len(SETTINGS)
        self.importance = adamw.Importance(
            torch.zeros(2, 2, elements, **zeros),
            torch.zeros(1, dtype=torch.int32, device=DEVICE),
            torch.zeros(self.layout.total_rank, **zeros),
            0.85,
            0.75,
            pre_step,
        )

    def exact(self) -> Run:
        """The same in fp64."""
        twin = Run(self.layout.shapes, (torch.float32,))
        twin.params = [p.double() for p in self.params]
        twin.wide(torch.float64, self.importance.pre_step)
        return twin

    def update(self, module: Any, grads: list[Any]) -> bool:
        """Importance alone."""
        i = self.importance
        arguments = (self.layout, self.params, grads, i.state, i.half, i.scores, i.beta1, i.beta2)
        return bool(module.importance_update(*arguments).item())

    def step(self, module: Any, grads: list[Any], scale: float = 1.0, scored: bool = True) -> bool:
        """AdamW, with importance where ``scored``."""
        finite = module.adamw_update(
            self.layout, self.params, grads, self.moments, self.steps, self.groups,
            torch.tensor(SETTINGS, dtype=torch.float64), torch.tensor([scale], dtype=torch.float64, device=DEVICE),
            self.importance if scored else None,
        )  # fmt: skip
        return bool(finite.item())

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All that a step may change, the averages in their current half."""
        state, half, scores, *_ = self.importance
        named = {"moments": self.moments, "averages": state[int(half)], "scores": scores}
        return named | {f"param {i}": p for i, p in enumerate(self.params)}


def widened(grads: list[Any]) -> list[Any]:
    return [None if g is None else g.double() for g in grads]


def compare(ours: Run, same: Run, exact: Run) -> None:
    """Within the budget; 16-bit parameters, which each side has rounded, within two roundings of each other."""
    assert torch.equal(ours.steps, same.steps) and torch.equal(ours.importance.half, same.importance.half)
    for name, got in ours.tensors.items():
        if got.dtype == torch.float32:
            assert_within_budget(name, got, same.tensors[name], exact.tensors[name])
        else:
            torch.testing.assert_close(got, same.tensors[name])


@pytest.mark.parametrize(
    ("shapes", "dtypes"),
    [
        (RAGGED, (FLOAT32,)),
        (RAGGED, (FLOAT32, BFLOAT16, FLOAT16)),
        (EVEN, (FLOAT32, BFLOAT16)),
        (ONE, (FLOAT32,)),
        (WIDE, (FLOAT32,)),
    ],
    ids=["ragged", "ragged mixed", "even mixed", "rank 1", "wide"],
)
def test_importance(shapes: Any, dtypes: tuple[torch.dtype, ...]) -> None:
    """Two steps, gradients missing in the second; dtypes of parameters and gradients differ."""
    ours, same = Run(shapes, dtypes), Run(shapes, dtypes)
    exact = ours.exact()
    for seed in (1, 2):
        grads: list[Any] = random_like(ours.shapes, dtypes, seed)
        if seed == 2:
            grads[0] = grads[-1] = None
        assert (
            ours.update(backend, grads) and same.update(importance, grads) and exact.update(importance, widened(grads))
        )
    compare(ours, same, exact)


def test_strided_tensors_are_copied() -> None:
    ours, same = Run(EVEN, (FLOAT32,)), Run(EVEN, (FLOAT32,))
    grads = random_like(ours.shapes, (FLOAT32,), 1)
    ours.params = [p.t().contiguous().t() for p in ours.params]
    strided = [torch.stack([g, g], -1)[..., 0] for g in grads]
    assert ours.update(backend, strided) and same.update(backend, grads)
    assert torch.equal(ours.importance.scores, same.importance.scores)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_overflow_leaves_no_trace(poison: float) -> None:
    """In any kind of item, at either end; 1e30 is finite, but its importance is not. The next step is as ever."""
    run = Run(((5, 33, 20), (0, 5, 5), (3, 40, 7)), (FLOAT32,))
    first, last = (random_like(run.shapes, (FLOAT32,), seed) for seed in (1, 2))
    assert run.update(backend, first)
    before = {name: value.clone() for name, value in run.tensors.items()}
    for tensor, place in ((0, 0), (1, -1), (2, -1), (6, -1), (8, 0)) if poison != poison else ((2, 0),):
        grads = [g.clone() for g in last]
        grads[tensor].view(-1)[place] = poison
        assert not run.update(backend, grads) and int(run.importance.half) == 1
        assert all(torch.equal(value, before[name]) for name, value in run.tensors.items())
    straight = Run(run.layout.shapes, (FLOAT32,))
    assert run.update(backend, last) and straight.update(backend, first) and straight.update(backend, last)
    assert all(torch.equal(value, straight.tensors[name]) for name, value in run.tensors.items())


def test_model_without_rank() -> None:
    run = Run(((0, 5, 7),), (FLOAT32,))
    assert run.update(backend, random_like(run.shapes, (FLOAT32,), 1)) and int(run.importance.half) == 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({("params", 0): torch.zeros(33, 5)}, ValueError, r"params\[0\]: expected shape \[5, 33\]"),
        ({("grads", 2): torch.zeros(20, 4)}, ValueError, r"grads\[2\]: expected shape \[20, 5\]"),
        ({("grads", 0): torch.zeros(5, 33, dtype=torch.float64)}, TypeError, r"grads\[0\].*float64"),
        ({("grads", 0): torch.zeros(5, 33, device="meta")}, ValueError, r"grads\[0\].* on meta"),
        ({"grads": []}, ValueError, "grads: expected 3 tensors, got 0"),
        ({"state": torch.zeros(2, 2, 5)}, ValueError, "state: expected"),
        ({"half": torch.zeros(1, dtype=torch.int64)}, TypeError, "half: expected"),
        ({"scores": torch.zeros(5, dtype=torch.float64)}, TypeError, "scores: expected"),
        ({"scores": torch.zeros(6)}, ValueError, "scores: expected"),
    ],
)
def test_importance_refuses(change: dict[Any, Any], error: type[Exception], message: str) -> None:
    run = Run(((5, 33, 20),), (FLOAT32,))
    arguments: dict[str, Any] = {"layout": run.layout, "params": run.params, **run.importance._asdict()}
    arguments["grads"] = random_like(run.shapes, (FLOAT32,), 1)
    del arguments["pre_step"]
    for key, value in change.items():
        value = value.to(DEVICE) if isinstance(value, Tensor) and value.device.type != "meta" else value
        if isinstance(key, tuple):
            arguments[key[0]][key[1]] = value
        else:
            arguments[key] = value
    with pytest.raises(error, match=message):
        backend.importance_update(**arguments)
    assert not run.importance.state.any() and not run.importance.half.any()


@pytest.mark.parametrize("pre_step", [False, True], ids=["post_step", "pre_step"])
@pytest.mark.parametrize(
    ("shapes", "dtypes"),
    [(((12, 90, 70), (0, 5, 7), (3, 50, 33)), (FLOAT32,)), (EVEN, (FLOAT32,)), (EVEN, (BFLOAT16, FLOAT16, FLOAT32))],
    ids=["ragged", "even", "mixed"],
)
def test_adamw(shapes: Any, dtypes: tuple[torch.dtype, ...], pre_step: bool) -> None:
    """Three steps: a missing gradient, clipped gradients, one without importance."""
    ours, same = Run(shapes, dtypes, pre_step), Run(shapes, dtypes, pre_step)
    exact = ours.exact()
    for seed in range(3):
        grads: list[Any] = random_like(ours.shapes, dtypes, seed)
        if seed:
            grads[seed] = None
        for run, module, given in ((ours, backend, grads), (same, adamw, grads), (exact, adamw, widened(grads))):
            assert run.step(module, given, scale=0.7 if seed == 1 else 1.0, scored=seed != 1)
        if len(dtypes) > 1:  # rounded parameters are what the next step starts from, on all sides
            for p, q, wide in zip(ours.params, same.params, exact.params, strict=True):
                torch.testing.assert_close(p, q)
                p.copy_(q)
                wide.copy_(q)
    compare(ours, same, exact)


def test_adamw_reads_settings_on_the_device() -> None:
    """As the host's, bit for bit, also after they have changed."""
    ours, same = Run(EVEN, (FLOAT32,)), Run(EVEN, (FLOAT32,))
    grads = random_like(ours.shapes, (FLOAT32,), 1)
    device = ours.moments.device
    words = [
        tables.words_of("", tensors, tables.sizes_of(ours.shapes), device).words for tensors in (ours.params, grads)
    ]
    settings = torch.tensor(SETTINGS, dtype=torch.float64, device=device)
    state = sweep.Optimizer(ours.moments, ours.steps, ours.groups, torch.ones(1, device=device).double(), settings)
    assert sweep.sweep(ours.layout, *words, device, ours.importance, state) and same.step(backend, grads)
    assert all(torch.equal(ours.tensors[name], value) for name, value in same.tensors.items())
    settings[:, :2] = 0.0  # no learning rate, no decay
    sweep.sweep(ours.layout, *words, device, None, state)
    assert ours.steps.eq(2).all() and all(torch.equal(p, q) for p, q in zip(ours.params, same.params, strict=True))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_budget_on_the_device(dtype: torch.dtype) -> None:
    scores = torch.tensor([3.0, 1.0, 2.0, 2.0, 2.0, 0.0, 7.0], device=DEVICE)
    for budget in range(9):
        found = []
        for given in (budget, torch.tensor([budget], dtype=dtype, device=DEVICE)):
            E = [torch.ones(4, 1, device=DEVICE), torch.ones(3, 1, device=DEVICE)]
            live = torch.ones(7, dtype=torch.bool, device=DEVICE)
            found.append((backend.mask_to_budget(scores, E, given, live), live, *E))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)), budget


def test_overflow_in_adamw_leaves_the_averages() -> None:
    run = Run(((5, 33, 20),), (FLOAT32,))
    grads = random_like(run.shapes, (FLOAT32,), 1)
    assert run.step(backend, grads)
    before = run.tensors["averages"].clone(), run.importance.scores.clone()
    grads[0][0, 0] = torch.inf
    assert not run.step(backend, grads) and int(run.importance.half) == 1 and run.steps.tolist() == [2.0] * 3
    assert torch.equal(run.tensors["averages"], before[0]) and torch.equal(run.importance.scores, before[1])


def test_adamw_refuses() -> None:
    run = Run(((5, 33, 20),), (FLOAT32,))
    grads = random_like(run.shapes, (FLOAT32,), 1)
    kept = [p.clone() for p in run.params]
    with pytest.raises(ValueError, match=r"grads\[0\]: expected shape"):
        run.step(backend, [grads[0].t(), *grads[1:]])
    run.params[0] = run.params[0].t().contiguous().t()
    with pytest.raises(ValueError, match="params: expected contiguous"):
        run.step(backend, grads)
    run.steps = run.steps.double()
    with pytest.raises(TypeError, match=r"steps: expected torch\.float32"):
        run.step(backend, grads)
    assert not run.moments.any() and all(torch.equal(p, q) for p, q in zip(run.params, kept, strict=True))


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_total_norm(dtype: torch.dtype) -> None:
    tensors = random_like([(3, 5), (0, 4), (700, 33), (1, 1), (128, 256)], (dtype, FLOAT32), 0)
    tensors.append(tensors[0].t())
    torch.testing.assert_close(backend.total_norm(tensors), adamw.total_norm(tensors), rtol=1e-6, atol=0)
    assert torch.equal(backend.total_norm(tensors), backend.total_norm(tensors))
    assert backend.total_norm([tensors[1]]).tolist() == [0.0]
    with pytest.raises(TypeError, match=r"tensors\[0\].*float64"):
        backend.total_norm([tensors[0].double()])


def test_tables_are_copied_when_they_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for new numbers and not at all for the same ones; each copy from a buffer that no other copy reads."""
    staged: list[Tensor] = []
    copy = tables._copy

    def spied(numbers: list[int], staging: Tensor, target: Tensor) -> None:
        staged.append(staging)
        copy(numbers, staging, target)

    monkeypatch.setattr(tables, "_copy", spied)
    device = torch.zeros(0, device=DEVICE).device
    for numbers in ([1, 2, 3], [1, 2, 3], [1, 2, -4], [5], [5]):
        assert tables.on_device("case", list(numbers), device).tolist() == numbers
    assert len({s.data_ptr() for s in staged}) == len(staged) == 3
    tables.on_device("another", [5], device)
    assert len(staged) == 4


def test_a_captured_copy_is_kept() -> None:
    """Replays read its buffer and write its table, so neither may serve anything else."""
    device = torch.zeros(0, device=DEVICE).device
    spare = torch.empty(2, dtype=torch.int64, pin_memory=DEVICE == "cuda")
    tables._spares[device, 2] = spare
    kept = len(tables._captured)
    first, second = (tables._captured_copy([number, 2], device) for number in (1, 3))
    tables.on_device("capture", [5, 6], device)
    assert first.tolist() == [1, 2] and second.tolist() == [3, 2] and spare.tolist() == [1, 2]
    assert tables._captured[kept] is spare and len(tables._captured) == kept + 4
    assert tables._spares.get((device, 2)) is not spare


def test_items_of_a_thousand_layers() -> None:
    """Every element belongs to one item, every item to its layer, every sum of a layer to one place."""
    choice = random.Random(0)
    shapes = tuple(
        (choice.choice([0, 1, 12, 130]), choice.choice([5, 3000]), choice.choice([7, 900])) for _ in range(1000)
    )
    items = items_of(TripletLayout(shapes), torch.device("cpu"))
    layers, rows = items.layers.view(1000, -1).tolist(), items.items.view(items.item_count, -1).tolist()
    assert items.item_count == sum(layer[6] for layer in layers) == len(rows)
    covered = [[0, 0, 0] for _ in shapes]
    for layer, part, triplet, position in rows:
        r, k, n = shapes[layer]
        rows_taken, taken, length = ((A_ROWS, items.piece, k), (items.block_r, 1, 1), (items.block_r, items.slab, n))[
            part
        ]
        covered[layer][part] += max(0, min(rows_taken, r - triplet)) * min(taken, length - position)
    assert covered == [[r * k, r, n * r] for r, k, n in shapes]
    sums = [r * (-(-k // items.piece) + 1 + -(-n // items.slab)) for r, k, n in shapes]
    assert [layer[5] for layer in layers] == [sum(sums[:i]) for i in range(1000)] and items.sum_count == sum(sums)


def test_addresses_beyond_32_bits() -> None:
    """Offsets are 64 bits wide on their way to the device."""
    layout = TripletLayout(((128, 16384, 16384),) * 600)
    offsets = items_of(layout, torch.device("cpu")).layers.view(600, -1)[:, 3]
    assert offsets.dtype == torch.int64 and offsets[-1] == layout.offsets[-4] > 2**31


class Training:
    """A small model with an allocator whose work, and the orthogonality term's, is done by one backend."""

    def __init__(self, name: str, fused: bool) -> None:
        torch.manual_seed(0)
        self.name = name
        self.layers = [SVDLinear(24, 20, r=4, backend="reference"), SVDLinear(20, 6, r=4, backend="reference")]
        self.model = nn.Sequential(self.layers[0], nn.Tanh(), self.layers[1]).to(DEVICE)
        self.allocator = RankAllocator(self.model, 4, 2, 1, 1, 1, 0.85, 0.85, total_step=5, backend=name)
        if fused:
            options = {"allocator": self.allocator, "max_grad_norm": 1.0, "backend": name}
            self.optimizer: torch.optim.Optimizer = AdaLoraAdamW(self.model.parameters(), lr=1e-2, **options)
        else:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
            self.allocator.attach(self.optimizer)

    def step(self, x: Tensor, y: Tensor) -> None:
        """Forward, backward, optimizer and masks."""
        lora_A, lora_B = [layer.lora_A for layer in self.layers], [layer.lora_B for layer in self.layers]
        loss = (self.model(x) - y).square().mean()
        loss = loss + orthogonality_loss(lora_A, lora_B, 0.1, accumulate=True, backend=self.name)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


@pytest.mark.parametrize("fused", [False, True], ids=["torch's AdamW", "AdaLoraAdamW"])
def test_training_in_lockstep(fused: bool) -> None:
    """Through the public classes: the reference's masks at each step, its parameters to rounding."""
    ours, theirs = Training("triton", fused), Training("reference", fused)
    x, y = torch.randn(16, 24, device=DEVICE), torch.randn(16, 6, device=DEVICE)
    for step in range(5):
        ours.step(x, y)
        theirs.step(x, y)
        live = ours.allocator.importance.live
        assert torch.equal(live, theirs.allocator.importance.live), step
        for p, q in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    assert live.sum() == 4
