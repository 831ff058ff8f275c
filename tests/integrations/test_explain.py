"""``explain`` and ``layer_report`` name every layer with an AdaLoRA adapter, what it runs, and with which others."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from importlib import import_module

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from torch import Tensor, nn

from adalora_kernels import explain
from adalora_kernels.backends.select import BY_SHAPE, Backend, Selection
from adalora_kernels.integrations import siblings
from adalora_kernels.integrations.peft import layer_report, patch_model, unpatch_model
from tests.integrations.one_layer import adapted, inputs, layer_of, linear
from tests.integrations.sibling_models import LLAMA, steps
from tests.integrations.small_models import batch, build

ops_explain = import_module("adalora_kernels.ops.explain")  # the function of its name hides it


class _Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Conv2d(1, 2, 3, padding=1), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.text(self.image(x))


def test_layers_that_keep_pefts_code_are_listed() -> None:
    config = AdaLoraConfig(target_modules=["image", "text"], init_r=4, total_step=12)
    try:
        theirs = get_peft_model(_Mixed(), config)
    except ValueError:
        pytest.skip("this PEFT adapts no Conv2d")
    assert {line.backend for line in explain(theirs)} == {"none"}
    assert all("patch_model" in line.reason for line in explain(theirs))
    ours = patch_model(copy.deepcopy(theirs))
    conv, dense = explain(ours)
    assert (conv.name, conv.backend) == ("base_model.model.image", "none") and "SVDConv2d" in conv.reason
    assert (dense.name, dense.backend) == ("base_model.model.text", "native")
    assert [(report.name, report.fused) for report in layer_report(ours)] == [(conv.name, False), (dense.name, True)]
    x = torch.randn(2, 1, 4, 4)
    torch.testing.assert_close(ours(x), theirs(x))


def _several(model: nn.Module) -> None:
    model.add_adapter("second", AdaLoraConfig(target_modules=["q"], total_step=9, init_r=3, inference_mode=True))
    model.base_model.set_adapter(["default", "second"])


def _replace_forward(model: nn.Module) -> None:
    layer = layer_of(model)
    layer.forward = torch.no_grad()(layer.forward)


def _change_dropout(model: nn.Module) -> None:
    layer_of(model).lora_dropout["default"] = nn.AlphaDropout(0.1)


@pytest.mark.parametrize(
    ("change", "backend", "reason", "fused"),
    [
        (lambda model: None, "native", "best for cpu", True),
        (_several, "native", "2 adapters are active", True),
        (lambda model: layer_of(model).base_layer.register_forward_pre_hook(print), "native", "has hooks", True),
        (lambda model: layer_of(model).base_layer.register_forward_hook(print), "none", "forward hooks", False),
        (_replace_forward, "none", "replaced on the instance", False),
        (_change_dropout, "none", "AlphaDropout", False),
        (lambda model: model.to("meta"), "none", "on meta", False),
        (lambda model: model.base_model.disable_adapter_layers(), "torch", "no adapter is active", True),
        (lambda model: model.merge_adapter(), "torch", "merged", True),
    ],
    ids=["plain", "several", "pre-hook", "hook", "replaced", "dropout", "meta", "disabled", "merged"],
)
def test_states_of_a_layer(change: Callable[[nn.Module], object], backend: str, reason: str, fused: bool) -> None:
    model = patch_model(adapted(linear()))
    change(model)
    (line,), (report,) = explain(model), layer_report(model)
    assert line.backend == backend and reason in line.reason
    assert report.fused is fused
    if not fused:
        assert reason in report.reason


def test_a_layer_that_accelerate_freed_again_is_fused() -> None:
    """Its hooks leave a bound forward on the instance."""
    hooks = pytest.importorskip("accelerate.hooks")
    model = adapted(linear())
    layer = layer_of(model)
    for module in (layer, layer.base_layer):
        hooks.add_hook_to_module(module, hooks.ModelHook())
    patch_model(model)
    assert "replaced on the instance" in explain(model)[0].reason and layer_report(model)[0].fused
    for module in (layer, layer.base_layer):
        hooks.remove_hook_from_module(module)
    assert "forward" in vars(layer)
    assert explain(model)[0].backend == "native" and layer_report(model)[0].reason == "base and increment in one call"


def test_siblings_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before their calls, after them, and where a group would not pay."""

    def said(model: nn.Module) -> dict[str, str]:
        lines, reports = explain(model), layer_report(model)
        found = {line.name.split(".")[-1]: line.reason for line in lines}
        for report in reports:
            together = re.search(r"(alone|as one group).*", found[report.name.split(".")[-1]])
            assert together is None or report.reason.endswith(together[0])
        return found

    model = patch_model(build("llama", **LLAMA), siblings=True)
    assert "alone: no call showed yet that k_proj, v_proj, o_proj read the same x" in said(model)["q_proj"]
    steps(model, 2)
    told = said(model)
    assert told["q_proj"].endswith("as one group with k_proj, v_proj")
    assert told["v_proj"].endswith("as one group with q_proj, k_proj")
    assert told["up_proj"].endswith("as one group with gate_proj")
    assert "alone" in told["o_proj"] and "group" not in told["down_proj"]

    patch_model(model)
    assert "on a CUDA device under triton" in said(model)["q_proj"]
    monkeypatch.setattr(siblings, "_runs_on_triton", lambda layer, x: True)
    monkeypatch.setattr(siblings, "shares_passes", lambda x, layers, **options: False)
    steps(model, 3)
    assert "alone: a group with k_proj, v_proj shares no pass over x: the best for cpu" in said(model)["q_proj"]
    assert "alone: no call showed" in said(model)["o_proj"] and "group" not in said(model)["down_proj"]
    patch_model(model, siblings=False)
    assert "group" not in said(model)["q_proj"]
    unpatch_model(model)
    assert {line.backend for line in explain(model)} == {"none"}


