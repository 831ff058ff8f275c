"""What PEFT's layers do beyond a forward, patched as unpatched: saved modules, merging, casts, loading, compilation."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers.pytorch_utils import Conv1D

import adalora_kernels
from adalora_kernels.integrations.peft import layer_report, patch_model, patch_peft
from tests.integrations.one_layer import K, N, OneLayer, adapted, inputs, layer_of, linear, results
from tests.integrations.one_layer import fused_calls as fused_calls
from tests.integrations.quantized_bases import Float8Linear, adapted_packed
from tests.integrations.small_models import adapter_parameters, batch, build, train, twins


def test_modules_to_save_train_and_return(tmp_path: Path) -> None:
    """The head is trained whole beside the adapter, saved with it, and swapped with it."""
    settings = {"target_modules": ["first", "second"], "modules_to_save": ["third"]}
    theirs, ours = twins(build("perceptron", dtype=torch.float64, **settings))
    wrapped = [m for m in ours.modules() if isinstance(m, ModulesToSaveWrapper)]
    assert len(wrapped) == 1 and all(p.requires_grad for p in wrapped[0].modules_to_save.parameters())
    expected, actual = (train(model, 6, allocate=False) for model in (theirs, ours))
    assert actual == pytest.approx(expected, rel=1e-12)
    for name, parameter in adapter_parameters(theirs).items():
        torch.testing.assert_close(adapter_parameters(ours)[name], parameter)
    ours.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("perceptron", dtype=torch.float64).unload(), tmp_path)
    torch.testing.assert_close(loaded.eval()(**batch(loaded)).logits, ours(**batch(ours)).logits)
    with ours.disable_adapter(), theirs.disable_adapter():
        torch.testing.assert_close(ours(**batch(ours)).logits, theirs.eval()(**batch(theirs)).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("base", ["Linear", "Conv1D"])
def test_merging(base: str, dtype: torch.dtype) -> None:
    """Into the same weights as PEFT's, there and back; a merged layer is its base; NaN is refused where asked."""
    plain = linear(dtype) if base == "Linear" else Conv1D(N, K).to(dtype)
    theirs = adapted(plain, fan_in_fan_out=base == "Conv1D")
    ours = patch_model(copy.deepcopy(theirs))
    for safe in (False, True):
        for model in (theirs, ours):
            model.merge_adapter(safe_merge=safe)
        assert torch.equal(layer_of(ours).base_layer.weight, layer_of(theirs).base_layer.weight)
        assert torch.equal(ours(inputs(dtype)), layer_of(ours).base_layer(inputs(dtype)))
        with ours.disable_adapter(), theirs.disable_adapter():  # which unmerges at the next forward
            assert torch.equal(ours(inputs(dtype)), theirs(inputs(dtype)))
        assert not layer_of(ours).merged and not layer_of(theirs).merged
        assert torch.equal(layer_of(ours).base_layer.weight, layer_of(theirs).base_layer.weight)
    layer_of(ours).lora_A["default"].data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaNs detected"):
        ours.merge_adapter(safe_merge=True)


@pytest.mark.parametrize("autocast_adapter_dtype", [False, True])
def test_casts(autocast_adapter_dtype: bool, fused_calls: list[str]) -> None:
    """A patched model follows .to(dtype), there and back, and gives PEFT's dtypes."""
    theirs = adapted(linear(torch.bfloat16), autocast_adapter_dtype=autocast_adapter_dtype)
    ours = patch_model(copy.deepcopy(theirs))
    expected_dtype = torch.float32 if autocast_adapter_dtype else torch.bfloat16
    assert layer_of(ours).lora_A["default"].dtype == expected_dtype
    for dtype in (torch.bfloat16, torch.float64, torch.float16, torch.float32):
        for model in (theirs, ours):
            model.to(dtype)
        expected, actual = results(theirs, inputs(dtype)), results(ours, inputs(dtype))
        for name, value in actual.items():
            assert value.dtype == expected[name].dtype == dtype
            error = (value.double() - expected[name].double()).norm()
            assert error <= 4 * torch.finfo(dtype).eps * expected[name].double().norm(), name
    assert fused_calls == ["svd_linear"] * 4


def test_loading_by_way_of_the_meta_device(tmp_path: Path, fused_calls: list[str]) -> None:
    model = build("llama", layers=1).eval()
    expected = model(**batch(model)).logits
    model.save_pretrained(tmp_path)
    base = model.unload()
    unpatched = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=True)
    if any(p.is_meta for p in unpatched.parameters()):
        pytest.skip("this PEFT leaves ranknum on the meta device")
    patch_peft()
    loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=True)
    torch.testing.assert_close(loaded.eval()(**batch(loaded)).logits, expected)
    assert len(fused_calls) == len(layer_report(loaded)) and all(report.fused for report in layer_report(loaded))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant: bool) -> None:
    theirs, ours = twins(build("llama", dtype=torch.float64, layers=1))
    for model in (theirs, ours):
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
    assert train(ours, 4) == pytest.approx(train(theirs, 4), rel=1e-6)  # transformers' losses are in fp32
    for name, parameter in adapter_parameters(theirs).items():
        torch.testing.assert_close(adapter_parameters(ours)[name], parameter)


