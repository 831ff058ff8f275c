"""Layers that read the same x (q, k, v; gate, up): their correctness, and their time as a group beside one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from adalora_kernels import svd_linear_group
from adalora_kernels.backends.triton import group
from adalora_kernels.reference import svd_linear_group as reference
from adalora_kernels.reference.svd_linear import Adapter
from adalora_kernels.reference.svd_linear_group import Member
from adalora_kernels.testing.inputs import layer_inputs
from adalora_kernels.testing.tolerances import assert_within_budget
from benchmarks.gpu import layers as contest
from benchmarks.gpu.apart import message_of
from benchmarks.gpu.checks import Check, assert_repeats, judged, poisoned
from benchmarks.gpu.layers import Case, Layer
from benchmarks.gpu.machine import Machine, Run
from benchmarks.gpu.timed import NOTHING, explain, replayed
from benchmarks.gpu.withheld import BOTH, FORWARD, GROUP, Withheld, why

STACK = "triton:shrink_tail/blas"  # the plans that a stack's kernels are for several layers
SHAPES = ((768, (768, 768, 768)), (4096, (4096, 1024, 1024)), (4096, (14336, 14336)))  # BERT, Llama, its gate and up
DRY_SHAPES = ((32, (48, 16)),)
NEEDS = (True, True, True)
Outputs = tuple[Tensor, ...]
Call = Callable[[list[Layer]], Outputs]


@dataclass(frozen=True)
class GroupCase:
    """K in-features, out-features N of each layer, M tokens, rank R; x, W and y in bf16, adapters in ``adapter``."""

    K: int
    N: tuple[int, ...]
    M: int
    R: int
    adapter: str

    @property
    def layers(self) -> list[Case]:
        """Of each layer alone."""
        return [Case(self.K, n, self.M, self.R, self.adapter) for n in self.N]

    def __str__(self) -> str:
        return f"{self.K}x{'+'.join(map(str, self.N))} M={self.M} r={self.R} {self.adapter} adapter"

    def record(self) -> dict[str, Any]:
        """As it is written down."""
        return asdict(self)


_RAGGED, _REGULAR = (40, 33, (72, 20), (12, 5)), (300, 768, (768, 256, 256), (16, 16, 16))
CHECKED = ((_RAGGED, torch.bfloat16), (_RAGGED, torch.float32), (_REGULAR, torch.bfloat16))


def check(number: int, machine: Machine) -> list[Check]:
    """A group's shared passes against fp64, bit for bit twice, and replayed from a CUDA graph; one of ``CHECKED``."""
    (m, k, ns, ranks), dtype = CHECKED[number]
    name = f"group: {m}x{k}x{'+'.join(map(str, ns))} r={'+'.join(map(str, ranks))} {dtype}"
    with judged(name, GROUP) as check:
        run, same, exact = _runs(m, k, ns, ranks, dtype, machine)
        with poisoned():
            found, again = run(), run()
        for quantity, tensors in same.items():
            assert_within_budget(quantity, found[quantity], tensors, exact[quantity])
        assert_repeats(tuple(found.values()), tuple(again.values()))
        replayed: list[dict[str, Tensor]] = []
        replay = machine.recorded([lambda: replayed.append(run())])
        replay()
        machine.wait()
        assert_repeats(tuple(found.values()), tuple(replayed[-1].values()))
    return check


def _runs(
    m: int, k: int, ns: Sequence[int], ranks: Sequence[int], dtype: torch.dtype, machine: Machine
) -> tuple[Callable[[], dict[str, Tensor]], dict[str, Tensor], dict[str, Tensor]]:
    """Ours, with its passes shared, and what the reference makes of the same inputs in their dtype and in fp64."""
    inputs = [
        layer_inputs(m, k, n, r, dtype, torch.float32, bias=i == 0, device=machine.device, seed=i)
        for i, (n, r) in enumerate(zip(ns, ranks, strict=True))
    ]

    def run(how: Any, compute: torch.dtype, *plan: str) -> dict[str, Tensor]:
        given = inputs if compute is dtype else [i.to(compute) for i in inputs]
        adapters = [Adapter(i.lora_A, i.lora_E, i.lora_B, None, None, 1.5, 0.0, compute) for i in given]
        members = [Member(i.weight, i.bias, adapter) for i, adapter in zip(given, adapters, strict=True)]
        made = how.forward(given[0].x, members, *plan)
        grads, us = [i.grad_y for i in given], [u for _, u in made]
        dx, gradients = how.backward(grads, given[0].x, us, members, True, [NEEDS] * len(members), *plan)
        found = {"dx": dx} | {f"y[{i}]": y for i, (y, _) in enumerate(made)}
        for i, of_layer in enumerate(gradients):
            found |= {f"{name}[{i}]": g for name, g in zip(("dA", "dE", "dB"), of_layer, strict=True)}
        return found

    plan = STACK.partition(":")[2]
    return lambda: run(group, dtype, plan), run(reference, dtype), run(reference, torch.float64)


