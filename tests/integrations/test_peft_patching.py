"""Patching exchanges classes and nothing else, can be undone, and says what it does."""

from __future__ import annotations

import copy
import io
import pickle
from types import SimpleNamespace

import pytest
import torch
from peft import AdaLoraConfig, LoHaConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.adalora.layer import AdaLoraLayer, SVDLinear
from peft.tuners.adalora.model import AdaLoraModel
from torch import Tensor, nn

from adalora_kernels.integrations.adalora_model import FusedAdaLoraModel
from adalora_kernels.integrations.peft import layer_report, patch_model, patch_peft, unpatch_model, unpatch_peft
from adalora_kernels.integrations.svd_layer import FusedSVDLinear
from tests.integrations.small_models import adapter_parameters, batch, build, train, twins


def _classes(model: nn.Module) -> dict[str, type[nn.Module]]:
    return {name: type(module) for name, module in model.named_modules()}


def _attributes(model: nn.Module) -> dict[str, set[str]]:
    return {name: set(vars(module)) for name, module in model.named_modules()}


def test_nothing_but_classes_changes_and_unpatching_restores_them() -> None:
    model = build("deberta")
    modules, classes, attributes = list(model.modules()), _classes(model), _attributes(model)
    parameters = dict(model.named_parameters())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    inner_hooks = list(model.get_base_model()._forward_hooks)

    assert patch_model(model) is model
    assert type(model.base_model) is FusedAdaLoraModel and isinstance(model.base_model, AdaLoraModel)
    assert sum(type(m) is FusedSVDLinear for m in model.modules()) == len(layer_report(model)) > 0
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(parameters[name] is p for name, p in model.named_parameters())
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())

    train(model, 3)
    unpatch_model(model)
    assert _classes(model) == classes and _attributes(model) == attributes
    assert list(model.get_base_model()._forward_hooks) == inner_hooks
    assert all(parameters[name] is p for name, p in model.named_parameters())


def test_both_are_idempotent() -> None:
    model = build("llama")
    patch_model(model)
    classes, hooks = _classes(model), len(model.get_base_model()._forward_hooks)
    patch_model(model, backend="reference")
    assert _classes(model) == classes and len(model.get_base_model()._forward_hooks) == hooks
    assert all(m.fused_backend == "reference" for m in model.modules() if isinstance(m, FusedSVDLinear))
    unpatch_model(unpatch_model(model))
    assert SVDLinear in _classes(model).values() and FusedSVDLinear not in _classes(model).values()


def test_the_adalora_model_itself_is_accepted() -> None:
    model = build("llama")
    patch_model(model.base_model)
    assert type(model.base_model) is FusedAdaLoraModel
    unpatch_model(model.base_model)
    assert type(model.base_model) is AdaLoraModel


@pytest.mark.parametrize("change", [patch_model, unpatch_model, layer_report])
def test_what_is_no_adalora_model_is_refused(change) -> None:
    plain = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoHaConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match="peft_model: expected a model with AdaLoRA layers"):
        change(plain)
    with pytest.raises(TypeError, match="peft_model: expected a PeftModel, got str"):
        change("model")


def test_a_refused_backend_leaves_the_model_as_it_was() -> None:
    model = build("llama")
    classes, attributes = _classes(model), _attributes(model)
    with pytest.raises(ValueError, match="backend"):
        patch_model(model, backend="abacus")
    with pytest.raises(TypeError, match="siblings: expected True, False or None, got 'yes'"):
        patch_model(model, siblings="yes")  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="triton"):
        patch_model(model.double(), backend="triton")
    assert _classes(model) == classes and _attributes(model) == attributes


def test_a_failure_on_the_way_is_rolled_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    classes, attributes = _classes(model), _attributes(model)

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("adalora_kernels.integrations.peft.fuse_model", fail)
    with pytest.raises(KeyboardInterrupt):
        patch_model(model)
    assert _classes(model) == classes and _attributes(model) == attributes


