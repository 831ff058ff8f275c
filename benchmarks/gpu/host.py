"""Host time: of an eager layer, forward and backward, beside PEFT's LoRA and AdaLoRA; and of one launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from adalora_kernels import SVDLinear
from adalora_kernels.backends import triton
from adalora_kernels.reference.svd_linear import Adapter
from benchmarks.gpu.machine import Machine, Run
from benchmarks.gpu.withheld import BOTH, Withheld, why
from benchmarks.timing import Sample, ratio

FEATURES, RANK, TOKENS = 768, 16, 64  # so little that the device waits for the host
DRY_FEATURES = 32
CALLS = 50


def modules(features: int, machine: Machine) -> dict[str, nn.Module]:
    """Layers of the same shape in bf16: ours, and PEFT's two."""
    from peft import AdaLoraConfig, LoraConfig
    from peft.tuners.adalora.layer import SVDLinear as PeftAdaLora
    from peft.tuners.lora.layer import Linear as PeftLora

    with torch.device(machine.device):
        lora = LoraConfig(r=RANK, lora_alpha=RANK, lora_dropout=0.0)
        adalora = AdaLoraConfig(init_r=RANK, target_r=RANK, lora_alpha=RANK, total_step=100)
        found = {
            "ours": SVDLinear(features, features, r=RANK, backend="triton"),
            "PEFT LoRA": PeftLora(nn.Linear(features, features), "default", lora, r=RANK, lora_alpha=RANK),
            "PEFT AdaLoRA": PeftAdaLora(nn.Linear(features, features), "default", adalora, r=RANK, lora_alpha=RANK),
        }
    for module in found.values():
        module.to(torch.bfloat16)
        for name, parameter in module.named_parameters():
            parameter.requires_grad_("lora_" in name)
    return found


def queued(step: Run, calls: int, machine: Machine, before: Run | None = None) -> Callable[[], Run]:
    """A contestant that queues ``step`` many times on an idle device; ``before`` is called first, untimed."""

    def run() -> None:
        for _ in range(calls):
            step()

    def prepare() -> Run:
        if before is not None:
            before()
        step()
        machine.wait()
        return run

    return prepare


def measure(machine: Machine, withheld: Withheld) -> dict[str, Any]:
    """Microseconds of host time for one eager forward + backward, as a user's loop spends it.

    The device is idle when the clock starts and is not waited for: what is timed is the queueing.

    Raises:
        AssertionError: a plan that failed its checks is chosen.
    """
    calls, features = (1, DRY_FEATURES) if machine.dry else (CALLS, FEATURES)
    x = torch.randn(TOKENS, features, device=machine.device, dtype=torch.bfloat16, requires_grad=True)
    g = torch.randn_like(x)

    contestants = modules(features, machine)
    ours: Any = contestants["ours"]
    adapter = Adapter(ours.lora_A, ours.lora_E, ours.lora_B, None, None, 1.0, 0.0, torch.bfloat16)
    plan = triton.explain(x, ours.weight, adapter)[0]
    failed = why(withheld, plan, BOTH)
    assert failed is None, f"{plan}: {failed}"

    def loop(module: nn.Module) -> Callable[[], Run]:
        parameters = [p for p in module.parameters() if p.requires_grad]

        def step() -> None:
            y: Tensor = module(x)
            y.backward(g)

        def clear() -> None:
            for tensor in (x, *parameters):
                tensor.grad = None

        return queued(step, calls, machine, clear)

    seconds = machine.interleaved({name: loop(module) for name, module in contestants.items()})
    scaled = {name: [1e6 * s / calls for s in values] for name, values in seconds.items()}
    return {
        "benchmark": "host time of an eager layer, forward + backward",
        "case": {"K": features, "N": features, "M": TOKENS, "R": RANK},
        "microseconds": {name: vars(Sample.of(values)) for name, values in scaled.items()},
        "ours_over_lora": ratio(seconds["ours"], seconds["PEFT LoRA"]),
        "rounds": machine.rounds,
    }


__all__ = ["measure", "queued"]
