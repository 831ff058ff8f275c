"""Models that accelerate has spread over devices and disk: its hooks freeze the forwards of instances."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.adalora.layer import SVDLinear
from torch import nn

from adalora_kernels.allocator import find_triplets, triplets
from adalora_kernels.allocator.devices import SpreadState
from adalora_kernels.integrations.checkpoint import save_training_state
from adalora_kernels.integrations.peft import layer_report, patch_model, patch_peft, unpatch_model
from adalora_kernels.integrations.svd_layer import FusedSVDLinear
from tests.integrations.one_layer import fused_calls as fused_calls
from tests.integrations.small_models import adapter_parameters, batch, build, train

accelerate = pytest.importorskip("accelerate")

_PREFIX = "base_model.model."
_BLOCKS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")


def _layers(model: nn.Module) -> list[SVDLinear]:
    return [module for module in model.modules() if isinstance(module, SVDLinear)]


def _dispatched(model: nn.Module) -> nn.Module:
    device_map = {_PREFIX + block: "cpu" for block in _BLOCKS}
    return accelerate.dispatch_model(model, device_map=device_map, main_device="cpu", force_hooks=True)


def _loss_and_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = model(**batch(model)).loss
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in adapter_parameters(model).items()}}


@pytest.mark.parametrize("patched", ["before", "after"])
def test_frozen_forwards_are_fused(patched: str, fused_calls: list[str]) -> None:
    """With the class alone exchanged, every layer would go on in PEFT's forward."""
    plain = build("llama", dtype=torch.float64, layers=2)
    expected = _loss_and_gradients(plain)
    model = copy.deepcopy(plain)
    if patched == "before":
        patch_model(model)
    _dispatched(model)
    layers = _layers(model)
    assert all("_old_forward" in vars(layer) and "_old_forward" in vars(layer.base_layer) for layer in layers)
    if patched == "after":
        assert _loss_and_gradients(model)["loss"] == expected["loss"] and not fused_calls
        patch_model(model)
    actual = _loss_and_gradients(model)
    assert fused_calls == ["svd_linear_into"] * len(layers)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value)
    assert all(report.fused and "replaced on the instance" in report.reason for report in layer_report(model))

    fused_calls.clear()
    unpatch_model(model)
    assert _loss_and_gradients(model)["loss"] == expected["loss"] and not fused_calls
    assert all(layer._old_forward.__func__ is SVDLinear.forward for layer in layers)


def test_hooks_taken_off_again(fused_calls: list[str]) -> None:
    """What accelerate leaves on the instances is no obstacle."""
    model = patch_model(_dispatched(build("llama", layers=1)))
    expected = model(**batch(model)).loss
    accelerate.hooks.remove_hook_from_submodules(model)
    assert all("forward" in vars(layer) for layer in _layers(model))
    fused_calls.clear()
    torch.testing.assert_close(model(**batch(model)).loss, expected)
    assert fused_calls == ["svd_linear"] * len(_layers(model))


def test_bases_offloaded_to_disk(tmp_path: Path, fused_calls: list[str]) -> None:
    """Their weights are on the meta device except within their own call; two steps and the allocator."""
    plain = build("llama", dtype=torch.float64, layers=1, total_step=4, tinit=0, tfinal=1, deltaT=1)
    models = [plain, copy.deepcopy(plain), copy.deepcopy(plain)]
    for i, model in enumerate(models[1:]):
        for j, layer in enumerate(_layers(model)):
            accelerate.disk_offload(layer.base_layer, str(tmp_path / f"{i}-{j}"), execution_device=torch.device("cpu"))
            assert layer.base_layer.weight.is_meta
    patch_model(models[2])
    losses = [train(model, 4) for model in models]
    assert losses[1] == losses[0]
    assert losses[2] == pytest.approx(losses[0], rel=1e-6)  # transformers' losses are in fp32
    assert set(fused_calls) == {"svd_linear_into"}
    assert len(fused_calls) == 4 * len(_layers(models[2]))
    assert models[2].peft_config["default"].rank_pattern == plain.peft_config["default"].rank_pattern


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_adapters_loaded_onto_a_dispatched_base(where: str, tmp_path: Path, fused_calls: list[str]) -> None:
    """``from_pretrained`` dispatches the base anew, with the adapter in it."""
    adapter = build("llama", layers=2)
    expected = adapter.eval()(**batch(adapter)).logits
    adapter.save_pretrained(tmp_path / "adapter")
    device_map = {block: where if block == "model.layers.1" else "cpu" for block in _BLOCKS}
    base = accelerate.dispatch_model(
        adapter.unload(), device_map, main_device="cpu", offload_dir=str(tmp_path / "base"), force_hooks=True
    )
    patch_peft()
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter", offload_folder=str(tmp_path / "whole"))
    assert all(type(layer) is FusedSVDLinear for layer in _layers(loaded))
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch(loaded)).logits, expected.detach())
    assert len(fused_calls) == len(_layers(loaded))


def test_adapters_that_were_themselves_offloaded_fail_as_in_peft(tmp_path: Path) -> None:
    """PEFT's parameters have no forward at whose call accelerate could bring them back."""
    model = build("llama", layers=2)
    device_map = {_PREFIX + block: "disk" if block == "model.layers.1" else "cpu" for block in _BLOCKS}
    messages = []
    for twin in (model, patch_model(copy.deepcopy(model))):
        accelerate.dispatch_model(twin, device_map, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
        with pytest.raises(RuntimeError, match="meta") as raised:
            twin(**batch(twin))
        messages.append(str(raised.value))
    assert messages[0] == messages[1]
    reasons = {report.reason for report in layer_report(twin) if not report.fused}
    assert reasons == {"lora_A is a Parameter on meta"}


def test_layers_spread_while_they_train(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """From one device to two, and from a checkpoint of these to three: averages, masks and weights as if never moved.

    The devices are marks on the layers' E.
    """
    monkeypatch.setattr(triplets, "place_of", lambda E: getattr(E, "mark", 0))

    def spread(model: PeftModel, places: int) -> None:
        for i, t in enumerate(find_triplets(model)):
            t.lora_E.mark = i % places

    plain = build("llama", dtype=torch.float64, layers=1, total_step=12, tinit=0, tfinal=2, deltaT=2)
    whole, moved, resumed = (patch_model(copy.deepcopy(plain)) for _ in range(3))
    spread(resumed, 3)
    for start in (0, 3, 6):
        train(whole, 3, start=start)
    train(moved, 3)
    spread(moved, 2)
    train(moved, 3, start=3)
    moved.save_pretrained(tmp_path)
    save_training_state(moved, tmp_path)
    resumed.load_adapter(tmp_path, "default", is_trainable=True)
    train(resumed, 3, start=6)
    kinds = [type(model.base_model.rank_allocator().importance) for model in (whole, moved, resumed)]
    assert kinds[0] is not SpreadState and kinds[1:] == [SpreadState, SpreadState]
    assert resumed.peft_config["default"].rank_pattern == whole.peft_config["default"].rank_pattern is not None
    for name, value in adapter_parameters(whole).items():
        assert torch.equal(adapter_parameters(resumed)[name], value), name
    averages = [unpatch_model(model).base_model.rankallocator.exp_avg_ipt for model in (whole, resumed)]
    assert averages[0].keys() == averages[1].keys() != set()
    assert all(torch.equal(averages[1][name], value) for name, value in averages[0].items())