def measure(case: GroupCase, machine: Machine, withheld: Withheld = NOTHING) -> list[dict[str, Any]]:
    """Forward, and forward + backward, of the group, of its layers one by one, and of what they replace.

    Who depends on what is withheld is not timed, nor is who computes something else here.

    Returns:
        Two records, as ``timed.measure`` makes them of a layer.
    """
    sets = _sets(case, machine)
    calls: dict[str, Call] = {
        contest.FROZEN: lambda layers: tuple(F.linear(layers[0].x, layer.weight, layer.bias) for layer in layers),
        contest.PEFT: lambda layers: tuple(layer.modules[contest.PEFT](layers[0].x) for layer in layers),
        "one by one": _one_by_one(case),
        contest.OURS: _grouped(case, "triton"),
        STACK: _grouped(case, STACK),
    }
    failed = not_trusted(case, sets[0], withheld)
    differing = disagreeing({name: call for name, call in calls.items() if name not in failed}, sets[0])
    out = differing | failed
    with torch.no_grad():
        members = _members(case, sets[0])
    plan, configuration, reason = group.explain(sets[0][0].x, members)
    about: dict[str, Any] = {
        "benchmark": "group", "case": case.record(), "plan": plan, "configuration": configuration, "reason": reason
    }  # fmt: skip
    about |= {"withheld": out} if out else {}
    calls = {name: call for name, call in calls.items() if name not in out}
    records = []
    for direction, prepare in ((FORWARD, _forward_run), (BOTH, _both_run)):
        runs = {name: [prepare(name, call, layers) for layers in sets] for name, call in calls.items()}
        records.append(about | {"direction": direction, "copies": len(sets), **replayed(runs, machine)})
    return records


def not_trusted(case: GroupCase, layers: list[Layer], withheld: Withheld) -> dict[str, str]:
    """Of what is ours, what depends on a failed check: the group's own, or any that a plan of its layers failed."""
    chosen = (explain(alone, layer)[0] for alone, layer in zip(case.layers, layers, strict=True))
    of_layers = next((said for plan in chosen if (said := why(withheld, plan, BOTH))), None)
    of_group = withheld.get(GROUP) or of_layers
    found = {"one by one": of_layers, contest.OURS: of_group, STACK: withheld.get(GROUP)}
    return {name: said for name, said in found.items() if said}


def disagreeing(calls: dict[str, Call], layers: list[Layer]) -> dict[str, str]:
    """What is wrong with whom: every contestant but the frozen linears must compute what PEFT does.

    Further from PEFT's result, by norm, than four roundings of bf16 is wrong, and whatever raises.
    """
    want = [*calls[contest.PEFT](layers), *_gradients(contest.PEFT, calls[contest.PEFT], layers)]
    found: dict[str, str] = {}
    for name, call in calls.items():
        if name in (contest.FROZEN, contest.PEFT):
            continue
        try:
            got = [*call(layers), *_gradients(name, call, layers)]
        except Exception as error:
            found[name] = message_of(error)
            continue
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            error_of = contest.apart(a, b)
            if not error_of <= 4 * torch.finfo(contest.DTYPE).eps:
                found[name] = f"result {i} differs from PEFT's by {error_of:.2e}"
    return found


def _sets(case: GroupCase, machine: Machine) -> list[list[Layer]]:
    """Sets of inputs, in each of which all layers have the first one's x."""
    by_layer = [contest.layers(layer, machine) for layer in case.layers]
    sets = [list(layers) for layers in zip(*by_layer, strict=False)]
    for layers in sets:
        for layer, of in zip(layers, case.layers, strict=True):
            layer.x = layers[0].x
            contest.add_peft(of, layer)
    return sets


def _members(case: GroupCase, layers: list[Layer]) -> list[Member]:
    of = zip(case.layers, layers, strict=True)
    return [Member(layer.weight, layer.bias, contest.adapter_of(alone, layer)) for alone, layer in of]


def _grouped(case: GroupCase, backend: str) -> Call:
    scaling = case.layers[0].scaling

    def call(layers: list[Layer]) -> Outputs:
        given = [(layer.weight, *layer.adapter, layer.bias, None, scaling) for layer in layers]
        return svd_linear_group(layers[0].x, given, backend=backend)

    return call


def _one_by_one(case: GroupCase) -> Call:
    calls = [contest.ours(alone, "triton") for alone in case.layers]
    return lambda layers: tuple(call(layer) for call, layer in zip(calls, layers, strict=True))


def _forward_run(name: str, call: Call, layers: list[Layer]) -> Run:
    def run() -> Outputs:
        with torch.no_grad():
            return call(layers)

    return run


def _both_run(name: str, call: Call, layers: list[Layer]) -> Run:
    return lambda: _gradients(name, call, layers)


def _gradients(name: str, call: Call, layers: list[Layer]) -> tuple[Tensor, ...]:
    """Of x and the adapters; the frozen linears have that of x alone."""
    leaves = [layers[0].x]
    if name != contest.FROZEN:
        leaves += [t for layer in layers for t in layer.adapter]
    return torch.autograd.grad(call(layers), leaves, [layer.grad_y for layer in layers])


__all__ = ["CHECKED", "DRY_SHAPES", "SHAPES", "GroupCase", "check", "disagreeing", "measure"]
