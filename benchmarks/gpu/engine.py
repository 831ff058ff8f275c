"""The budget engine on the device: beside PEFT's, importance beside a copy of its bytes, and what a step launches."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from adalora_kernels import patch_model
from adalora_kernels.backends.native import unavailable_reason
from adalora_kernels.ops.adamw import Importance, adamw_update
from adalora_kernels.ops.allocation import mask_to_budget
from adalora_kernels.ops.importance import TripletLayout, importance_update
from adalora_kernels.ops.orthogonality import orthogonality_loss
from benchmarks.gpu.machine import Machine
from benchmarks.micro import budget_engine
from benchmarks.micro.scaling import ADAMW, BETA1, BETA2, FLOATS_MOVED, deberta
from benchmarks.step.measure import clocked
from benchmarks.step.names import OURS, OURS_SWEPT, RANK
from benchmarks.timing import Sample, interleave, ratio

WHOLE, IMPORTANCE = "importance + masking + orthogonality", "importance alone"
LAUNCHES = "launches of the budget engine"
PEFT, PEFT_WITH, REPLAYED = "PEFT", "PEFT, AdamW", "ours, CUDA graph"
COPY = "copy"
# Rank, K and N of each adapted matrix of a block: q, k, v, o, gate, up, down.
_LLAMA_8B = ((4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), (4096, 14336), (4096, 14336), (14336, 4096))


def llama(r: int) -> TripletLayout:
    """The 224 adapted matrices of a Llama of 8 billion parameters."""
    return TripletLayout(tuple((r, k, n) for k, n in _LLAMA_8B) * 32)


def whole(machine: Machine) -> dict[str, Any]:
    """Importance, masking and orthogonality of DeBERTa-v3-base's 72 matrices, through PEFT's entry points.

    From an idle device until it is idle again: eager, and ours on tensors of these shapes also as a CUDA graph, which
    PEFT's can't be. With AdaLoraAdamW they can't be told from the optimizer's step: it is set beside PEFT's work and
    torch's fused AdamW.

    Raises:
        AssertionError: the two come to different parameters, terms or live triplets.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = budget_engine.build(1 if machine.dry else 12, 2 if machine.dry else RANK).to(machine.device)
    model.model.forward = partial(_loss_of_zero, machine.device)
    peft, with_adamw, ours, swept = (budget_engine.copy_of(model) for _ in range(4))
    matrices, elements = model_size(model)
    for patched in (ours, swept):
        patch_model(patched)
    trial = [budget_engine.copy_of(model) for _ in range(3)]
    for patched in trial[1:]:
        patch_model(patched)
    budget_engine.check_equal(*trial)
    alone = Tensors(TripletLayout(((2, 8, 12),) * 3) if machine.dry else deberta(RANK), machine)
    runs: dict[str, Callable[[], object]] = {
        PEFT: partial(_engine_alone, peft),
        OURS: partial(_engine_alone, ours),
        REPLAYED: machine.recorded([partial(alone.step, False)]),
        PEFT_WITH: budget_engine.with_optimizer(with_adamw, budget_engine.adamw(with_adamw)),
        OURS_SWEPT: budget_engine.in_one_sweep(swept),
    }
    contestants = {name: partial(_as_it_is, run) for name, run in runs.items()}
    seconds = interleave(contestants, machine.rounds, 2, partial(clocked, device=machine.device))
    rivals = {OURS: PEFT, REPLAYED: PEFT, OURS_SWEPT: PEFT_WITH}
    return {
        "benchmark": WHOLE,
        "case": {"matrices": matrices, "R": 2 if machine.dry else RANK, "elements": elements, "dtype": "float32"},
        "milliseconds": {name: {q: 1e3 * v for q, v in vars(Sample.of(s)).items()} for name, s in seconds.items()},
        "peft_over_ours": {name: ratio(seconds[rival], seconds[name]) for name, rival in rivals.items()},
        "rounds": machine.rounds,
    }


