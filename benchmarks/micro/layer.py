"""The layer, forward and backward, against the frozen linear, PEFT's layer and addmm_ by hand."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adalora_kernels import svd_linear
from benchmarks.micro.elsewhere import Elsewhere, settled
from benchmarks.timing import Contestant, Sample, interleave, ratio

NAME = "layer forward + backward"
BESIDE_MORE = "layer beside torch.compile and a newer PEFT"  # whose process shares the caches: a record of its own
ALPHA = 16.0
AGAIN = "ours, once more"  # the same thing timed twice shows the noise
Call = Callable[[Tensor], Tensor]


class AddmmByHand(torch.autograd.Function):
    """What a careful user would write: the products as they come, accumulated with addmm_; the adapter in x's dtype."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, e: Tensor, b: Tensor, c: float
    ) -> Tensor:
        ctx.adapter_dtype = a.dtype
        a, e, b = (t.to(x.dtype) for t in (a, e, b))
        y = F.linear(x, w, bias)
        u = x @ a.t()
        y.addmm_(u * (c * e.view(-1)), b.t())
        ctx.save_for_backward(x, u, w, a, e, b)
        ctx.c = c
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, u, w, a, e, b = ctx.saved_tensors
        lam = ctx.c * e.view(-1)
        v = (g @ b) * lam
        t = g.t() @ u
        dx = (g @ w).addmm_(v, a)
        da, de, db = v.t() @ x, ctx.c * (b * t).sum(0).view_as(e), t * lam
        return dx, None, None, *(t.to(ctx.adapter_dtype) for t in (da, de, db)), None


def peft_layer(k: int, n: int, r: int) -> Any:
    """PEFT's SVDLinear over a fresh nn.Linear, with Λ away from zero."""
    from peft import AdaLoraConfig
    from peft.tuners.adalora.layer import SVDLinear

    config = AdaLoraConfig(init_r=r, target_r=r, lora_alpha=int(ALPHA), total_step=100)
    layer = SVDLinear(nn.Linear(k, n), "default", config, r=r, lora_alpha=int(ALPHA))
    layer.get_base_layer().requires_grad_(False)
    nn.init.normal_(layer.lora_E["default"])
    return layer


def lora_layer(base: nn.Linear, a: Tensor, e: Tensor, b: Tensor, c: float) -> nn.Module:
    """PEFT's LoRA layer that computes the same as the adapter: A, and B diag(c E)."""
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear

    r = a.shape[0]
    layer = Linear(base, "default", LoraConfig(r=r, lora_alpha=r), r=r, lora_alpha=r)
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(a)
        layer.lora_B["default"].weight.copy_(b * (c * e.view(-1)))
    return layer.to(base.weight.dtype)


def expression(x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, e: Tensor, b: Tensor, c: float) -> Tensor:
    """The original package's, which is PEFT's as well."""
    return F.linear(x, w, bias) + (x @ (a * e).t() @ b.t()) * c


def floor(k: int, n: int, r: int) -> float:
    """Arithmetic of forward and backward over that of the frozen linear: 1 + 1.5 R (1/K + 1/N)."""
    return 1 + 1.5 * r * (1 / k + 1 / n)


