"""What users have met with speed and settings, by thread: P of huggingface/peft, A of QingruZhang/AdaLoRA."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

from adalora_kernels import compute_orth_regu, recommended_config
from adalora_kernels.integrations import guidance
from adalora_kernels.integrations.peft import patch_model
from tests.integrations.small_models import batch, build, train, twins


class _Operators(TorchDispatchMode):
    """Counts what reaches the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


def _operators(model: PeftModel, adapted: bool = True) -> int:
    """Of a step: forward, backward and, where the adapter is in use, a ranking."""
    with _Operators() as operators:
        if adapted:
            model(**batch(model)).loss.backward()
            model.base_model.update_and_allocate(4)
        else:
            model.get_base_model()(**batch(model)).loss.backward()
    return operators.count


def test_P233_slow(record_property: Callable[[str, object], None]) -> None:
    """The thread brought AdaLoRA to PEFT, and its hundreds of small operators. Those of the frozen model stay."""
    theirs, ours = twins(build("llama"))
    for model in (theirs, ours):
        train(model, 3)
    plain = build("llama")
    plain.enable_input_require_grads()
    with plain.disable_adapter():
        frozen = _operators(plain, adapted=False)
    counts = [_operators(model) - frozen for model in (theirs, ours)]
    record_property(
        "measured", f"operators of a step beyond the frozen model's {frozen}: {counts[0]}, ours {counts[1]}"
    )
    assert counts[1] < counts[0] / 10


def test_A19_loss_falls_more_slowly_than_with_lora() -> None:
    """The author's cure: half of the steps for pruning, the rest around it. PEFT's defaults prune to the last step."""
    model, total = build("llama").unload(), 1000
    assert (AdaLoraConfig(total_step=total).tinit, AdaLoraConfig(total_step=total).tfinal) == (0, 0)
    config = recommended_config(model, total, 4)
    pruning = total - config.tinit - config.tfinal
    assert 0.3 * total < pruning < 0.6 * total and config.tfinal > 0.4 * total
    assert config.lora_alpha / config.init_r == 2.0  # LoRA's usual factor
    patch_model(get_peft_model(model, config))


def test_P233_worse_than_lora_by_its_settings() -> None:
    """Hugging Face's comparison of methods: a factor of 8/64 where its LoRA had 2, no task type. PEFT says nothing."""
    guidance._warn_once.cache_clear()
    settings = {"init_r": 64, "target_r": 32, "lora_alpha": 8, "task_type": None}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = build("llama", **settings)
    with pytest.warns(UserWarning, match=r"lora_alpha / init_r = 8/64 = 0.125 .*set lora_alpha=128"):
        patch_model(model)
    assert any("task_type=None" in text for text in guidance.check_config(model.peft_config["default"]))


def test_A22_orthogonal_and_of_unit_length() -> None:
    """The author's answer: the term wants both. On either side it is 0 at such factors alone; PEFT's is the same."""
    theirs, ours = twins(build("llama", orth_reg_weight=1.0))
    terms = []
    for factor in (1.0, 2.0):
        for model in (theirs, ours):
            for name, parameter in model.named_parameters():
                if "lora_A" in name or "lora_B" in name:
                    torch.nn.init.orthogonal_(parameter, gain=factor)
        plain = theirs.get_base_model()(**batch(theirs)).loss
        terms.append([(theirs(**batch(theirs)).loss - plain).item(), ours.base_model.orthogonality_loss().item()])
        torch.testing.assert_close(compute_orth_regu(ours, 1.0), ours.base_model.orthogonality_loss())
    assert terms[0] == pytest.approx([0.0, 0.0], abs=1e-4)
    assert terms[1] == pytest.approx([3.0 * 6**0.5] * 2, rel=1e-4)  # of 4 I - I, by R = 6