def test_an_optimizer_made_before_trains_the_patched_model() -> None:
    theirs, ours = build("gpt2", dtype=torch.float64), build("gpt2", dtype=torch.float64)
    optimizers = [torch.optim.AdamW(adapter_parameters(m).values(), lr=1e-2) for m in (theirs, ours)]
    patch_model(ours)
    for step in range(4):
        for model, optimizer in zip((theirs, ours), optimizers, strict=True):
            model(**batch(model, step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, parameter in adapter_parameters(theirs).items():
        torch.testing.assert_close(adapter_parameters(ours)[name], parameter)


def test_hooks_of_the_user_fire() -> None:
    model = build("llama")
    layer = next(m for m in model.modules() if type(m) is SVDLinear)
    calls: list[str] = []
    layer.register_forward_pre_hook(lambda *_: calls.append("pre"))
    layer.register_forward_hook(lambda *_: calls.append("forward"))
    layer.register_full_backward_hook(lambda *_: calls.append("backward"))
    layer.lora_A["default"].register_hook(lambda grad: calls.append("gradient"))
    patch_model(model)
    model(**batch(model)).loss.backward()
    assert set(calls) == {"pre", "forward", "backward", "gradient"}


def test_a_forward_frozen_by_accelerate_is_fused_and_freed() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model = build("llama")
    expected = model(**batch(model)).loss
    layer = next(m for m in model.modules() if type(m) is SVDLinear)
    hooks.add_hook_to_module(layer, hooks.ModelHook())
    patch_model(model)
    assert layer._old_forward.__func__ is FusedSVDLinear.forward
    assert all(report.fused for report in layer_report(model))
    torch.testing.assert_close(model(**batch(model)).loss, expected)
    unpatch_model(model)
    assert layer._old_forward.__func__ is SVDLinear.forward
    hooks.remove_hook_from_module(layer)
    patch_model(model)
    assert layer.forward.__func__ is FusedSVDLinear.forward


def test_a_foreign_forward_is_reported() -> None:
    model = patch_model(build("llama"))
    layer = next(m for m in model.modules() if type(m) is FusedSVDLinear)
    layer.forward = lambda x: x
    assert [report.reason for report in layer_report(model) if not report.fused] == [
        "its forward was replaced on the instance"
    ]


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_a_patched_model_can_be_copied(way: str) -> None:
    model = patch_model(build("llama"))
    train(model, 5)
    if way == "deepcopy":
        twin = copy.deepcopy(model)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
    assert train(twin, 15, start=5) == train(model, 15, start=5)
    assert twin.peft_config["default"].rank_pattern == model.peft_config["default"].rank_pattern
    unpatch_model(twin)
    assert not twin.get_base_model()._forward_hooks
    assert type(model.base_model) is FusedAdaLoraModel


class _Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 2, 3, padding=1)
        self.second = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=self.second(self.first(x)).square().mean())


def test_other_layers_keep_pefts_code_and_are_listed() -> None:
    settings = {"target_modules": ["first", "second"], "init_r": 4, "target_r": 2, "total_step": 12, "tfinal": 2}
    torch.manual_seed(0)
    try:
        model = get_peft_model(_Mixed(), AdaLoraConfig(**settings, orth_reg_weight=0.0))
    except ValueError:
        pytest.skip("this PEFT adapts no Conv2d")
    theirs, ours = twins(model)
    reports = {report.name.split(".")[-1]: report for report in layer_report(ours)}
    assert reports["second"].fused
    assert not reports["first"].fused and "keeps PEFT's code" in reports["first"].reason
    assert not any(m.ranknum["default"].requires_grad for m in ours.modules() if isinstance(m, AdaLoraLayer))
    for twin in (theirs, ours):
        optimizer = torch.optim.AdamW(adapter_parameters(twin).values(), lr=1e-2)
        for step in range(12):
            twin(torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(step))).loss.backward()
            optimizer.step()
            twin.base_model.update_and_allocate(step)
            optimizer.zero_grad()
    assert ours.peft_config["default"].rank_pattern == theirs.peft_config["default"].rank_pattern


def test_patch_peft_covers_what_peft_builds(tmp_path) -> None:
    before = build("llama")
    patch_peft()
    patch_peft()
    built = build("llama")
    assert type(built.base_model) is FusedAdaLoraModel
    built.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("llama").unload(), tmp_path)
    assert type(loaded.base_model) is FusedAdaLoraModel and all(r.fused for r in layer_report(loaded))

    extra = AdaLoraConfig(target_modules=["gate_proj"], total_step=9, init_r=2, inference_mode=True)
    for model in (built, before):
        model.add_adapter("extra", extra)
        assert type(model.base_model) is FusedAdaLoraModel
        assert type(model.get_base_model().model.layers[0].mlp.gate_proj) is FusedSVDLinear

    injected = inject_adapter_in_model(
        AdaLoraConfig(target_modules=["0"], total_step=9), nn.Sequential(nn.Linear(4, 4))
    )
    assert type(injected[0]) is FusedSVDLinear

    unpatch_peft()
    unpatch_peft()
    assert type(build("llama").base_model) is AdaLoraModel
    assert type(built.base_model) is FusedAdaLoraModel
    assert "inject_adapter" not in vars(AdaLoraModel)


def test_an_adapter_added_to_a_patched_model_is_fused() -> None:
    model = patch_model(build("llama"), backend="reference")
    model.add_adapter("extra", AdaLoraConfig(target_modules=["gate_proj"], total_step=9, init_r=2, inference_mode=True))
    layer = model.get_base_model().model.layers[0].mlp.gate_proj
    assert type(layer) is FusedSVDLinear and layer.fused_backend == "reference"
    unpatch_model(model)
    assert type(layer) is SVDLinear


