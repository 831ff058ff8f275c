"""How the cost of the budget engine's parts grows with the number of layers, and importance against a plain copy.

Each part is one public call for the whole model: importance; AdamW with importance in the same sweep; orthogonality,
forward and backward, into gradients that are there; masking to half the ranks. Backend native runs against backend
reference, which goes through the layers in plain PyTorch as the published codes do. Before each run the caches are
emptied, as activations do in training.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from adalora_kernels.ops.adamw import Importance, adamw_update
from adalora_kernels.ops.allocation import mask_to_budget
from adalora_kernels.ops.importance import TripletLayout, importance_update
from adalora_kernels.ops.orthogonality import orthogonality_loss
from benchmarks.timing import Contestant, Sample, interleave, ratio

PARTS = ("importance", "adamw", "orthogonality", "masking")
BACKENDS = ("native", "reference")
BETA1, BETA2 = 0.85, 0.85
ADAMW = (1e-2, 0.01, 0.9, 0.999, 1e-8)  # lr, weight decay, β₁, β₂, ε
FLOATS_MOVED = 6  # by importance, an element: reads θ, g, Ī, Ū, writes Ī, Ū
EVICTED_BYTES = 1 << 26
DEBERTA = "DeBERTa-v3-base"


def deberta(r: int) -> TripletLayout:
    """The 72 adapted matrices of DeBERTa-v3-base: query, key, value and attention's output; intermediate; output."""
    return TripletLayout((((r, 768, 768),) * 4 + ((r, 768, 3072), (r, 3072, 768))) * 12)


def square(layers: int, size: int, r: int) -> TripletLayout:
    """So many layers of size × size."""
    return TripletLayout(((r, size, size),) * layers)


class Engine:
    """Parameters, gradients and all state of a model in fp32, worked on by one backend; equal for equal layouts."""

    def __init__(self, layout: TripletLayout, backend: str) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator)

        shapes = [shape for r, k, n in layout.shapes for shape in ((r, k), (r, 1), (n, r))]
        self.layout, self.backend = layout, backend
        self.params = [torch.nn.Parameter(normal(*shape)) for shape in shapes]
        self.grads = [1e-3 * normal(*shape) for shape in shapes]
        for param, grad in zip(self.params, self.grads, strict=True):
            param.grad = grad
        self.state = torch.zeros(2, 2, layout.total_elements)
        self.half = torch.zeros(1, dtype=torch.int32)
        self.scores = torch.zeros(layout.total_rank)
        self.live = torch.ones(layout.total_rank, dtype=torch.bool)
        self.moments = torch.zeros(2, layout.total_elements)
        self.steps, self.groups = torch.zeros(len(shapes)), torch.zeros(len(shapes), dtype=torch.int64)
        self.settings = torch.tensor([ADAMW], dtype=torch.float64)
        self.grad_scale = torch.ones(1, dtype=torch.float64)

    def importance(self) -> None:
        """Ī, Ū and the scores of all triplets."""
        importance_update(
            self.layout, self.params, self.grads, self.state, self.half, self.scores, BETA1, BETA2,
            backend=self.backend,
        )  # fmt: skip

    def adamw(self) -> None:
        """The optimizer's step, and importance of the updated parameters."""
        importance = Importance(self.state, self.half, self.scores, BETA1, BETA2, pre_step=False)
        adamw_update(
            self.layout, self.params, self.grads, self.moments, self.steps, self.groups, self.settings,
            self.grad_scale, importance, backend=self.backend,
        )  # fmt: skip

    def orthogonality(self) -> None:
        """The regulariser, and its gradients added to those of the matrices."""
        A, B = self.params[::3], self.params[2::3]
        orthogonality_loss(A, B, 0.1, accumulate=True, backend=self.backend).backward()

    def masking(self) -> None:
        """Half of all triplets stay."""
        mask_to_budget(self.scores, self.params[1::3], self.layout.total_rank // 2, self.live, backend=self.backend)


def check_equal(first: Engine, second: Engine) -> None:
    """After one step of each part both must hold the same, before anything is timed."""
    for part in PARTS:
        if part == "masking":  # scores that differ in rounding may rank in another order
            second.scores.copy_(first.scores)
        for engine in (first, second):
            getattr(engine, part)()
        for name in ("params", "grads", "state", "scores", "moments", "live", "half"):
            torch.testing.assert_close(
                getattr(second, name), getattr(first, name), rtol=1e-4, atol=1e-7,
                msg=f"{part}: the {name} of backends {first.backend} and {second.backend} differ",
            )  # fmt: skip


def measure(model: str, layout: TripletLayout, threads: int, rounds: int) -> dict[str, Any]:
    """One model.

    Returns:
        A record: the case; for each part the median milliseconds by backend, and the microseconds a layer; and the time
        of native importance over that of a plain copy that moves as many bytes.
    """
    torch.set_num_threads(threads)
    engines = {backend: Engine(layout, backend) for backend in BACKENDS}
    check_equal(*engines.values())
    source = torch.randn(FLOATS_MOVED // 2 * layout.total_elements)  # read once and written once
    target = torch.zeros_like(source)
    evicted = torch.zeros(EVICTED_BYTES // 4)

    def after_eviction(run: Callable[[], object]) -> Contestant:
        def prepare() -> Callable[[], object]:
            evicted.add_(1)
            return run

        return prepare

    runs: dict[str, Callable[[], object]] = {
        f"{part}, {backend}": getattr(engine, part) for part in PARTS for backend, engine in engines.items()
    }
    runs["copy"] = partial(target.copy_, source)
    seconds = interleave({name: after_eviction(run) for name, run in runs.items()}, rounds)
    samples = {name: Sample.of(s) for name, s in seconds.items()}
    layers = len(layout.shapes)
    return {
        "benchmark": "budget engine by number of layers",
        "case": {
            "model": model,
            "layers": layers,
            "R": max(r for r, _, _ in layout.shapes),
            "elements": layout.total_elements,
            "dtype": "float32",
            "threads": threads,
        },
        "milliseconds": {name: {q: 1e3 * v for q, v in vars(sample).items()} for name, sample in samples.items()},
        "microseconds_per_layer": {
            part: {backend: 1e6 * samples[f"{part}, {backend}"].median / layers for backend in BACKENDS}
            for part in PARTS
        },
        "importance_to_copy": ratio(seconds["importance, native"], seconds["copy"]),
        "rounds": rounds,
    }


__all__ = ["DEBERTA", "PARTS", "deberta", "measure", "square"]
