"""The contestants of one layer: the frozen linear, cuBLAS with addmm_, PEFT, PEFT compiled, and every plan of ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adalora_kernels import svd_linear
from adalora_kernels.backends.triton import plans
from adalora_kernels.backends.triton.problem import Problem, problem_of
from adalora_kernels.reference.svd_linear import Adapter
from benchmarks.gpu.apart import message_of
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.withheld import BOTH
from benchmarks.micro.layer import AddmmByHand

ALPHA = 16.0
DTYPE = torch.bfloat16
FROZEN, ADDMM, PEFT, PEFT_COMPILED, OURS = "frozen", "addmm_", "peft", "peft, torch.compile", "ours"
_CACHES = 3  # a set of inputs comes round again after this many times the L2
_MOST_COPIES = 64


@dataclass(frozen=True)
class Case:
    """K in-features, N out-features, M tokens, rank R; x, W and y in bf16, the adapter in ``adapter``."""

    K: int
    N: int
    M: int
    R: int
    adapter: str

    @property
    def scaling(self) -> float:
        """c of PEFT, whose ranknum is the initial rank and frozen."""
        return ALPHA / (self.R + 1e-5)

    @property
    def bias(self) -> bool:
        """As in the models that have such layers: BERT's have one, Llama's none."""
        return min(self.K, self.N) < 1024

    def __str__(self) -> str:
        return f"{self.K}x{self.N} M={self.M} r={self.R} {self.adapter} adapter"

    def record(self) -> dict[str, Any]:
        """As it is written down."""
        return asdict(self)


@dataclass
class Layer:
    """One set of inputs: a layer of its own, what goes in and the gradient that comes back."""

    x: Tensor
    grad_y: Tensor
    weight: Tensor
    bias: Tensor | None
    adapter: list[Tensor]
    modules: dict[str, nn.Module] = field(default_factory=dict)

    @property
    def leaves(self) -> list[Tensor]:
        """What is differentiated."""
        return [self.x, *self.adapter]


Call = Callable[[Layer], Tensor]


def layers(case: Case, machine: Machine, most: int = _MOST_COPIES) -> list[Layer]:
    """Sets of random inputs, no more than ``most``, that together exceed the L2 several times."""
    adapter_dtype = getattr(torch, case.adapter)
    sizes = case.M * (case.K + case.N) + case.K * case.N
    rounds_of_cache = -(-_CACHES * machine.cache_bytes // (sizes * DTYPE.itemsize))
    copies = min(most, max(1 if machine.dry else 2, rounds_of_cache))
    generator = torch.Generator(machine.device).manual_seed(0)

    def normal(*shape: int, std: float = 1.0, dtype: torch.dtype = DTYPE) -> Tensor:
        return torch.randn(*shape, generator=generator, device=machine.device, dtype=dtype).mul_(std)

    def parameter(*shape: int, std: float) -> Tensor:
        return normal(*shape, std=std, dtype=adapter_dtype).requires_grad_()

    return [
        Layer(
            normal(case.M, case.K).requires_grad_(),
            normal(case.M, case.N),
            normal(case.N, case.K, std=case.K**-0.5),
            normal(case.N) if case.bias else None,
            [
                parameter(case.R, case.K, std=case.K**-0.5),
                parameter(case.R, 1, std=1.0),
                parameter(case.N, case.R, std=0.2),
            ],
        )
        for _ in range(copies)
    ]


def forward_plans(case: Case, layer: Layer) -> list[str]:
    """The backends, by name, that force each forward plan that can run the case."""
    return [f"triton:{name}" for name, plan in plans.FORWARD.items() if plan.obstacle(problem(case, layer)) is None]


def backward_plans(case: Case, layer: Layer) -> list[str]:
    """Likewise each backward plan, after the forward plan that is chosen."""
    return [f"triton:/{name}" for name, plan in plans.BACKWARD.items() if plan.obstacle(problem(case, layer)) is None]


def problem(case: Case, layer: Layer) -> Problem:
    """What the plans are chosen by."""
    return problem_of(layer.x, layer.weight, adapter_of(case, layer))


def adapter_of(case: Case, layer: Layer) -> Adapter:
    """The low-rank branch as launchers take it."""
    a, e, b = layer.adapter
    return Adapter(a, e, b, None, None, case.scaling, 0.0, DTYPE)


def ours(case: Case, backend: str) -> Call:
    """Our layer, by ``backend``."""

    def call(layer: Layer) -> Tensor:
        return svd_linear(
            layer.x, layer.weight, *layer.adapter, bias=layer.bias, scaling=case.scaling, backend=backend
        )  # fmt: skip

    return call


def rivals(case: Case, machine: Machine, compiled: bool) -> dict[str, Call]:
    """Everything that ours is compared with, by name; ``compiled`` adds torch.compile of PEFT's expression."""

    def expression(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, e: Tensor, b: Tensor) -> Tensor:
        y = F.linear(x, weight, bias)
        return y + ((x.to(a.dtype) @ (a * e).T @ b.T) * case.scaling).to(y.dtype)

    calls: dict[str, Call] = {
        FROZEN: lambda layer: F.linear(layer.x, layer.weight, layer.bias),
        ADDMM: lambda layer: AddmmByHand.apply(layer.x, layer.weight, layer.bias, *layer.adapter, case.scaling),
        PEFT: lambda layer: layer.modules[PEFT](layer.x),
    }
    if compiled:
        torch.compiler.reset()  # one shape's code is not to be generalised for the next
        run = torch.compile(expression, dynamic=False, backend="aot_eager" if machine.dry else "inductor")
        calls[PEFT_COMPILED] = lambda layer: run(layer.x, layer.weight, layer.bias, *layer.adapter)
    return calls


