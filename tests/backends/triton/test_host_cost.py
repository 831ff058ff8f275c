"""What one eager layer, forward and backward, asks of the host: launches and operators, beside PEFT's LoRA layer.

Counted on the CPU with launches stubbed; ``make gpu`` times the same on a device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

triton = pytest.importorskip("triton")
pytest.importorskip("peft")

from adalora_kernels import SVDLinear  # noqa: E402
from adalora_kernels.backends import select  # noqa: E402
from tests.backends.triton.stub_driver import Count, StubDriver, stub_driver  # noqa: E402

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set in this process")

FEATURES, RANK, TOKENS = 64, 16, 16
NO_KERNEL = ("t", "view", "detach", "empty", "empty_like", "new_empty_strided")  # views, and memory


class Operators(TorchDispatchMode):
    """Counts what passes the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[StubDriver]:
    """Triton takes CPU tensors, and launches nothing."""
    monkeypatch.setattr(select, "unavailable_reason", lambda backend, device_type: None)
    select._select.cache_clear()
    with stub_driver() as driver:
        driver.launches = Count()
        yield driver
    select._select.cache_clear()


def operators(layer: nn.Module) -> list[str]:
    """Of the second step, when all is compiled and kept."""
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_("lora_" in name)
    x = torch.randn(TOKENS, FEATURES, requires_grad=True)
    grad_y = torch.randn(TOKENS, FEATURES)
    layer(x).backward(grad_y)
    x.grad = None
    layer.zero_grad()
    with Operators() as counted:
        layer(x).backward(grad_y)
    return counted.names


def test_fewer_than_lora(stub: StubDriver, record_property: Callable[[str, object], None]) -> None:
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear

    config = LoraConfig(r=RANK, lora_alpha=RANK, lora_dropout=0.0)
    lora = operators(Linear(nn.Linear(FEATURES, FEATURES), "default", config, r=RANK, lora_alpha=RANK))
    ours = operators(SVDLinear(FEATURES, FEATURES, r=RANK, backend="triton"))
    launches = stub.launches.number // 2
    kernels, lora_kernels = (sum(name.split(".")[1] not in NO_KERNEL for name in names) for names in (ours, lora))
    text = f"{launches} launches, {kernels} kernels of torch, {len(ours) - kernels} other operators; "
    text += f"PEFT's LoRA {lora_kernels} kernels and {len(lora) - lora_kernels} other operators"
    record_property("measured", f"host side of an eager layer, forward + backward: {text}")
    assert launches >= 2
    assert launches + kernels <= lora_kernels / 2
    assert launches + len(ours) < len(lora)
