"""PEFT's layers over bitsandbytes and GPTQ bases: the base runs as it is, and the increment goes into its output."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, PeftModel
from torch import Tensor, nn

from adalora_kernels import explain
from adalora_kernels.integrations.peft import layer_report, patch_model, patch_peft, unpatch_model
from adalora_kernels.integrations.quantized import QUANTIZED
from tests.integrations.one_layer import K, N, adapted, assert_same_results, inputs, layer_of, linear, results
from tests.integrations.one_layer import fused_calls as fused_calls
from tests.integrations.quantized_bases import adapted_packed

KINDS = ("8 bit", "8 bit with outliers", "NF4", "NF4 twice", "FP4", "GPTQ")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def build() -> Callable[..., PeftModel]:
    """Builds a model of one layer as PEFT does for that kind of base."""

    def built(kind: str, dtype: torch.dtype = torch.float32, **settings: Any) -> PeftModel:
        plain = linear(dtype)
        if kind == "GPTQ":
            return adapted_packed(plain, **settings)
        bitsandbytes = pytest.importorskip("bitsandbytes")
        if kind.startswith("8 bit"):
            threshold = 1.0 if "outliers" in kind else 0.0
            base = bitsandbytes.nn.Linear8bitLt(K, N, has_fp16_weights=False, threshold=threshold)
        else:
            base = bitsandbytes.nn.Linear4bit(
                K, N, compute_dtype=dtype, quant_type=kind[:3].lower(), compress_statistics="twice" in kind
            )
        base.load_state_dict(plain.state_dict())
        flag = "is_loaded_in_8bit" if kind.startswith("8 bit") else "is_loaded_in_4bit"
        return adapted(base.to("cpu"), flag=flag, **settings)  # .to() quantises

    return built


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_same_outputs_and_gradients(
    kind: str, dtype: torch.dtype, build: Callable[..., PeftModel], fused_calls: list[str]
) -> None:
    theirs = build(kind, dtype)
    assert type(layer_of(theirs)) in QUANTIZED
    ours = patch_model(copy.deepcopy(theirs))
    assert_same_results(ours, theirs, inputs(dtype))
    assert fused_calls == ["svd_linear_into"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_increment_is_added_in_the_memory_of_the_bases_output(
    kind: str, build: Callable[..., PeftModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = patch_model(build(kind, torch.bfloat16))
    base_class, answers = type(layer_of(model).base_layer), list[Tensor]()
    forward = base_class.forward
    monkeypatch.setattr(base_class, "forward", lambda self, x: answers.append(forward(self, x)) or answers[-1])
    y = model(inputs(torch.bfloat16))
    assert len(answers) == 1 and y.data_ptr() == answers[0].data_ptr()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_8_bit_over_a_16_bit_base_answers_in_its_dtype(dtype: torch.dtype, build: Callable[..., PeftModel]) -> None:
    """PEFT's sum is in fp32, and attention then raises for queries and keys of two dtypes."""
    theirs = build("8 bit", dtype)
    ours = patch_model(copy.deepcopy(theirs))
    x = inputs(dtype)
    assert theirs(x).dtype == torch.float32
    assert ours(x).dtype == layer_of(ours).base_layer(x).dtype == dtype
    layer_of(ours).lora_dropout["default"] = nn.AlphaDropout(0.0)  # not ours: PEFT's own code runs
    (report,) = layer_report(ours)
    assert not report.fused and "AlphaDropout" in report.reason
    assert ours(x).dtype == dtype
    torch.testing.assert_close(ours(x), theirs(x).to(dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast(kind: str, build: Callable[..., PeftModel]) -> None:
    theirs = build(kind)
    ours = patch_model(copy.deepcopy(theirs))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, actual = results(theirs, inputs()), results(ours, inputs())
        answer = layer_of(ours).base_layer(inputs())
    assert actual["y"].dtype == answer.dtype
    for name, value in actual.items():
        torch.testing.assert_close(
            value, expected[name].to(value.dtype), rtol=2e-2, atol=2e-2 * value.abs().max().item()
        )


@pytest.mark.parametrize("kind", ["8 bit", "NF4 twice", "GPTQ"])
def test_states_and_adapters(kind: str, build: Callable[..., PeftModel], fused_calls: list[str]) -> None:
    """Disabled, several active, switched; what PEFT refuses is refused."""
    theirs = build(kind)
    theirs.add_adapter("second", AdaLoraConfig(target_modules=["q"], total_step=9, init_r=3, inference_mode=True))
    layer_of(theirs).lora_E["second"].data.normal_()
    ours = patch_model(copy.deepcopy(theirs))
    x = inputs()
    for adapters in (["default", "second"], ["second"], ["default"]):
        for model in (theirs, ours):
            model.base_model.set_adapter(adapters)
        fused_calls.clear()
        torch.testing.assert_close(ours(x), theirs(x))
        assert len(fused_calls) == len(adapters)
    fused_calls.clear()
    with ours.disable_adapter(), theirs.disable_adapter():
        assert torch.equal(ours(x), theirs(x))
    assert not fused_calls
    for model in (theirs, ours):
        with pytest.raises(NotImplementedError):
            model.merge_adapter()


@pytest.mark.parametrize("kind", ["8 bit", "NF4 twice", "GPTQ"])
def test_output_that_a_hook_keeps_is_the_bases_alone(kind: str, build: Callable[..., PeftModel]) -> None:
    model = patch_model(build(kind))
    kept: list[Tensor] = []
    base = layer_of(model).base_layer
    base.register_forward_hook(lambda module, args, output: kept.append(output))
    y = model(inputs())
    handle = kept.pop()
    assert torch.equal(handle, base(inputs())) and not torch.equal(handle, y)


@pytest.mark.parametrize("kind", ["8 bit", "NF4 twice", "GPTQ"])
def test_patched_unpatched_and_copied(kind: str, build: Callable[..., PeftModel]) -> None:
    model = build(kind)
    layer = layer_of(model)
    before, attributes, state = type(layer), set(vars(layer)), list(model.state_dict())
    patch_model(model)
    assert type(layer) is QUANTIZED[before] and list(model.state_dict()) == state
    twins = [copy.deepcopy(model)]
    if kind != "8 bit":  # bitsandbytes' 8-bit parameter can't be unpickled
        twins.append(pickle.loads(pickle.dumps(model)))
    for twin in twins:
        assert type(layer_of(twin)) is QUANTIZED[before]
        torch.testing.assert_close(twin(inputs()), model(inputs()))
    (line,) = explain(model)
    assert line.plan.startswith("base, then") and type(layer.base_layer).__name__ in line.reason
    assert layer_report(model)[0].fused
    unpatch_model(model)
    assert type(layer) is before and set(vars(layer)) == attributes


@pytest.mark.parametrize("kind", ["8 bit", "NF4 twice", "GPTQ"])
def test_patch_peft_builds_them_fused_and_they_train(kind: str, build: Callable[..., PeftModel]) -> None:
    """Also through the allocator, which finds their triplets."""
    patch_peft()
    model = build(kind, init_r=6, target_r=2, total_step=8, tinit=1, tfinal=2)
    assert type(layer_of(model)) in QUANTIZED.values()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(8):
        model(inputs()).square().mean().backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    assert int((layer_of(model).lora_E["default"] != 0).sum()) == 2
