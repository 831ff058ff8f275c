"""``adalora-kernels check``: every operation of every backend that can run here, forward and backward, against fp64.

Of a layer that has several plans every one is run, each forward with the backward of the automatic choice and each
backward with its forward.

Held to the error budget of the tests: a result may be twice as far from fp64 as the plain PyTorch expression of the
same dtype is, plus one rounding of the result's dtype.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from adalora_kernels import svd_linear
from adalora_kernels.backends.select import Backend, plans_of, unavailable_reason, unsuitable
from adalora_kernels.ops.allocation import mask_to_budget
from adalora_kernels.ops.importance import TripletLayout, importance_update
from adalora_kernels.ops.orthogonality import orthogonality_loss
from adalora_kernels.ops.svd_linear import svd_linear_into

# Ragged, so that every tile has a rest; small enough for Triton's interpreter.
_M, _K, _N, _R = 70, 100, 130, 12
_LAYERS = ((12, 100, 130), (1, 33, 65), (8, 64, 48))
_SCALING = 1.5
_WEIGHT = 0.3
_BETA_1, _BETA_2 = 0.85, 0.85
_STEPS = 3


@dataclass(frozen=True)
class Result:
    """One quantity of one operation.

    Attributes:
        name: of the quantity.
        actual: what the backend computed.
        same_dtype: the plain PyTorch expression in the dtype of the operation.
        exact: the same in fp64.
    """

    name: str
    actual: Tensor
    same_dtype: Tensor
    exact: Tensor

    @property
    def error(self) -> float:
        """Largest distance from fp64; NaN where a value is not a number."""
        return _distance(self.actual, self.exact)

    @property
    def budget(self) -> float:
        """Largest error allowed."""
        rounding = torch.finfo(self.actual.dtype).eps * self.exact.abs().max().item()
        return 2 * _distance(self.same_dtype, self.exact) + rounding

    @property
    def holds(self) -> bool:
        """Whether shape, dtype and error are what they must be. A NaN does not hold."""
        same = self.actual.shape == self.exact.shape and self.actual.dtype == self.same_dtype.dtype
        return same and self.error <= self.budget


def _distance(tensor: Tensor, exact: Tensor) -> float:
    return (tensor.detach().double() - exact.detach()).abs().max().item()


def main(_: argparse.Namespace) -> int:
    """Print one line for each check; 0 where all hold."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    held, failed = 0, 0
    for backend in Backend:
        for device in devices:
            reason = unavailable_reason(backend, device)
            if reason is not None:
                print(f"skipped  {backend.value} on {device}: {reason}")
                continue
            for label, op, dtype, operation in _checks(backend):
                if unsuitable(backend, op, device, dtype, _R) is None:
                    passed, line = _judged(operation, backend, device)
                    held, failed = held + passed, failed + (not passed)
                    print(f"{'ok     ' if passed else 'FAILED '}  {backend.value} on {device}: {label}: {line}")
    print(f"{held} checks hold, {failed} fail")
    return 1 if failed or not held else 0


Operation = Callable[[Backend, str], Iterator[Result]]


def _checks(backend: Backend) -> Iterator[tuple[str, str, torch.dtype, Operation]]:
    for plan in plans_of(backend) or ("",):
        for x_dtype, adapter_dtype in ((torch.float32, torch.float32), (torch.bfloat16, torch.float32)):
            label = f"svd_linear {str(x_dtype)[6:]}, {str(adapter_dtype)[6:]} adapters"
            operation = partial(_layer, x_dtype, adapter_dtype, plan)
            yield f"{label}, plan {plan}" if plan else label, "svd_linear", x_dtype, operation
    yield "importance", "importance", torch.float32, _importance
    yield "masking", "allocation", torch.float32, _masking
    yield "orthogonality", "orthogonality", torch.float32, _orthogonality


def _judged(operation: Operation, backend: Backend, device: str) -> tuple[bool, str]:
    """Whether all quantities hold, and the figures of the one that comes closest to its budget or fails."""
    try:
        results = list(operation(backend, device))
    except Exception as error:  # a self-test reports whatever a backend raises, and goes on with the next
        return False, f"{type(error).__name__}: {error}"
    worst = max(results, key=lambda r: (not r.holds, r.error / r.budget if r.budget else 0.0))
    figures = f"{worst.name} error {worst.error:.1e}, budget {worst.budget:.1e}"
    return worst.holds, f"{figures} (the closest of {len(results)} quantities)"