def test_an_adapter_is_deleted_and_another_goes_on() -> None:
    theirs = adapted(linear(torch.float64))
    theirs.add_adapter("second", AdaLoraConfig(target_modules=["q"], total_step=9, init_r=3, inference_mode=True))
    layer_of(theirs).lora_E["second"].data.normal_()
    ours = patch_model(copy.deepcopy(theirs))
    for model in (theirs, ours):
        model.set_adapter("second")
        model.delete_adapter("default")
    torch.testing.assert_close(ours(inputs(torch.float64)), theirs(inputs(torch.float64)))
    assert list(layer_of(ours).lora_A) == ["second"]


def test_an_adapter_named_like_a_deleted_one_begins_anew() -> None:
    model = patch_model(build("perceptron"))
    config = copy.deepcopy(model.peft_config["default"])
    train(model, 18)
    assert model.base_model.rank_allocator().importance.settled
    model.add_adapter("other", AdaLoraConfig(target_modules=["first"], total_step=9, inference_mode=True))
    model.delete_adapter("default")
    model.add_adapter("default", config)
    importance = model.base_model.rank_allocator().importance
    assert importance.live.all() and importance.updates == 0 and not importance.settled


def test_nothing_that_an_older_torch_cannot_trace() -> None:
    """torch.compile of 2.11 breaks the graph at ``__dict__.setdefault``, that of 2.13 does not: hence in the source."""
    sources = Path(adalora_kernels.__file__).parent.rglob("*.py")
    assert not [path.name for path in sources if "__dict__.setdefault" in path.read_text(encoding="utf-8")]


def _compiled(model: nn.Module) -> tuple[Any, CompileCounterWithBackend]:
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(model, fullgraph=True, backend=counter), counter


@pytest.mark.parametrize("base", ["plain", "NF4", "GPTQ", "float8"])
def test_changed_masks_recompile_nothing(base: str) -> None:
    """Ten steps in which the allocator masks other triplets: one graph, and the losses of the plain loop."""
    torch._dynamo.reset()
    bases = {"plain": linear, "float8": lambda: Float8Linear(linear())}
    flag = None
    if base == "NF4":
        bitsandbytes = pytest.importorskip("bitsandbytes")
        quantised = bitsandbytes.nn.Linear4bit(K, N, quant_type="nf4")
        quantised.load_state_dict(linear().state_dict())
        bases["NF4"], flag = lambda: quantised.to("cpu"), "is_loaded_in_4bit"
    settings = {"init_r": 6, "target_r": 2, "total_step": 10, "tinit": 1, "tfinal": 2}
    if base == "GPTQ":
        model = adapted_packed(linear(), **settings)
    else:
        model = adapted(bases[base](), flag=flag, **settings)
    patch_model(model)
    layer_of(model).base_layer(inputs())  # at its first call bitsandbytes sets a flag, which it then reads
    losses = []
    for twin in (copy.deepcopy(model), model):
        run, counter = (twin, None) if twin is not model else _compiled(twin)
        optimizer = torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], lr=1e-2)
        losses.append([])
        live = set()
        for step in range(10):
            loss = run(inputs()).square().mean()
            loss.backward()
            optimizer.step()
            twin.base_model.update_and_allocate(step)
            optimizer.zero_grad()
            losses[-1].append(loss.item())
            live.add(tuple((layer_of(twin).lora_E["default"] != 0).flatten().tolist()))
    assert len(live) > 2
    assert counter is not None and counter.frame_count == 1
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_the_term_compiles_where_its_matrices_must_be_looked_up_again() -> None:
    torch._dynamo.reset()
    model = patch_model(build("perceptron"))
    model.add_adapter("other", AdaLoraConfig(target_modules=["first"], total_step=9, inference_mode=True))
    model.delete_adapter("other")
    assert model.base_model.fused_state.factors is None
    compiled = torch.compile(model.base_model.orthogonality_loss, backend="aot_eager")()
    torch.testing.assert_close(compiled, model.base_model.orthogonality_loss())


def test_a_whole_model_compiles_once() -> None:
    """With the orthogonality term in its loss, while the allocator masks: the losses of the plain loop."""
    torch._dynamo.reset()
    settings = {"init_r": 6, "target_r": 2, "total_step": 8, "tinit": 1, "tfinal": 2, "deltaT": 1}
    model = patch_model(build("llama", layers=1, **settings))
    twin = copy.deepcopy(model)
    counter = CompileCounterWithBackend("aot_eager")
    model.forward = torch.compile(model.forward, backend=counter)
    losses = []
    for owner in (twin, model):
        optimizer = torch.optim.AdamW(adapter_parameters(owner).values(), lr=1e-2)
        losses.append([])
        for step in range(8):
            loss = owner(**batch(owner, seed=step)).loss
            loss.backward()
            optimizer.step()
            owner.base_model.update_and_allocate(step)
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert counter.frame_count == 1
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert sum(map(sum, model.peft_config["default"].rank_pattern.values())) == 2 * len(layer_report(model))


def test_the_base_that_is_adapted_twice_is_called() -> None:
    """PEFT's layers may be nested: another tuner's layer as the base."""
    scaled = get_peft_model(OneLayer(linear()), IA3Config(target_modules=["q"], feedforward_modules=[]))
    layer_of(scaled).ia3_l["default"].data.fill_(3.0)
    theirs = adapted(layer_of(scaled))
    ours = patch_model(copy.deepcopy(theirs))
    (report,) = layer_report(ours)
    assert "the base is a Linear" in report.reason
    torch.testing.assert_close(ours(inputs()), theirs(inputs()))
    without: Tensor = layer_of(ours).base_layer(inputs())
    assert not torch.allclose(ours(inputs()), without)