def model_size(model: torch.nn.Module) -> tuple[int, int]:
    """Adapted matrices, and elements that train."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return sum("lora_E" in name for name, _ in model.named_parameters()), sum(p.numel() for p in trained)


def _loss_of_zero(device: str) -> Any:
    return SimpleNamespace(loss=torch.zeros((), device=device, requires_grad=True) + 0.0)


def _engine_alone(model: Any) -> None:
    model().loss.backward()
    model.update_and_allocate(budget_engine.STEP)


def _as_it_is(run: Callable[[], object]) -> Callable[[], object]:
    return run


class Tensors:
    """Parameters, gradients and all state of a model in fp32 on the device."""

    def __init__(self, layout: TripletLayout, machine: Machine) -> None:
        generator = torch.Generator(machine.device).manual_seed(0)
        self.layout, self.device = layout, machine.device
        shapes = [shape for r, k, n in layout.shapes for shape in ((r, k), (r, 1), (n, r))]

        def normal(shape: tuple[int, ...], std: float) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=machine.device).mul_(std)

        self.params = [torch.nn.Parameter(normal(shape, 1.0)) for shape in shapes]
        for param in self.params:
            param.grad = normal(tuple(param.shape), 1e-3)
        made = partial(torch.zeros, device=machine.device)
        self.state, self.half = made(2, 2, layout.total_elements), made(1, dtype=torch.int32)
        self.scores, self.live = made(layout.total_rank), made(layout.total_rank).bool()
        self.moments, self.steps = made(2, layout.total_elements), made(len(shapes))
        self.groups = made(len(shapes), dtype=torch.int64)
        self.grad_scale = torch.ones(1, dtype=torch.float64, device=machine.device)
        self.settings = torch.tensor([ADAMW], dtype=torch.float64)
        self.root = torch.ones((), device=machine.device)

    @property
    def grads(self) -> list[torch.Tensor | None]:
        """As they lie now."""
        return [p.grad for p in self.params]

    def importance(self, backend: str) -> None:
        """Ī, Ū and all scores."""
        args = (self.layout, self.params, self.grads, self.state, self.half, self.scores, BETA1, BETA2)
        importance_update(*args, backend=backend)

    def step(self, swept: bool) -> None:
        """What a step of training has beside forward, backward and, unless it is ``swept``, the optimizer's step."""
        term = orthogonality_loss(self.params[::3], self.params[2::3], 0.1, accumulate=True, backend="triton")
        term.backward(self.root)
        if swept:
            importance = Importance(self.state, self.half, self.scores, BETA1, BETA2, pre_step=False)
            state = (self.moments, self.steps, self.groups, self.settings, self.grad_scale, importance)
            adamw_update(self.layout, self.params, self.grads, *state, backend="triton")
        else:
            self.importance("triton")
        budget = self.layout.total_rank // 2
        mask_to_budget(self.scores, self.params[1::3], budget, self.live, backend="triton")

    def moved(self) -> None:
        """New gradients at other addresses, as every backward makes them."""
        kept = self.grads
        for param in self.params:
            param.grad = None if param.grad is None else param.grad.clone()
        del kept


def importance_alone(machine: Machine) -> dict[str, Any]:
    """Importance of 41.9 million elements, replayed, beside a copy that moves as many bytes as it must."""
    layout = TripletLayout(((2, 8, 12),) * 3) if machine.dry else llama(16)
    tensors = Tensors(layout, machine)
    source = torch.randn(FLOATS_MOVED // 2 * layout.total_elements, device=machine.device)
    target = torch.zeros_like(source)
    backends = ["triton"] + ["native"] * (unavailable_reason(machine.device) is None)
    graphs = {name: machine.recorded([partial(tensors.importance, name)]) for name in backends}
    seconds = machine.replays(graphs | {COPY: machine.recorded([lambda: target.copy_(source)])})
    return {
        "benchmark": IMPORTANCE,
        "case": {"layers": len(layout.shapes), "elements": layout.total_elements, "dtype": "float32"},
        "microseconds": {name: {q: 1e6 * v for q, v in vars(Sample.of(s)).items()} for name, s in seconds.items()},
        "importance_to_copy": {name: ratio(seconds[name], seconds[COPY]) for name in backends},
        "bytes": 4 * FLOATS_MOVED * layout.total_elements,
        "rounds": machine.rounds,
    }


def launches(machine: Machine) -> dict[str, Any]:
    """Kernels, copies and fills of one step of the budget engine, by CUPTI, in its third step; none in a dry run."""
    found: dict[str, int] = {}
    names: dict[str, list[str]] = {}
    for layout in (TripletLayout(((2, 8, 12),) * 3), *([] if machine.dry else [deberta(RANK)])):
        for swept in (False, True):
            tensors = Tensors(layout, machine)
            for _ in range(2):
                tensors.moved()
                tensors.step(swept)
            tensors.moved()
            machine.wait()
            with profile(activities=[ProfilerActivity.CPU if machine.dry else ProfilerActivity.CUDA]) as profiler:
                tensors.step(swept)
                machine.wait()
            name = f"{OURS_SWEPT if swept else OURS}, {len(layout.shapes)} layers"
            names[name] = sorted(e.name for e in profiler.events() if e.device_type == DeviceType.CUDA)
            found[name] = len(names[name])
    return {"benchmark": LAUNCHES, "case": {"R": RANK}, "launches": found, "names": names}


MEASURED = {WHOLE: whole, IMPORTANCE: importance_alone, LAUNCHES: launches}

__all__ = ["IMPORTANCE", "LAUNCHES", "MEASURED", "WHOLE", "importance_alone", "launches", "whole"]
