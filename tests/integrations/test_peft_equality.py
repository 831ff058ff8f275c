"""Patched and unpatched PEFT models compute the same: outputs, losses and gradients, within the error budget."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from torch import Tensor, nn

from adalora_kernels.integrations.peft import layer_report, patch_model
from adalora_kernels.integrations.svd_layer import FusedSVDLinear
from adalora_kernels.testing.tolerances import assert_within_budget
from tests.integrations.small_models import ARCHITECTURES, adapter_parameters, batch, build, twins


def _loss_and_gradients(model: nn.Module, autocast: torch.dtype | None = None) -> dict[str, Tensor]:
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        loss = model(**batch(model)).loss
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in adapter_parameters(model).items()}}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.float32, None), (torch.bfloat16, None), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)],
    ids=["fp32", "bf16-base", "autocast", "bf16-base-autocast"],
)
def test_loss_and_gradients(architecture: str, dtype: torch.dtype, autocast: torch.dtype | None) -> None:
    theirs, ours = twins(build(architecture, dtype=dtype))
    exact = _loss_and_gradients(copy.deepcopy(theirs).double())
    assert all(report.fused for report in layer_report(ours))
    expected, actual = _loss_and_gradients(theirs, autocast), _loss_and_gradients(ours, autocast)
    assert expected.keys() == actual.keys()
    if dtype == torch.float32 and autocast is None:
        for kind in ("loss", "lora_A", "lora_E", "lora_B"):
            # Over all layers at once, each by its largest element: a layer's dE is a handful of numbers, and how far
            # the worst of them is off in one run is chance, on both sides.
            names = [name for name in actual if kind in name]
            pooled = [
                torch.cat([(grads[n] / exact[n].abs().max().to(grads[n].dtype)).flatten() for n in names])
                for grads in (actual, expected, exact)
            ]
            assert_within_budget(kind, *pooled)
        return
    for name, value in actual.items():
        # After a network in 16 bits a gradient's worst element is chance, its norm is not: same budget on the norm.
        error, allowance = ((result.double() - exact[name]).norm() for result in (value, expected[name]))
        rounding = torch.finfo(torch.bfloat16).eps * exact[name].norm()
        assert error <= 2 * allowance + rounding, f"{name}: error {error:.2e}, PEFT's {allowance:.2e}"
        assert value.dtype == expected[name].dtype


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("adapter_dtype", [torch.float32, None], ids=["fp32-adapter", "same-adapter"])
def test_result_dtype(base_dtype: torch.dtype, adapter_dtype: torch.dtype | None) -> None:
    theirs, ours = twins(_linear_model(dtype=base_dtype, autocast_adapter_dtype=adapter_dtype is not None))
    x = torch.randn(2, 5, 8, dtype=base_dtype)
    expected, actual = theirs(x), ours(x)
    assert actual.dtype == expected.dtype == base_dtype
    assert_within_budget("y", actual, expected, copy.deepcopy(theirs).double()(x.double()))
    actual.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in adapter_parameters(ours).values())


def test_input_that_the_base_rejects_is_rejected() -> None:
    theirs, ours = twins(_linear_model(dtype=torch.bfloat16))
    for model in (theirs, ours):
        with pytest.raises(RuntimeError, match="dtype"):
            model(torch.randn(2, 8))


def test_dropout_scales_and_stops_in_evaluation() -> None:
    theirs, ours = twins(_linear_model(lora_dropout=0.5))
    x = torch.randn(1, 8)
    torch.manual_seed(0)
    mean = torch.stack([ours(x) for _ in range(4000)]).mean(0)
    exact = theirs.eval()(x)
    assert torch.equal(ours.eval()(x), ours(x))
    torch.testing.assert_close(ours(x), exact)
    spread = (exact - ours.get_base_model().q.base_layer(x)).abs().max()
    torch.testing.assert_close(mean, exact, atol=0.1 * spread.item() + 1e-3, rtol=0)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_repeats_the_dropout(use_reentrant: bool) -> None:
    plain = patch_model(build("llama", lora_dropout=0.3))
    checkpointed = copy.deepcopy(plain)
    checkpointed.get_base_model().gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    checkpointed.enable_input_require_grads()
    results = []
    for model in (plain, checkpointed):
        torch.manual_seed(3)
        results.append(_loss_and_gradients(model))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value)


def test_a_layer_without_rank_is_its_base() -> None:
    model = patch_model(_linear_model(init_r=0))
    x = torch.randn(3, 8)
    torch.testing.assert_close(model(x), model.get_base_model().q.base_layer(x))


def test_disabled_merged_and_unmerged() -> None:
    theirs, ours = twins(_linear_model())
    x = torch.randn(3, 8)
    adapted = theirs(x)
    with ours.disable_adapter(), theirs.disable_adapter():
        torch.testing.assert_close(ours(x), theirs(x))
    for safe in (False, True):
        ours.merge_adapter(safe_merge=safe)
        torch.testing.assert_close(ours(x), adapted)
        ours.unmerge_adapter()
        torch.testing.assert_close(ours(x), adapted)
    torch.testing.assert_close(ours.merge_and_unload()(x), adapted)


def test_several_active_adapters() -> None:
    model = _linear_model()
    model.add_adapter("second", AdaLoraConfig(target_modules=["q"], total_step=9, init_r=3, inference_mode=True))
    model.base_model.set_adapter(["default", "second"])
    for parameter in model.get_base_model().q.lora_E.values():
        parameter.data.normal_()
    theirs, ours = twins(model)
    x = torch.randn(3, 8)
    torch.testing.assert_close(ours(x), theirs(x))
    for chosen in ("second", "default"):
        theirs.base_model.set_adapter(chosen), ours.base_model.set_adapter(chosen)
        torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_one_token_decoding(architecture: str) -> None:
    """With a cache: after the first, each call of a layer reads one token."""
    theirs, ours = twins(build(architecture).eval())
    tokens = batch(ours)["input_ids"][:1]
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    lengths: list[int] = []
    layer = next(m for m in ours.modules() if isinstance(m, FusedSVDLinear))
    layer.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    assert torch.equal(ours.generate(input_ids=tokens, **options), theirs.generate(input_ids=tokens, **options))
    assert lengths == [tokens.shape[1], 1, 1, 1, 1]


def test_a_base_with_hooks_is_called() -> None:
    theirs, ours = twins(_linear_model())
    x, seen = torch.randn(3, 8), []
    for model in (theirs, ours):
        base = model.get_base_model().q.base_layer
        base.register_forward_hook(lambda module, args, output: seen.append(module) or 2 * output)
    (report,) = layer_report(ours)
    assert not report.fused and "hooks" in report.reason
    torch.testing.assert_close(ours(x), theirs(x))
    assert len(seen) == 2


def test_a_subclass_of_linear_and_extra_arguments_call_the_base() -> None:
    class Shifted(nn.Linear):
        def forward(self, x: Tensor, shift: float = 1.0) -> Tensor:
            return super().forward(x) + shift

    torch.manual_seed(0)
    inner = nn.ModuleDict({"q": Shifted(8, 8)})
    inner.forward = lambda x, **kwargs: inner.q(x, **kwargs)
    model = get_peft_model(inner, AdaLoraConfig(target_modules=["q"], total_step=9))
    layer = model.get_base_model().q
    layer.lora_E["default"].data.normal_()
    x = torch.randn(3, 8)
    expected = [layer(x), layer(x, 3.0), layer(x, shift=5.0)]
    patch_model(model)
    assert type(layer) is FusedSVDLinear
    for actual, wanted in zip([layer(x), layer(x, 3.0), layer(x, shift=5.0)], expected, strict=True):
        torch.testing.assert_close(actual, wanted)


def test_a_trained_base_gets_its_gradients() -> None:
    theirs, ours = twins(_linear_model(bias="all"))
    x = torch.randn(3, 8)
    for model in (theirs, ours):
        model.get_base_model().q.base_layer.weight.requires_grad_(True)
        model(x).square().sum().backward()
    for name in ("weight", "bias"):
        expected, actual = (getattr(m.get_base_model().q.base_layer, name).grad for m in (theirs, ours))
        torch.testing.assert_close(actual, expected)


def test_compiled_equals_eager() -> None:
    model = patch_model(_linear_model())
    x = torch.randn(3, 8)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


class _OneLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x)


def _linear_model(
    dtype: torch.dtype = torch.float32, autocast_adapter_dtype: bool = True, **settings: object
) -> nn.Module:
    torch.manual_seed(0)
    config = AdaLoraConfig(**{"target_modules": ["q"], "total_step": 9, "init_r": 4, **settings})
    model = get_peft_model(_OneLayer().to(dtype), config, autocast_adapter_dtype=autocast_adapter_dtype)
    layer = model.get_base_model().q
    for factors in (layer.lora_A, layer.lora_E, layer.lora_B):
        factors["default"].data.normal_()
    return model.train()