@pytest.mark.parametrize(
    ("pays", "plan", "alone"),
    [(True, "stack/stack", False), (False, "one by one: shrink_tail/one by one: blas", True)],
    ids=["shared", "not worth it"],
)
def test_groups_on_triton_are_explained(pays: bool, plan: str, alone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The group's plan, tiles and reason, at each of its layers; or why each runs on its own."""
    group = pytest.importorskip("adalora_kernels.backends.triton.group")
    model = patch_model(build("llama", **LLAMA), siblings=None)
    monkeypatch.setattr(siblings, "_runs_on_triton", lambda layer, x: True)
    monkeypatch.setattr(siblings, "shares_passes", lambda x, layers, **options: pays)
    steps(model, 3)
    on_triton = Selection(Backend.TRITON, BY_SHAPE, "the best for cuda that can run", "", "shrink_tail/blas")
    monkeypatch.setattr(ops_explain, "select", lambda *_: on_triton)
    for name in ("_forward_pays", "_backward_pays"):
        monkeypatch.setattr(group, name, lambda problems, passes, plan: pays)
    lines = {line.name.split(".")[-1]: line for line in explain(model)}
    for name, others in (("k_proj", "q_proj, v_proj"), ("gate_proj", "up_proj")):
        line = lines[name]
        assert line.backend == "triton" and (line.plan == plan) is not alone
        if alone:
            assert line.plan == "shrink_tail/blas" and line.configuration.startswith("shrink ")
            assert f"alone: a group with {others} shares no pass over x: " in line.reason
            assert "forward: the plan asked for has no form for groups" in line.reason
        else:
            assert line.configuration.startswith("group_shrink ") and "; group_x " in line.configuration
            assert "forward: 1 pass over x for" in line.reason and line.reason.endswith(f"as one group with {others}")
    assert lines["down_proj"].plan == "shrink_tail/blas" and "group" not in lines["down_proj"].reason


def test_explaining_changes_nothing() -> None:
    model = patch_model(build("llama", **LLAMA), siblings=True)
    steps(model, 1)
    expected = model(**batch(model)).loss
    state = {name: value.clone() for name, value in model.state_dict().items()}
    explain(model), layer_report(model)
    assert torch.equal(model(**batch(model)).loss, expected)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    single = patch_model(adapted(linear()))
    explain(single)
    torch.testing.assert_close(single(inputs()), unpatch_model(single)(inputs()))
