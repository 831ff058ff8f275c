"""Each op × backend × shape × dtype for pytest-benchmark, whose own comparisons work on it:

    python -m pytest -o addopts= benchmarks/micro/bench_ops.py --benchmark-autosave
    python -m pytest -o addopts= benchmarks/micro/bench_ops.py --benchmark-compare

Each case is held to the reference before it is timed. These are times of one thing on one machine, for comparing two
commits there; ratios between contestants come from ``make bench``, which runs them in turn.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from adalora_kernels import svd_linear
from adalora_kernels.backends.select import Backend, unavailable_reason
from adalora_kernels.testing.tolerances import assert_within_budget
from benchmarks.micro import scaling

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RANK = 12
SHAPES = [(768, 768, 1024), (768, 3072, 1024)] + ([(4096, 4096, 8192)] if DEVICE == "cuda" else [])
DTYPES = (torch.float32, torch.bfloat16)
BACKENDS = [backend for backend in Backend if unavailable_reason(backend, DEVICE) is None]


def gradients(x: Tensor, weight: Tensor, adapter: list[Tensor], grad_y: Tensor, backend: str | None) -> list[Tensor]:
    """A layer's output and the gradients of x, A, E and B."""
    y = svd_linear(x, weight, *adapter, scaling=1.0, backend=backend)
    return [y, *torch.autograd.grad(y, [x, *adapter], grad_y)]


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.value)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def bench_layer(benchmark: Any, shape: tuple[int, int, int], dtype: torch.dtype, backend: Backend) -> None:
    """Forward and backward; shape is (K, N, M)."""
    k, n, m = shape
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(*sizes: int, std: float) -> Tensor:
        return torch.randn(sizes, generator=generator, device=DEVICE).mul_(std).to(dtype)

    adapter = [normal(RANK, k, std=k**-0.5), normal(RANK, 1, std=1.0), normal(n, RANK, std=RANK**-0.5)]
    x, weight, grad_y = normal(m, k, std=1.0), normal(n, k, std=k**-0.5), normal(m, n, std=1.0)
    for leaf in (x, *adapter):
        leaf.requires_grad_()
    exact = [t.detach().double().requires_grad_() for t in (x, *adapter)]
    wanted = gradients(exact[0], weight.double(), exact[1:], grad_y.double(), "reference")
    plain = gradients(x, weight, adapter, grad_y, "reference")
    given = gradients(x, weight, adapter, grad_y, backend.value)
    for name, *three in zip(("y", "dx", "dA", "dE", "dB"), given, plain, wanted, strict=True):
        assert_within_budget(name, *three)
    benchmark(waited(lambda: gradients(x, weight, adapter, grad_y, backend.value)))


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.value)
@pytest.mark.parametrize("part", scaling.PARTS)
def bench_engine(benchmark: Any, part: str, backend: Backend) -> None:
    """A part of the budget engine, for DeBERTa-v3-base's 72 matrices in fp32."""
    if DEVICE != "cpu":
        pytest.skip("the engine on a device is timed by make gpu")
    layout = scaling.deberta(RANK)
    engine = scaling.Engine(layout, backend.value)
    scaling.check_equal(scaling.Engine(layout, "reference"), engine)
    benchmark(getattr(engine, part))


def waited(run: Any) -> Any:
    """``run``, until the device is idle."""
    if DEVICE == "cpu":
        return run

    def until_idle() -> None:
        run()
        torch.cuda.synchronize()

    return until_idle
