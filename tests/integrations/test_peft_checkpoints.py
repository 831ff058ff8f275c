"""Checkpoints go both ways between patched and unpatched PEFT."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

from adalora_kernels.integrations.adalora_model import FusedAdaLoraModel
from adalora_kernels.integrations.peft import layer_report, patch_model, patch_peft, unpatch_model, unpatch_peft
from tests.integrations.small_models import adapter_parameters, batch, build, train, twins


def _save(model: PeftModel, folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no vocabulary to compare with
        model.save_pretrained(folder)


def _load(architecture: str, folder: Path, fused: bool, adapter: str = "default", **options: object) -> PeftModel:
    base = build(architecture, dtype=options.pop("dtype", torch.float32)).unload()
    if fused:
        patch_peft()
    try:
        return PeftModel.from_pretrained(base, folder, adapter_name=adapter, **options)
    finally:
        unpatch_peft()


def _logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=batch(model, seed=99)["input_ids"]).logits


@pytest.mark.parametrize("architecture", ["deberta", "llama", "gpt2"])
@pytest.mark.parametrize("steps", [10, 20], ids=["while-pruning", "at-the-end"])
def test_round_trips_in_all_directions(architecture: str, steps: int, tmp_path: Path) -> None:
    for writer, model in zip(("peft", "fused"), twins(build(architecture)), strict=True):
        train(model, steps)
        _save(model, tmp_path / writer)
        expected = _logits(model)
        for fused in (False, True):
            loaded = _load(architecture, tmp_path / writer, fused)
            assert isinstance(loaded.base_model, FusedAdaLoraModel) is fused
            # While pruning, a row that was masked is not saved although its E has moved since: so is PEFT's format.
            if steps == 20:
                torch.testing.assert_close(_logits(loaded), expected, rtol=1e-4, atol=1e-5)
            other = _load(architecture, tmp_path / writer, not fused)
            torch.testing.assert_close(_logits(loaded), _logits(other), rtol=1e-5, atol=1e-6)


def test_the_files_are_pefts(tmp_path: Path) -> None:
    theirs, ours = twins(build("perceptron", dtype=torch.float64))
    for name, model in (("peft", theirs), ("fused", ours)):
        train(model, 20)
        _save(model, tmp_path / name)
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("peft", "fused")]
    assert configs[0] == configs[1]
    tensors = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "fused")]
    assert tensors[0].keys() == tensors[1].keys()
    for name, value in tensors[0].items():
        assert value.shape == tensors[1][name].shape and value.dtype == tensors[1][name].dtype
        torch.testing.assert_close(tensors[1][name], value)


def test_saving_in_the_middle_does_not_disturb_the_training(tmp_path: Path) -> None:
    left, right = (patch_model(build("llama")) for _ in range(2))
    for model in (left, right):
        train(model, 10)
        if model is left:
            _save(model, tmp_path)
    assert train(left, 10, start=10) == train(right, 10, start=10)
    assert left.peft_config["default"].rank_pattern == right.peft_config["default"].rank_pattern


def test_loading_keeps_the_factor_and_the_precision(tmp_path: Path) -> None:
    """PEFT rounds fp32 adapters over a bf16 base on the way in, and its factor follows the rank where alpha ≤ 0."""
    model = patch_model(build("llama", dtype=torch.bfloat16, lora_alpha=-1))
    train(model, 20)
    _save(model, tmp_path)
    loaded = _load("llama", tmp_path, fused=True, dtype=torch.bfloat16)
    layers = dict(loaded.named_modules())
    for name, layer in model.named_modules():
        if hasattr(layer, "ranknum") and name:
            assert layers[name].scaling == layer.scaling and layers[name].ranknum["default"].item() == 6.0
            assert not layers[name].ranknum["default"].requires_grad
    stored, read = get_peft_model_state_dict(model), get_peft_model_state_dict(loaded)
    assert all(torch.equal(read[name], value) for name, value in stored.items())
    assert torch.equal(_logits(loaded), _logits(model))


@pytest.mark.parametrize("patched_when", ["before", "after"])
def test_a_loaded_model_trains_on_and_saves_again(patched_when: str, tmp_path: Path) -> None:
    """PEFT: over-pruning before T - tf, KeyError at it, a size error after it."""
    first = patch_model(build("llama"))
    train(first, 10)
    _save(first, tmp_path / "first")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resumed = _load("llama", tmp_path / "first", fused=patched_when == "before", is_trainable=True)
    assert any("averages start anew" in str(w.message) for w in caught) is (patched_when == "before")
    patch_model(resumed).train()
    loaded_rows = {name: p.shape[0] for name, p in adapter_parameters(resumed).items() if "lora_E" in name}
    # What trains has its masked rows, which may come back; PEFT's from_pretrained has left them out.
    rows = 6 * len(loaded_rows)
    assert sum(loaded_rows.values()) == rows if patched_when == "before" else 0 < sum(loaded_rows.values()) < rows
    torch.testing.assert_close(_logits(resumed), _logits(_load("llama", tmp_path / "first", fused=False)))
    resumed.train()
    train(resumed, 10, start=10)
    pattern = resumed.peft_config["default"].rank_pattern
    assert all(len(row) == 6 for row in pattern.values())
    assert sum(map(sum, pattern.values())) == 3 * len(pattern)
    _save(resumed, tmp_path / "second")
    for fused in (False, True):
        again = _load("llama", tmp_path / "second", fused)
        torch.testing.assert_close(_logits(again), _logits(resumed), rtol=1e-4, atol=1e-5)
    unpatch_model(resumed)
    torch.testing.assert_close(_logits(resumed), _logits(again), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adapter", ["q", "a", "self_attn"])
def test_an_adapter_whose_name_is_in_the_paths(adapter: str, tmp_path: Path) -> None:
    model = patch_model(build("llama", adapter=adapter))
    train(model, 20)
    _save(model, tmp_path)
    folder = tmp_path / adapter
    paths = {
        name.removesuffix(".lora_E")
        for name in json.loads((folder / "adapter_config.json").read_text())["rank_pattern"]
    }
    assert paths == {report.name.removeprefix("base_model.model.") for report in layer_report(model)}
    loaded = _load("llama", folder, fused=True, adapter=adapter)
    torch.testing.assert_close(_logits(loaded), _logits(model), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(_logits(_load("llama", folder, fused=False)), _logits(model), rtol=1e-4, atol=1e-5)


def test_a_foreign_pattern_is_refused() -> None:
    model = patch_model(build("llama"))
    with pytest.raises(ValueError, match="names no AdaLoRA layer"):
        model.base_model.resize_modules_by_rank_pattern({"nowhere.lora_E": [True] * 6}, "default")
    name = "model.layers.0.self_attn.q_proj.lora_E"
    with pytest.raises(ValueError, match="expected 6 entries"):
        model.base_model.resize_modules_by_rank_pattern({name: [True] * 5}, "default")
    for row in (5, [3, 4], ["false"] * 6, [[True]] * 6):
        with pytest.raises(ValueError, match="expected a list of booleans"):
            model.base_model.resize_modules_by_rank_pattern({name: row}, "default")
    with pytest.raises(ValueError, match="rank_pattern: expected rows by layer, got 3"):
        model.base_model.resize_modules_by_rank_pattern(3, "default")
    assert model.get_base_model().model.layers[0].self_attn.q_proj.lora_A["default"].shape[0] == 6
