"""nn.DataParallel's replicas: refused where PEFT's layers are fused, with the cure; correct in the original's class.

Its broadcast needs CUDA devices. Here it is replaced by one that makes copies on the CPU which autograd follows, as it
does; everything else is torch's own.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from adalora_kernels.integrations.peft import patch_model, unpatch_model
from adalora_kernels.nn import SVDLinear
from tests.integrations.one_layer import adapted, inputs, layer_of, linear
from tests.integrations.one_layer import fused_calls as fused_calls
from tests.integrations.sibling_models import LLAMA
from tests.integrations.small_models import batch, build

Replicate = Callable[[nn.Module, list[int]], list[nn.Module]]


@pytest.fixture
def replicate(monkeypatch: pytest.MonkeyPatch) -> Replicate:
    module = importlib.import_module("torch.nn.parallel.replicate")

    def copies(tensors: list[Tensor], devices: list[int], detach: bool = False) -> list[list[Tensor]]:
        return [[t.detach().clone() if detach else t.clone() for t in tensors] for _ in devices]

    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", copies)
    monkeypatch.setattr(module, "_get_device_index", lambda device, *_: device)
    return module.replicate


@pytest.mark.parametrize("base", ["plain", "quantised"])
def test_replicas_of_fused_layers_are_refused(base: str, replicate: Replicate, fused_calls: list[str]) -> None:
    if base == "quantised":
        bitsandbytes = pytest.importorskip("bitsandbytes")
        quantised = bitsandbytes.nn.Linear4bit(64, 48, quant_type="nf4")
        quantised.load_state_dict(linear().state_dict())
        model = adapted(quantised.to("cpu"), flag="is_loaded_in_4bit")
    else:
        model = adapted(linear())
    patch_model(model)
    expected = model(inputs())
    fused_calls.clear()
    for replica in replicate(model, [0, 1]):
        with pytest.raises(RuntimeError, match=r"nn\.DataParallel.*torchrun.*DistributedDataParallel"):
            replica(inputs())
    assert not fused_calls
    torch.testing.assert_close(model(inputs()), expected)  # the original works on


def test_a_whole_model_with_siblings(replicate: Replicate) -> None:
    model = patch_model(build("llama", **LLAMA), siblings=True)
    for _ in range(2):
        model(**batch(model)).loss.backward()
    (replica,) = replicate(model, [0])
    with pytest.raises(RuntimeError, match="DataParallel"):
        replica(**batch(model))
    with torch.no_grad():
        assert torch.isfinite(model(**batch(model)).loss)


def test_one_device_is_no_replica() -> None:
    """There DataParallel calls the model itself."""
    model = patch_model(adapted(linear()))
    torch.testing.assert_close(nn.DataParallel(model)(inputs()), model(inputs()))


def test_unpatched_replicas_run(replicate: Replicate) -> None:
    """So it is what our layers can't do that is refused, and only that."""
    model = unpatch_model(patch_model(adapted(linear())))
    (replica,) = replicate(model, [0])
    torch.testing.assert_close(replica(inputs()), model(inputs()))
    assert layer_of(replica)._is_replica


def test_replicas_of_the_originals_class_are_right(replicate: Replicate) -> None:
    """Each gives its share of the gradient to the parameters of the model."""
    torch.manual_seed(0)
    model = nn.Sequential(SVDLinear(64, 48, r=4), nn.Tanh(), SVDLinear(48, 8, r=4))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3)
    halves = inputs().detach().chunk(2)
    model(inputs().detach()).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    replicas = replicate(model, [0, 1])
    sum(replica(half).square().sum() for replica, half in zip(replicas, halves, strict=True)).backward()
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient)
