"""Exports give what the model gives: as LoRA under unpatched PEFT, and merged under plain transformers."""

from __future__ import annotations

import copy
import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn

from adalora_kernels import SVDLinear, export_lora
from adalora_kernels.integrations.adapter import read_checkpoint
from adalora_kernels.integrations.export import export_merged, merge_into, write_lora
from adalora_kernels.integrations.peft import patch_model
from adalora_kernels.integrations.trained import adapter_of
from tests.integrations.small_models import Perceptron, batch, build, train, twins

pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file", "ignore:fan_in_fan_out is set to False")


def logits(model: nn.Module) -> Tensor:
    source = model.get_base_model() if isinstance(model, PeftModel) else model
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 12, generator=generator)
    inputs = {"x": x, "labels": x[:, :4].argmax(1)} if isinstance(source, Perceptron) else batch(_Bare(source), seed=99)
    with torch.no_grad():
        result: Tensor = model.eval()(**inputs).logits
    return result


class _Bare(nn.Module):
    """What ``batch`` asks of a model."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = [base]

    def get_base_model(self) -> nn.Module:
        return self.base[0]


def pruned(architecture: str, **settings: Any) -> tuple[PeftModel, nn.Module]:
    """A trained model with some layers without rank and others with a lot of it, and its untrained base."""
    model = build(architecture, **settings)
    base = copy.deepcopy(model).unload()
    train(model, 20)
    parameters = [p for name, p in model.named_parameters() if "lora_E" in name]
    with torch.no_grad():
        parameters[0].zero_()
        parameters[1].mul_(10)
    return model, base


def with_lora(base: nn.Module, path: Path) -> PeftModel:
    """Under unpatched PEFT, with every tensor of the file in its place."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT warns of missing keys
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        model = PeftModel.from_pretrained(base, path)
    present = {name.replace(".default", "") for name in model.state_dict()}
    stored = {re.sub(r"(classifier|head)\.", r"\1.modules_to_save.", name) for name in load_file(path / FILE)}
    assert stored <= present, stored - present
    return model


FILE = "adapter_model.safetensors"


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "deberta", "t5", "vit"])
@pytest.mark.parametrize("uniform", [False, True], ids=["own-ranks", "uniform-rank"])
def test_lora_gives_the_same_logits(architecture: str, uniform: bool, tmp_path: Path) -> None:
    model, base = pruned(architecture)
    models = twins(model)
    for name, each in zip(("peft", "fused"), models, strict=True):
        ranks = export_lora(each, tmp_path / name, uniform_rank=uniform)
        expected = logits(each)
        loaded = with_lora(copy.deepcopy(base), tmp_path / name)
        torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=2e-6)
        with loaded.disable_adapter():
            assert not torch.allclose(logits(loaded), expected, rtol=1e-3)
        layers = {path: m for path, m in loaded.get_base_model().named_modules() if isinstance(m, LoraLayer)}
        largest = max(ranks.values())
        assert {path: m.r["default"] for path, m in layers.items()} == {
            path: largest if uniform else rank for path, rank in ranks.items() if rank
        }
        assert all(m.scaling["default"] == 1.0 for m in layers.values()) and 0 in ranks.values()
    files = [load_file(tmp_path / name / FILE) for name in ("peft", "fused")]
    assert files[0].keys() == files[1].keys() and all(torch.equal(files[0][k], files[1][k]) for k in files[0])
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("peft", "fused")]
    assert configs[0] == configs[1] and configs[0]["r"] == configs[0]["lora_alpha"] == largest
    assert bool(configs[0]["rank_pattern"]) is not uniform and configs[0]["inference_mode"]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "deberta", "t5", "perceptron"])
def test_merged_weights_load_without_peft(architecture: str, tmp_path: Path) -> None:
    for name, model in zip(("peft", "fused"), twins(pruned(architecture)[0]), strict=True):
        before, expected = copy.deepcopy(model.state_dict()), logits(model)
        export_merged(model, tmp_path / name)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert torch.equal(logits(model), expected)
        if architecture == "perceptron":
            plain: nn.Module = Perceptron()
            plain.load_state_dict(load_file(tmp_path / name / "model.safetensors"))
        else:
            kind: Any = type(model.get_base_model())
            plain, info = kind.from_pretrained(tmp_path / name, output_loading_info=True)
            assert not info["missing_keys"] and not info["unexpected_keys"]
        torch.testing.assert_close(logits(plain), expected, rtol=1e-5, atol=2e-6)