def measure(
    k: int, n: int, m: int, r: int, dtype: torch.dtype, threads: int, rounds: int, compiled: bool = False,
    other_peft: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """One case: K = k, N = n, M = m tokens, rank r. Inputs rotate through more memory than the caches hold.

    Args:
        k, n, m, r, dtype: as above.
        threads: of the CPU.
        rounds: timed rounds.
        compiled: whether torch.compile of the original's expression and of ours take part.
        other_peft: a folder with another PEFT, whose layer takes part in a process of its own.

    Returns:
        A record: the case, the median milliseconds of each contestant, their ratios to the frozen linear, the floor,
        and how far two contestants that are the same are apart.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    layer = peft_layer(k, n, r).to(dtype)
    base, adapter = layer.get_base_layer(), [layer.lora_A["default"], layer.lora_E["default"], layer.lora_B["default"]]
    copies = max(2, -(-(96 << 20) // ((m * k + m * n) * dtype.itemsize)))
    xs = [torch.randn(m, k, dtype=dtype, requires_grad=True) for _ in range(copies)]
    gs = [torch.randn(m, n, dtype=dtype) for _ in range(copies)]
    a, e, b = adapter
    lora = lora_layer(copy.deepcopy(base), a, e, b, factor(r))
    calls = _calls(layer, lora, adapter, compiled)
    check_equal(calls, xs[0], gs[0], adapter)
    trained = [*adapter, *(p for p in lora.parameters() if p.requires_grad)]
    contestants = {name: _in_turn(call, xs, gs, trained, i) for i, (name, call) in enumerate(calls.items())}
    with ExitStack() as running:
        if other_peft is not None:
            other = running.enter_context(Elsewhere(other_peft, threads, [base.weight, base.bias], adapter, xs, gs))
            check_same(f"PEFT {other.version}", other.results, _results(layer, xs[0], gs[0], adapter))
            contestants[f"PEFT {other.version}"] = lambda: other.run
            contestants = {name: settled(prepare) for name, prepare in contestants.items()}
        seconds = interleave(contestants, rounds)
    noise = abs(ratio(seconds[AGAIN], seconds["ours"]) - 1)
    return {
        "benchmark": NAME if not compiled and other_peft is None else BESIDE_MORE,
        "case": {"K": k, "N": n, "M": m, "R": r, "dtype": str(dtype).removeprefix("torch."), "threads": threads},
        "milliseconds": {name: {q: 1e3 * v for q, v in vars(Sample.of(s)).items()} for name, s in seconds.items()},
        "ratio_to_frozen": {name: ratio(s, seconds["frozen"]) for name, s in seconds.items() if name != AGAIN},
        "noise": noise,
        "flop_floor": floor(k, n, r),
        "rounds": rounds,
    }


def factor(r: int) -> float:
    """c = alpha / (r + 1e-5)."""
    return ALPHA / (r + 1e-5)


def _calls(layer: Any, lora: nn.Module, adapter: list[Tensor], compiled: bool) -> dict[str, Call]:
    base = layer.get_base_layer()
    w, bias, c = base.weight, base.bias, factor(adapter[0].shape[0])

    def ours(x: Tensor) -> Tensor:
        return svd_linear(x, w, *adapter, bias=bias, scaling=c)

    def original(x: Tensor) -> Tensor:
        a, e, b = adapter
        return expression(x, w, bias, a, e, b, c)

    calls: dict[str, Call] = {
        "frozen": lambda x: F.linear(x, w, bias),
        "ours": ours,
        "peft": layer,
        "addmm_": lambda x: AddmmByHand.apply(x, w, bias, *adapter, c),
        "PEFT LoRA": lora,
        "original": original,
        AGAIN: ours,
    }
    if compiled:
        calls["original, torch.compile"] = torch.compile(original, fullgraph=True)
        calls["ours, torch.compile"] = torch.compile(ours, fullgraph=True)
    return calls


def _in_turn(call: Call, xs: list[Tensor], gs: list[Tensor], trained: list[Tensor], first: int) -> Contestant:
    """Forward and backward on one input after the other."""
    order = itertools.count(first)

    def prepare() -> Callable[[], object]:
        i = next(order) % len(xs)
        for t in (xs[i], *trained):
            t.grad = None
        return lambda: call(xs[i]).backward(gs[i])

    return prepare


def check_equal(calls: dict[str, Call], x: Tensor, g: Tensor, adapter: list[Tensor]) -> None:
    """Every contestant but the frozen linear must compute the same thing, before any is timed."""
    wanted = _results(calls["peft"], x, g, adapter)
    for name, call in calls.items():
        if name not in ("frozen", "peft"):
            # LoRA has no Λ, and so other gradients of its own factors.
            check_same(name, _results(call, x, g, [] if name == "PEFT LoRA" else adapter), wanted)


def check_same(name: str, given: list[Tensor], wanted: list[Tensor]) -> None:
    """As many results as are given must be PEFT's, to the rounding of their dtype."""
    for got, want in zip(given, wanted, strict=False):
        difference = (got - want).abs().max() / want.abs().max()
        if not difference <= 64 * torch.finfo(want.dtype).eps:
            raise AssertionError(f"{name} differs from PEFT's layer by {difference:.2e}")


def _results(call: Call, x: Tensor, g: Tensor, adapter: list[Tensor]) -> list[Tensor]:
    y = call(x)
    return [y, *torch.autograd.grad(y, [x, *adapter], g)]


__all__ = ["AGAIN", "BESIDE_MORE", "NAME", "AddmmByHand", "expression", "floor", "measure", "peft_layer"]