def test_unloading_takes_the_term_away() -> None:
    model = patch_model(build("llama"))
    inner = model.merge_and_unload()
    assert not inner._forward_hooks
    assert not any(isinstance(m, SVDLinear) for m in inner.modules())


@pytest.mark.parametrize("first", ["AdaLoRA", "LoHa"])
def test_layers_of_mixed_adapters_are_fused(first: str) -> None:
    both = {
        "AdaLoRA": AdaLoraConfig(target_modules=["0", "1"], total_step=9, init_r=2),
        "LoHa": LoHaConfig(target_modules=["0"], r=2),
    }
    configs = [both.pop(first), *both.values()]

    def mixed() -> nn.Module:
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).to(torch.bfloat16)
        model = get_peft_model(layers, copy.deepcopy(configs[0]), mixed=True)
        model.add_adapter("second", copy.deepcopy(configs[1]))
        model.set_adapter(["default", "second"])
        for name, parameter in model.named_parameters():
            if "ranknum" not in name:
                parameter.data.normal_(std=0.3)
        return model

    theirs = mixed()
    patch_peft()
    ours = mixed()
    x = torch.randn(2, 4, dtype=torch.bfloat16)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0.02, atol=0.03)
    layers = [m for m in ours.modules() if isinstance(m, SVDLinear)]
    assert layers and all(type(m) is FusedSVDLinear for m in layers)
    assert not any(ranknum.requires_grad for m in layers for ranknum in m.ranknum.values())


def test_layers_that_are_added_later_are_linked_to_their_siblings() -> None:
    model = patch_model(build("llama", target_modules=["q_proj"]), siblings=True)
    attention = model.get_base_model().model.layers[0].self_attn
    assert "_siblings" not in attention.q_proj.__dict__
    extra = AdaLoraConfig(target_modules=["q_proj", "k_proj", "v_proj"], total_step=9, init_r=2, inference_mode=True)
    model.add_adapter("extra", extra)
    assert attention.q_proj._siblings is attention.k_proj._siblings is attention.v_proj._siblings
    before = attention.q_proj._siblings
    model.add_adapter("more", copy.deepcopy(extra))
    assert attention.q_proj._siblings is before  # and what they learned


def test_ranknum_stays_frozen_where_peft_casts_it(tmp_path) -> None:
    """PEFT 0.21: each cast of an adapter, over any base that is not in fp32, leaves a ranknum that trains."""
    patch_peft()
    model = build("llama", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("llama", dtype=torch.bfloat16).unload(), tmp_path, is_trainable=True)
    loaded.load_adapter(tmp_path, "second")
    loaded.add_adapter("third", AdaLoraConfig(target_modules=["q_proj"], total_step=9, init_r=2, inference_mode=True))
    constants = {name: p for name, p in loaded.named_parameters() if "ranknum" in name}
    assert {name.rpartition(".")[2] for name in constants} == {"default", "second", "third"}
    assert not any(p.requires_grad for p in constants.values())


def test_ranknum_is_frozen_while_patched_and_read_once() -> None:
    model = build("llama", dtype=torch.bfloat16)
    layer = next(m for m in model.modules() if type(m) is SVDLinear)
    layer.ranknum["default"].requires_grad_(True)  # as PEFT 0.21 leaves it over a 16-bit base
    patch_model(model)
    assert not layer.ranknum["default"].requires_grad
    assert layer._rank_constant("default") == 6.0
    layer.ranknum["default"].data = torch.full((1,), 7.0)
    with torch.no_grad():
        layer.ranknum["default"].add_(1.0)
    assert layer._rank_constant("default") == 8.0
    unpatch_model(model)
    assert layer.ranknum["default"].requires_grad


def test_output_that_a_hook_keeps_is_followed_by_autograd() -> None:
    """PEFT adds into the base's output; who recorded it must get the gradients that PEFT gives."""
    results = []
    for model in twins(build("deberta")):
        kept: list[Tensor] = []
        layer = next(m for m in model.modules() if isinstance(m, SVDLinear))
        handle = layer.base_layer.register_forward_hook(lambda module, args, output, kept=kept: kept.append(output))
        layer.base_layer.weight.requires_grad_(True)
        model(**batch(model))
        kept[0].square().sum().backward()
        results.append(layer.lora_B["default"].grad)
        handle.remove()
    torch.testing.assert_close(results[1], results[0])


def test_forward_without_gradient_does_not_use_up_the_term() -> None:
    model = patch_model(build("deberta"))
    tuner = model.base_model
    tuner.fused_state.term_due = True
    with torch.no_grad():
        model(**batch(model))
    assert tuner.fused_state.term_due