def test_merging_rounds_once(tmp_path: Path) -> None:
    model, base = pruned("llama", dtype=torch.bfloat16)
    adapter = adapter_of(model)
    path, factors = max(adapter.layers.items(), key=lambda item: item[1].live_rank)
    export_merged(model, tmp_path)
    merged = load_file(tmp_path / "model.safetensors")[f"{path}.weight"]
    A, E, B = (t.double() for t in (factors.A, factors.E, factors.B))
    frozen, delta = base.get_submodule(path).weight, factors.c * (B * E.t()) @ A
    exact = frozen.double() + delta
    nearest = exact.to(torch.bfloat16)
    twice = frozen + delta.to(torch.bfloat16)
    assert merged.dtype == torch.bfloat16
    assert (merged == nearest).double().mean() > 0.99 > (twice == nearest).double().mean()
    # But for half a unit in the last place, what fp32 loses where the two cancel out.
    assert ((merged.double() - exact).abs() <= exact.abs() * 2**-8 + frozen.double().abs() * 2**-22).all()


def test_sixteen_bit_adapters_are_multiplied_and_stored_in_fp32(tmp_path: Path) -> None:
    model, base = pruned("llama", dtype=torch.bfloat16, autocast_adapter_dtype=False)
    export_lora(model, tmp_path)
    stored = load_file(tmp_path / FILE)
    assert {value.dtype for value in stored.values()} == {torch.float32}
    for path, factors in adapter_of(model).layers.items():
        if factors.live_rank:
            prefix = f"base_model.model.{path}.lora"
            product = stored[f"{prefix}_B.weight"] @ stored[f"{prefix}_A.weight"]
            A, E, B = (t.double() for t in (factors.A, factors.E, factors.B))
            torch.testing.assert_close(product.double(), factors.c * (B * E.t()) @ A, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(logits(with_lora(base, tmp_path)), logits(model), rtol=2e-2, atol=2e-2)


def test_a_checkpoint_gives_the_same_export_as_the_model(tmp_path: Path) -> None:
    model, _ = pruned("deberta", lora_alpha=-1)
    model.save_pretrained(tmp_path / "adalora")
    write_lora(read_checkpoint(tmp_path / "adalora"), tmp_path / "from-file")
    export_lora(model, tmp_path / "from-model")
    left, right = (load_file(tmp_path / name / FILE) for name in ("from-file", "from-model"))
    assert left.keys() == right.keys()
    for name, value in left.items():
        # A row that is masked but has moved since is in the model, and not in PEFT's file.
        torch.testing.assert_close(value, right[name], rtol=1e-6, atol=0)


def test_a_saved_and_loaded_adapter_exports_again(tmp_path: Path) -> None:
    model, base = pruned("llama")
    model.save_pretrained(tmp_path / "adalora")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adalora")
    for each in (loaded, patch_model(copy.deepcopy(loaded))):
        pattern = copy.deepcopy(each.peft_config["default"].rank_pattern)
        export_lora(each, tmp_path / "lora")
        assert each.peft_config["default"].rank_pattern == pattern
        torch.testing.assert_close(
            logits(with_lora(copy.deepcopy(base), tmp_path / "lora")), logits(model), rtol=1e-5, atol=2e-6
        )


def test_while_pruning_the_model_counts_and_not_the_pattern(tmp_path: Path) -> None:
    model = build("llama", deltaT=7)
    base = copy.deepcopy(model).unload()
    train(model, 10)  # ranked at step 7: masked triplets have moved since
    ranks = export_lora(model, tmp_path)
    assert sum(ranks.values()) > sum(map(sum, model.peft_config["default"].rank_pattern.values()))
    torch.testing.assert_close(logits(with_lora(base, tmp_path)), logits(model), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("architecture", ["deberta", "perceptron"])
def test_trained_biases_go_along(architecture: str, bias: str, tmp_path: Path) -> None:
    model, base = pruned(architecture, bias=bias)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and name.endswith("bias"):
                parameter.add_(0.1)
    export_lora(model, tmp_path)
    torch.testing.assert_close(logits(with_lora(copy.deepcopy(base), tmp_path)), logits(model), rtol=1e-5, atol=2e-6)
    merge_into(base, adapter_of(model))
    torch.testing.assert_close(logits(base), logits(model), rtol=1e-5, atol=2e-6)


class Nested(nn.Module):
    """Paths that are the ends, the beginnings or, read as patterns, the likes of each other."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 8)
        self.inner = nn.ModuleDict({"q": nn.Linear(8, 8), "q2": nn.Linear(8, 8), "0xq": nn.Linear(8, 8)})
        self.layers = nn.ModuleDict(
            {"0": nn.ModuleDict({"q": nn.Linear(8, 8)}), "inner": nn.ModuleDict({"q": nn.Linear(8, 8)})}
        )

    def forward(self, x: Tensor) -> Tensor:
        for linear in (m for m in self.modules() if isinstance(m, nn.Linear)):
            x = torch.tanh(linear(x))
        return x

    def chain(self) -> list[str]:
        return [path for path, m in self.named_modules() if isinstance(m, nn.Linear)]


@pytest.mark.parametrize(
    "dead", [(), ("inner.q",), ("q", "layers.inner.q"), ("layers.inner.q", "inner.q", "layers.0.q")]
)
def test_ranks_reach_no_other_layer(dead: tuple[str, ...], tmp_path: Path) -> None:
    from peft import AdaLoraConfig

    base = Nested()
    config = AdaLoraConfig(target_modules=base.chain(), init_r=6, target_r=3, total_step=10, lora_alpha=12)
    model = get_peft_model(copy.deepcopy(base), config)
    layers = {p: m for p, m in model.get_base_model().named_modules() if hasattr(m, "lora_E")}
    with torch.no_grad():
        for count, (path, layer) in enumerate(layers.items()):
            layer.lora_E["default"][: 0 if path in dead else 1 + count] = 0.5
    ranks = export_lora(model, tmp_path)
    assert ranks == {path: 0 if path in dead else 1 + i for i, path in enumerate(layers)}
    loaded = with_lora(base, tmp_path)
    found = {p: m.r["default"] for p, m in loaded.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    assert found == {path: rank for path, rank in ranks.items() if rank}


@pytest.mark.parametrize("patched", [False, True])
def test_an_untrained_or_dead_adapter_loads_too(patched: bool, tmp_path: Path) -> None:
    model, base = pruned("deberta")
    model = patch_model(model) if patched else model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_E" in name:
                parameter.zero_()
    with pytest.warns(UserWarning, match="every triplet of this adapter is pruned or untrained"):
        ranks = export_lora(model, tmp_path)
    assert set(ranks.values()) == {0}
    torch.testing.assert_close(logits(with_lora(base, tmp_path)), logits(model), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("wrapped", ["tuner", "compiled", "inner"])
def test_what_holds_the_model_does_not_matter(wrapped: str, tmp_path: Path) -> None:
    model, base = pruned("llama")
    given = {"tuner": model.base_model, "compiled": torch.compile(model), "inner": model.get_base_model()}[wrapped]
    export_lora(given, tmp_path / "lora")
    torch.testing.assert_close(logits(with_lora(base, tmp_path / "lora")), logits(model), rtol=1e-5, atol=2e-6)
    export_merged(given, tmp_path / "merged")
    plain = type(base).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-5, atol=2e-6)


def test_the_adapter_asked_for_is_exported(tmp_path: Path) -> None:
    model, base = pruned("llama", adapter="q_proj")
    expected = logits(model)
    model.peft_config["q_proj"].inference_mode = True
    second = copy.deepcopy(model.peft_config["q_proj"])
    second.rank_pattern = None
    model.add_adapter("other", second)
    model.set_adapter("other")
    export_lora(model, tmp_path, adapter="q_proj")
    torch.testing.assert_close(logits(with_lora(base, tmp_path)), expected, rtol=1e-5, atol=2e-6)
    with pytest.warns(UserWarning, match="untrained"):
        assert set(export_lora(model, tmp_path / "other").values()) == {0}
    with pytest.raises(ValueError, match="expected one of ADALORA, got 'third'; the model has 'q_proj' of ADALORA"):
        export_lora(model, tmp_path, adapter="third")


class Ours(nn.Module):
    """A model of our own layers, one stored as in GPT-2, with a bias and a head that train."""

    def __init__(self) -> None:
        super().__init__()
        self.first = SVDLinear(12, 24, r=6, lora_alpha=12, merge_weights=False)
        self.second = SVDLinear(24, 24, r=4, lora_alpha=12, merge_weights=False)
        self.dead = SVDLinear(24, 24, r=4, merge_weights=False)
        self.head = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.dead(torch.tanh(self.second(torch.tanh(self.first(x))))))
        return y


def test_models_of_our_own_layers(tmp_path: Path) -> None:
    ours = Ours()
    plain = nn.Module()
    for name, module in ours.named_children():
        linear = nn.Linear(module.in_features, module.out_features)
        linear.load_state_dict({"weight": module.weight, "bias": module.bias})
        plain.add_module(name, linear)
    plain.forward = lambda x: Ours.forward(plain, x)  # type: ignore[method-assign, arg-type]
    with torch.no_grad():
        ours.first.bias.requires_grad_(False)
        ours.first.lora_E[:2], ours.second.lora_E[1:] = 0.4, -0.3
        ours.second.bias.add_(1)
        ours.dead.bias.add_(1)
        ours.head.weight.add_(0.1)
    x = torch.randn(5, 12)
    assert export_lora(ours, tmp_path / "lora") == {"first": 2, "second": 3, "dead": 0}
    config = LoraConfig.from_pretrained(tmp_path / "lora")
    assert set(config.target_modules) == {"first", "second"} and config.modules_to_save == ["head"]
    loaded = with_lora(plain, tmp_path / "lora")
    torch.testing.assert_close(loaded(x), ours(x))
    export_merged(ours, tmp_path / "merged")
    merged = nn.Sequential()
    for name, module in ours.named_children():
        merged.add_module(name, nn.Linear(module.in_features, module.out_features))
    merged.load_state_dict(load_file(tmp_path / "merged" / "model.safetensors"))
    torch.testing.assert_close(Ours.forward(merged, x), ours(x))  # type: ignore[arg-type]


def test_weights_that_cannot_be_merged(tmp_path: Path) -> None:
    model, _ = pruned("llama")
    path, layer = next((p, m) for p, m in model.get_base_model().named_modules() if hasattr(m, "lora_E"))
    cases = {
        "it is a Parameter of torch.int8: load the base unquantised": torch.zeros(32, 32, dtype=torch.int8),
        "it is offloaded": torch.empty(32, 32, device="meta"),
    }
    for message, weight in cases.items():
        broken = copy.deepcopy(model)
        broken.get_base_model().get_submodule(path).base_layer.weight = nn.Parameter(weight, requires_grad=False)
        with pytest.raises(ValueError, match=f"{path}: expected a weight that can be merged, but {message}"):
            export_merged(broken, tmp_path)
    shared = copy.deepcopy(model)
    inner = shared.get_base_model()
    inner.model.extra = nn.Linear(32, 32)
    inner.model.extra.weight = inner.get_submodule(path).base_layer.weight
    with pytest.raises(ValueError, match="it is shared with another module: untie it, or export as LoRA"):
        export_merged(shared, tmp_path)
    layer.merge()
    with pytest.raises(ValueError, match="is merged; call unmerge first"):
        export_merged(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_foreign_models_and_folders_are_refused(tmp_path: Path) -> None:
    model, base = pruned("llama")
    with pytest.raises(TypeError, match="model: expected a PEFT model, got str"):
        export_lora("llama", tmp_path)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected an AdaLoRA adapter of PEFT or layers of SVDLinear, found none"):
        export_lora(base, tmp_path)
    lora = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="expected one of ADALORA, got 'default'; the model has 'default' of LORA"):
        export_lora(lora, tmp_path)
    with pytest.raises(ValueError, match="expected an adapter 'mine'"):
        export_lora(Ours(), tmp_path, adapter="mine")
    with pytest.raises(ValueError, match=r"its layer .* is not in DebertaV2ForSequenceClassification"):
        merge_into(build("deberta").unload(), adapter_of(model))
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_A" in name)[0, 0] = float("inf")
    with pytest.raises(ValueError, match="expected finite numbers"):
        export_lora(model, tmp_path)
    assert not list(tmp_path.iterdir())
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected a folder without another method's adapter"):
        export_lora(Ours(), tmp_path)