def add_peft(case: Case, layer: Layer) -> None:
    """Give the set PEFT's module over the same tensors."""
    from peft import AdaLoraConfig
    from peft.tuners.adalora.layer import SVDLinear

    base = nn.Linear(case.K, case.N, bias=case.bias, device="meta")
    config = AdaLoraConfig(init_r=case.R, target_r=case.R, lora_alpha=int(ALPHA), total_step=100)
    with torch.device(layer.x.device):
        module = SVDLinear(base, "default", config, r=case.R, lora_alpha=int(ALPHA))
    base.weight = nn.Parameter(layer.weight, requires_grad=False)
    if layer.bias is not None:
        base.bias = nn.Parameter(layer.bias, requires_grad=False)
    for name, tensor in zip(("lora_A", "lora_E", "lora_B"), layer.adapter, strict=True):
        getattr(module, name)["default"] = nn.Parameter(tensor.detach())
    module.ranknum["default"] = nn.Parameter(torch.tensor([float(case.R)], device=layer.x.device), requires_grad=False)
    layer.adapter = [getattr(module, name)["default"] for name in ("lora_A", "lora_E", "lora_B")]
    layer.modules[PEFT] = module


def differentiated(call: Call, layer: Layer, leaves: list[Tensor]) -> list[Tensor]:
    """Output of one call, and the gradients of these leaves."""
    if not leaves:
        with torch.no_grad():
            return [call(layer)]
    y = call(layer)
    return [y, *torch.autograd.grad(y, leaves, layer.grad_y)]


def disagreeing(calls: dict[str, Call], layer: Layer, direction: str) -> dict[str, str]:
    """What is wrong with whom: every contestant but the frozen linear must compute what PEFT does, gradients too.

    Further from PEFT's result, by norm, than four roundings of bf16 is wrong, and whatever raises.
    """
    leaves = layer.leaves if direction == BOTH else []
    want = differentiated(calls[PEFT], layer, leaves)
    found: dict[str, str] = {}
    for name, call in calls.items():
        if name in (FROZEN, PEFT):
            continue
        try:
            got = differentiated(call, layer, leaves)
        except Exception as error:
            found[name] = message_of(error)
            continue
        for quantity, a, b in zip(("y", "dx", "dA", "dE", "dB"), got, want, strict=False):
            error_of = apart(a, b)
            if not error_of <= 4 * torch.finfo(DTYPE).eps:
                found.setdefault(name, f"{quantity} differs from PEFT's by {error_of:.2e}")
    return found


def apart(a: Tensor, b: Tensor) -> float:
    """Distance of a from b relative to b, by norm."""
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


__all__ = [
    "ADDMM", "FROZEN", "OURS", "PEFT", "PEFT_COMPILED", "Call", "Case", "Layer", "adapter_of", "add_peft",
    "apart", "backward_plans", "differentiated", "disagreeing", "forward_plans", "layers", "ours", "problem", "rivals",
]  # fmt: skip