def _normal(generator: torch.Generator, *shape: int, std: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * std


def _layer(
    x_dtype: torch.dtype, adapter_dtype: torch.dtype, plan: str, backend: Backend, device: str
) -> Iterator[Result]:
    """Output and the gradients of x, A, E and B."""
    name = f"{backend.value}:{plan}" if plan else backend
    g = torch.Generator().manual_seed(0)
    values = [
        _normal(g, _M, _K).to(x_dtype),
        _normal(g, _N, _K, std=_K**-0.5).to(x_dtype),
        _normal(g, _N).to(x_dtype),
        _normal(g, _R, _K, std=_K**-0.5).to(adapter_dtype),
        _normal(g, _R, 1).to(adapter_dtype),
        _normal(g, _N, _R, std=0.2).to(adapter_dtype),
    ]
    values = [value.to(device) for value in values]
    grad_y = _normal(g, _M, _N).to(device=device, dtype=x_dtype)

    def differentiated(call: Callable[..., Tensor], dtype: torch.dtype | None) -> list[Tensor]:
        leaves = [v.detach().to(dtype or v.dtype).requires_grad_(i not in (1, 2)) for i, v in enumerate(values)]
        y = call(*leaves)
        y.backward(grad_y.to(y.dtype))
        return [y.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    def fused(x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, e: Tensor, b: Tensor) -> Tensor:
        if plan == "delta":  # the one that takes a base's output in place of a weight
            return svd_linear_into(F.linear(x, weight, bias), x, a, e, b, scaling=_SCALING, backend=name)
        return svd_linear(x, weight, a, e, b, bias=bias, scaling=_SCALING, backend=name)

    def plain(x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, e: Tensor, b: Tensor) -> Tensor:
        low_rank = (x @ a.to(x.dtype).t()) * (_SCALING * e.t()).to(x.dtype)
        return F.linear(x, weight, bias) + low_rank @ b.to(x.dtype).t()

    actual, same, exact = differentiated(fused, None), differentiated(plain, None), differentiated(plain, torch.float64)
    for name, *tensors in zip(("y", "dx", "dA", "dE", "dB"), actual, same, exact, strict=True):
        yield Result(name, *tensors)


def _importance(backend: Backend, device: str) -> Iterator[Result]:
    """Both averages and the triplet scores after a few steps."""
    layout = TripletLayout(_LAYERS)
    g = torch.Generator().manual_seed(1)
    shapes = [shape for r, k, n in _LAYERS for shape in ((r, k), (r, 1), (n, r))]
    steps = [[[_normal(g, *s).float().to(device) for s in shapes] for _ in range(2)] for _ in range(_STEPS)]

    state = torch.zeros(2, 2, layout.total_elements, device=device)
    half = torch.zeros(1, dtype=torch.int32, device=device)
    scores = torch.zeros(layout.total_rank, device=device)
    for params, grads in steps:
        importance_update(layout, params, grads, state, half, scores, _BETA_1, _BETA_2, backend=backend)
    average, uncertainty = state[int(half)]

    def plain(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        a = u = torch.zeros(layout.total_elements, dtype=dtype, device=device)
        for params, grads in steps:
            i = torch.cat([(p.to(dtype) * q.to(dtype)).abs().flatten() for p, q in zip(params, grads, strict=True)])
            a = _BETA_1 * a + (1 - _BETA_1) * i
            u = _BETA_2 * u + (1 - _BETA_2) * (i - a).abs()
        parts = (a * u).split(layout.sizes)
        triplets = [
            parts[3 * j + 1] + parts[3 * j].view(r, k).mean(1) + parts[3 * j + 2].view(n, r).mean(0)
            for j, (r, k, n) in enumerate(_LAYERS)
        ]
        return a, u, torch.cat(triplets)

    same, exact = plain(torch.float32), plain(torch.float64)
    for name, *tensors in zip(
        ("average", "uncertainty", "scores"), (average, uncertainty, scores), same, exact, strict=True
    ):
        yield Result(name, *tensors)


def _masking(backend: Backend, device: str) -> Iterator[Result]:
    """E, pattern and threshold of a ranking; these are exact."""
    g = torch.Generator().manual_seed(2)
    ranks = [r for r, _, _ in _LAYERS]
    scores = _normal(g, sum(ranks)).abs().float().to(device)
    values = [_normal(g, r, 1).float().to(device) for r in ranks]
    budget = sum(ranks) // 2
    cut = scores.sort().values[len(scores) - budget - 1]
    expected = torch.cat(values).flatten() * (scores > cut)

    live = torch.ones(len(scores), dtype=torch.bool, device=device)
    threshold = mask_to_budget(scores, values, budget, live, backend=backend)
    for name, actual, exact in (
        ("E", torch.cat(values).flatten(), expected),
        ("pattern", live.float(), (scores > cut).float()),
        ("threshold", threshold, cut),
    ):
        yield Result(name, actual, exact, exact.double())


def _orthogonality(backend: Backend, device: str) -> Iterator[Result]:
    """The term and its gradients."""
    g = torch.Generator().manual_seed(3)
    values = [_normal(g, r, k, std=k**-0.5).float().to(device) for r, k, _ in _LAYERS]
    values += [_normal(g, n, r, std=n**-0.5).float().to(device) for r, _, n in _LAYERS]
    count = len(_LAYERS)

    def differentiated(call: Callable[[list[Tensor]], Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = [value.detach().to(dtype).requires_grad_() for value in values]
        value = call(leaves)
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    def fused(leaves: list[Tensor]) -> Tensor:
        return orthogonality_loss(leaves[:count], leaves[count:], _WEIGHT, backend=backend)

    def plain(leaves: list[Tensor]) -> Tensor:
        grams = [m @ m.t() for m in leaves[:count]] + [m.t() @ m for m in leaves[count:]]
        norms = [torch.linalg.matrix_norm(c - torch.eye(len(c), dtype=c.dtype, device=device)) for c in grams]
        return _WEIGHT * torch.stack(norms).mean()

    names = ["value", *(f"d{factor}{i}" for factor in "AB" for i in range(count))]
    actual = differentiated(fused, torch.float32)
    same, exact = differentiated(plain, torch.float32), differentiated(plain, torch.float64)
    for name, *tensors in zip(names, actual, same, exact, strict=True):
        yield Result(name, *tensors)


__all__ = ["Result", "main"]
