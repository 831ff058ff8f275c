"""The CPU sweeps over averages too large for the caches, written past them: the bits of each layer's sweep alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from adalora_kernels.backends import native
from adalora_kernels.reference.adamw import Importance
from adalora_kernels.reference.importance import TripletLayout

LAYERS = 4
# The averages lie at multiples of 16 bytes, which streamed stores ask for, or anywhere.
SHAPES = [(12, 6000, 3000), (3, 25001, 12499), (2000, 30, 5)]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
SETTINGS = torch.tensor([[1e-2, 0.02, 0.9, 0.999, 1e-8]], dtype=torch.float64)


class Model:
    """Some layers with all state of the sweeps."""

    def __init__(self, layout: TripletLayout, params: list[Tensor], steps: list[list[Tensor | None]]) -> None:
        dtype = torch.float64 if params[0].dtype == torch.float64 else torch.float32
        self.layout, self.params, self.steps = layout, [p.clone() for p in params], steps
        self.state = torch.zeros(2, 2, layout.total_elements, dtype=dtype)
        self.half = torch.zeros(1, dtype=torch.int32)
        self.scores = torch.zeros(layout.total_rank, dtype=dtype)
        self.moments = torch.zeros(2, layout.total_elements, dtype=dtype)

    def score(self) -> Model:
        for grads in self.steps:
            native.importance_update(self.layout, self.params, grads, self.state, self.half, self.scores, 0.85, 0.75)
        return self

    def train(self, pre_step: bool) -> Model:
        importance = Importance(self.state, self.half, self.scores, 0.85, 0.75, pre_step)
        counts, groups = torch.zeros(len(self.params)), torch.zeros(len(self.params), dtype=torch.int64)
        for grads in self.steps:
            native.adamw_update(
                self.layout, self.params, grads, self.moments, counts, groups, SETTINGS,
                torch.ones(1, dtype=torch.float64), importance,
            )  # fmt: skip
        return self


def whole_and_parts(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Model, list[Model]]:
    r, k, n = shape
    generator = torch.Generator().manual_seed(0)
    sizes = [(r, k), (r, 1), (n, r)] * LAYERS
    params, *steps = ([torch.randn(s, generator=generator).to(dtype) for s in sizes] for _ in range(4))
    given: list[list[Tensor | None]] = [
        [None if i % 5 == step else g for i, g in enumerate(grads)] for step, grads in enumerate(steps)
    ]
    parts = [
        Model(TripletLayout((shape,)), params[at : at + 3], [grads[at : at + 3] for grads in given])
        for at in range(0, 3 * LAYERS, 3)
    ]
    whole = Model(TripletLayout((shape,) * LAYERS), params, given)
    assert whole.layout.total_elements >= 2**18 > parts[0].layout.total_elements  # kStreamedElements
    return whole, parts


def assert_same_bits(whole: Model, parts: list[Model]) -> None:
    halves = [p.state[int(p.half)] for p in parts]
    assert whole.half.item() == 1
    assert torch.equal(whole.state[1], torch.cat(halves, 1))
    assert torch.equal(whole.scores, torch.cat([p.scores for p in parts]))
    assert torch.equal(whole.moments, torch.cat([p.moments for p in parts], 1))
    assert all(map(torch.equal, whole.params, [p for part in parts for p in part.params]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_importance(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    whole, parts = whole_and_parts(shape, dtype)
    assert_same_bits(whole.score(), [p.score() for p in parts])


@pytest.mark.parametrize("pre_step", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_adamw(shape: tuple[int, int, int], dtype: torch.dtype, pre_step: bool) -> None:
    whole, parts = whole_and_parts(shape, dtype)
    assert_same_bits(whole.train(pre_step), [p.train(pre_step) for p in parts])
