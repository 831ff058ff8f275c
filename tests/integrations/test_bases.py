"""Which bases have their weight read, and that all others are called: torchao, float8, parametrised, hooked."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, init_device_mesh
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm
from transformers.pytorch_utils import Conv1D

from adalora_kernels.integrations.peft import layer_report, patch_model
from adalora_kernels.integrations.svd_layer import base_obstacle
from tests.integrations.one_layer import K, N, adapted, assert_same_results, inputs, layer_of, linear, results
from tests.integrations.one_layer import fused_calls as fused_calls
from tests.integrations.quantized_bases import Float8Linear


def _torchao(config: str, dtype: torch.dtype) -> nn.Linear:
    quantization = pytest.importorskip("torchao.quantization")
    holder = nn.Sequential(linear(dtype))
    quantization.quantize_(holder, getattr(quantization, config)())
    return holder[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_torchao_bases_are_called(config: str, dtype: torch.dtype, fused_calls: list[str]) -> None:
    """They are plain nn.Linear, and their weights report the dtype that they had."""
    base = _torchao(config, dtype)
    assert type(base) is nn.Linear and base.weight.dtype == dtype and isinstance(base.weight, nn.Parameter)
    assert "Tensor" in base_obstacle(base)
    theirs = adapted(base)
    ours = patch_model(copy.deepcopy(theirs))
    assert_same_results(ours, theirs, inputs(dtype))
    assert fused_calls == ["svd_linear_into"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_float8_base_with_a_scale_for_each_row(dtype: torch.dtype, fused_calls: list[str]) -> None:
    theirs = adapted(Float8Linear(linear(dtype)))
    ours = patch_model(copy.deepcopy(theirs))
    assert layer_of(ours).base_layer.weight.dtype == torch.float8_e4m3fn
    assert_same_results(ours, theirs, inputs(dtype))
    assert fused_calls == ["svd_linear_into"]


@pytest.mark.parametrize("kind", ["torchao", "float8", "parametrised"])
def test_the_increment_is_added_in_the_memory_of_the_bases_output(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = linear(torch.bfloat16)
    bases = {"float8": lambda: Float8Linear(plain), "torchao": lambda: _torchao("Int8WeightOnlyConfig", torch.bfloat16)}
    model = patch_model(adapted(bases.get(kind, lambda: plain)()))
    if kind == "parametrised":
        parametrizations.weight_norm(layer_of(model).base_layer)
    base_class, answers = type(layer_of(model).base_layer), list[Tensor]()
    forward = base_class.forward
    monkeypatch.setattr(base_class, "forward", lambda self, x: answers.append(forward(self, x)) or answers[-1])
    y = model(inputs(torch.bfloat16))
    assert len(answers) == 1 and y.data_ptr() == answers[0].data_ptr()


class _Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def _parametrised(base: nn.Linear) -> nn.Module:
    parametrize.register_parametrization(base, "weight", _Doubled())
    return base


def _with_bias_buffer(base: nn.Linear) -> nn.Module:
    bias = base.bias.detach()
    del base.bias
    base.register_buffer("bias", bias)
    return base


def _replaced(base: nn.Linear) -> nn.Module:
    base.forward = lambda x: 3 * nn.functional.linear(x, base.weight, base.bias)
    return base


def _hooked_before(base: nn.Linear) -> nn.Module:
    base.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    return base


def _pruned(base: nn.Linear) -> nn.Module:
    return prune.random_unstructured(base, "weight", 0.5)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "change",
    [_parametrised, parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal,
     weight_norm, spectral_norm, _pruned, _with_bias_buffer, _replaced, _hooked_before],
    ids=lambda change: change.__name__ + ("_module" if change in (weight_norm, spectral_norm) else ""),
)  # fmt: skip
def test_bases_whose_weight_is_not_all_are_called(
    change: Callable[[nn.Linear], nn.Module], fused_calls: list[str]
) -> None:
    """In fp64. Changed under the adapter: PEFT adapts no layer whose weight is computed."""
    models = [adapted(linear(torch.float64)).eval() for _ in range(2)]  # in training a spectral norm moves on
    for model in models:
        torch.manual_seed(5)
        base = change(layer_of(model).base_layer)
        base.requires_grad_(False)
        assert base_obstacle(base) is not None
    theirs, ours = models[0], patch_model(models[1])
    expected, actual = (results(model, inputs(torch.float64)) for model in (theirs, ours))
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value)
    assert fused_calls == ["svd_linear_into"]


@pytest.mark.parametrize("make", [nn.Linear, Conv1D], ids=["Linear", "Conv1D"])
def test_plain_bases_are_read(make: type[nn.Module], fused_calls: list[str]) -> None:
    base = linear() if make is nn.Linear else Conv1D(N, K)
    theirs = adapted(base, fan_in_fan_out=make is Conv1D)
    ours = patch_model(copy.deepcopy(theirs))
    assert base_obstacle(layer_of(ours).base_layer) is None
    assert_same_results(ours, theirs, inputs())
    assert fused_calls == ["svd_linear"]


def test_a_tied_or_moved_weight_is_read_where_it_is_now(fused_calls: list[str]) -> None:
    """Nothing of the base is kept between calls."""
    ours = patch_model(adapted(linear()))
    layer = layer_of(ours)
    before = ours(inputs())
    layer.base_layer.weight = nn.Parameter(2 * layer.base_layer.weight.detach(), requires_grad=False)
    assert not torch.allclose(ours(inputs()), before)
    torch.testing.assert_close(ours(inputs()), layer.base_layer(inputs()) + before - _base_alone(layer, before))
    ours.to(torch.float64)
    torch.testing.assert_close(
        ours(inputs(torch.float64)), layer.base_layer(inputs(torch.float64)) + _increment(layer, torch.float64)
    )
    assert set(fused_calls) == {"svd_linear"}


def _increment(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    return nn.functional.linear(inputs(dtype), layer.get_delta_weight("default"))


def _base_alone(layer: nn.Module, output: Tensor) -> Tensor:
    return output - _increment(layer, output.dtype)


def test_a_base_on_the_meta_device_is_left_to_peft(fused_calls: list[str]) -> None:
    theirs = adapted(linear())
    ours = patch_model(copy.deepcopy(theirs)).to("meta")
    y = ours(torch.empty(2, K, device="meta"))
    assert y.shape == (2, N) and y.is_meta
    layer_of(ours).to_empty(device="cpu")
    layer_of(ours).load_state_dict(layer_of(theirs).state_dict())
    layer_of(ours).ranknum["default"].data.fill_(4.0)
    torch.testing.assert_close(ours(inputs()), theirs(inputs()))
    assert fused_calls == ["svd_linear"]


def test_sharded_weights_and_inputs_are_called(tmp_path: object, fused_calls: list[str]) -> None:
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model = patch_model(adapted(linear()))
        expected, layer = model(inputs()), layer_of(model)
        base = layer.base_layer
        for name in ("weight", "bias"):
            sharded = torch.distributed.tensor.distribute_tensor(getattr(base, name).detach(), mesh)
            setattr(base, name, nn.Parameter(sharded, requires_grad=False))
        assert base_obstacle(base) == "the base's weight is a DTensor"
        for factors in (layer.lora_A, layer.lora_E, layer.lora_B):
            factors["default"] = nn.Parameter(
                torch.distributed.tensor.distribute_tensor(factors["default"].detach(), mesh)
            )
        layer.ranknum["default"] = nn.Parameter(
            torch.distributed.tensor.distribute_tensor(layer.ranknum["default"].detach(), mesh), requires_grad=False
        )
        (report,) = layer_report(model)
        assert not report.fused and "DTensor" in report.reason
        fused_calls.clear()
        y = model(torch.distributed.tensor.distribute_tensor(inputs().detach(), mesh))
        assert isinstance(y, DTensor) and not fused_calls
        torch.testing.assert_close(y.full_tensor(), expected)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mixed_dtypes(base_dtype: torch.dtype, adapter_dtype: torch.dtype) -> None:
    """The output has the base's dtype, gradients those of their parameters."""
    theirs = adapted(linear(base_dtype))
    layer = layer_of(theirs)
    for factors in (layer.lora_A, layer.lora_E, layer.lora_B):
        factors["default"].data = factors["default"].data.to(adapter_dtype)
    ours = patch_model(copy.deepcopy(theirs))
    expected, actual = results(theirs, inputs(base_dtype)), results(ours, inputs(base_dtype))
    coarse = max(torch.finfo(base_dtype).eps, torch.finfo(adapter_dtype).eps)
    for name, value in actual.items():
        assert value.dtype == expected[name].dtype
        error = (value.double() - expected[name].double()).norm()
        assert error <= 3 * coarse * expected[name].double().norm(), name
