"""What users have met on several devices, by thread: P of huggingface/peft, in worlds of one rank.

Unpatched PEFT fails there as with many. That many ranks agree with one process is in ``tests/distributed``.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from adalora_kernels.integrations.peft import patch_model
from tests.distributed import worlds
from tests.integrations import small_models_sharded
from tests.integrations.small_models import batch, build

LIVE = 3 * 6  # of six adapted layers


@pytest.fixture(scope="module")
def zero(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str | int, str | int]]:
    """What came of ZeRO-2 and 3, unpatched and patched; DeepSpeed takes long to import."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    folder = tmp_path_factory.mktemp("zero") / "world"
    (found,) = worlds.run(1, folder, small_models_sharded.in_turn, ("zero_2", "zero_3"), timeout=120.0)
    return found


def test_P1625_deepspeed_has_no_gradients_left(zero: dict[str, tuple[str | int, str | int]]) -> None:
    """``p.grad`` is None after the engine's step; what PEFT asks instead, it asks under transformers' Trainer alone."""
    theirs, ours = zero["zero_2"]
    assert isinstance(theirs, str) and "'Parameter' and 'NoneType', in self.ipt[n] = (p * p.grad)" in theirs
    assert ours == LIVE


def test_P927_defect_12_eye_under_zero_3(zero: dict[str, tuple[str | int, str | int]]) -> None:
    """Partitioned parameters are empty vectors to PEFT's orthogonality term."""
    theirs, ours = zero["zero_3"]
    assert isinstance(theirs, str) and theirs.startswith("TypeError: eye() missing 1 required positional argument")
    assert ours == LIVE


def test_P1852_defect_12_fsdp(tmp_path: Path) -> None:
    """Sharded parameters in PEFT's orthogonality term."""
    ((theirs, ours),) = worlds.run(1, tmp_path / "world", small_models_sharded.outcomes, "fsdp")
    assert isinstance(theirs, str) and theirs.endswith("in outputs.loss += orth_reg_weight * regu_loss")
    assert ours == LIVE


def test_P581_ranknum_on_another_device() -> None:
    """Left on the CPU where the adapter went to a GPU; PEFT has moved it since. Here the other device is meta."""
    for model in (build("llama"), patch_model(build("llama")), patch_model(build("llama").to("meta"))):
        model.to("meta")
        assert {p.device.type for p in model.parameters()} == {"meta"}
        assert any("ranknum" in name for name, _ in model.named_parameters())
        inputs = {name: value.to("meta") for name, value in batch(model).items()}
        logits = model.eval().get_base_model()(**inputs).logits
        assert logits.device.type == "meta" and logits.shape == (3, 7, 61)
