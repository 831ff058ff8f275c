"""What a user can get wrong around PEFT: each error names what was expected, what came and the cure."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from adalora_kernels import (
    AdaLoraCallback,
    RankAllocator,
    compute_orth_regu,
    export_lora,
    load_training_state,
    patch_model,
    recommended_config,
    save_training_state,
    unpatch_model,
)
from adalora_kernels.integrations.peft import layer_report
from tests.integrations.small_models import build
from tests.integrations.small_models_trainer import make_trainer


def _allocator(model: Any) -> RankAllocator:
    return RankAllocator(model, 6, 2, 2, 5, 1, 0.85, 0.85)


ENTRIES: dict[str, tuple[Callable[[Any, Path], object], str]] = {
    "patch_model": (lambda m, _: patch_model(m), r"PeftModel.*get_peft_model\(model, AdaLoraConfig\(\.\.\.\)\)"),
    "unpatch_model": (lambda m, _: unpatch_model(m), r"PeftModel.*get_peft_model\(model, AdaLoraConfig\(\.\.\.\)\)"),
    "layer_report": (lambda m, _: layer_report(m), r"PeftModel.*get_peft_model\(model, AdaLoraConfig\(\.\.\.\)\)"),
    "export_lora": (export_lora, r"adapter: expected one of ADALORA, .*the model has 'default' of LORA"),
    "save_training_state": (save_training_state, r"PeftModel.*call patch_model\(model\) first"),
    "load_training_state": (load_training_state, r"PeftModel.*call patch_model\(model\) first"),
    "RankAllocator": (lambda m, _: _allocator(m), r"PeftModel.*get_peft_model\(model, AdaLoraConfig\(\.\.\.\)\)"),
    "compute_orth_regu": (lambda m, _: compute_orth_regu(m), r"PeftModel.*get_peft_model\(model, AdaLoraConfig"),
    "recommended_config": (lambda m, _: recommended_config(m, 100, 4), r"PEFT's layers in it; .*model\.unload\(\)"),
}


@pytest.fixture(scope="module")
def lora() -> PeftModel:
    return get_peft_model(build("llama").unload(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_peft_model_without_adalora(entry: str, lora: PeftModel, tmp_path: Path) -> None:
    call, message = ENTRIES[entry]
    with pytest.raises(ValueError, match=message):
        call(lora, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("entry", ENTRIES)
def test_what_is_no_model(entry: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"^\w+: expected .*, got str$"):
        ENTRIES[entry][0]("model", tmp_path)


def test_the_callback_without_adalora(lora: PeftModel, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"expected one PEFT AdaLoRA model in PeftModel.*give the callback an allocator"
    ):
        make_trainer(lora, tmp_path, AdaLoraCallback()).train()


def test_the_allocator_of_an_adapter_that_is_not_there() -> None:
    model = patch_model(build("llama"))
    with pytest.raises(
        ValueError, match="expected layers with lora_A, lora_E and lora_B for adapter 'other', found none"
    ):
        RankAllocator(model, 6, 2, 2, 5, 1, 0.85, 0.85, adapter="other")
    with pytest.raises(ValueError, match="found none in Linear"):
        patch_model(nn.Linear(3, 3))


_MISSING = """
import importlib.metadata as metadata, sys
import adalora_kernels

installed = metadata.version

def version(name):
    if name == package:
        raise metadata.PackageNotFoundError(name)
    return installed(name)

def forget(*packages):  # also what an import that failed has left
    for name in [m for m in sys.modules if m.startswith(packages)]:
        del sys.modules[name]

for package, names in {
    "peft": ("patch_model", "export_lora", "recommended_config"),
    "transformers": ("patch_model", "export_lora", "recommended_config", "AdaLoraCallback"),
    "safetensors": ("export_lora", "save_training_state", "load_training_state"),
}.items():
    metadata.version = version
    for name in names:
        forget("peft", "transformers", "accelerate", "safetensors", "adalora_kernels.integrations.")
        sys.modules[package] = None  # what Python takes for a module that isn't there
        vars(adalora_kernels).pop(name, None)
        try:
            getattr(adalora_kernels, name)
            print(package, name, "is not missed")
        except ImportError as error:
            print(package, name, error)
"""


def test_a_missing_optional_package() -> None:
    """PEFT, and what it needs."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", _MISSING], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 10
    for line in lines:
        package, _, error = line.split(" ", 2)
        named = package in error and "install that" in error  # where PEFT is there and misses it
        assert named or "pip install 'adalora-kernels[peft]'" in error, line
