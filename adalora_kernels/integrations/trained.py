"""The AdaLoRA adapter of a model in memory, PEFT's or of our own layers, and the plain model around it."""

from __future__ import annotations

import copy
from itertools import chain
from typing import Any

from peft import AdaLoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.adalora.model import AdaLoraModel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from transformers.pytorch_utils import Conv1D

from adalora_kernels.integrations.adapter import PREFIX, Adapter, Factors, plain_names
from adalora_kernels.integrations.guidance import infer_task_type
from adalora_kernels.nn import SVDLinear
from adalora_kernels.ops.shards import are_partitioned, are_sharded


def adapter_of(model: nn.Module, name: str | None = None) -> Adapter:
    """Read an AdaLoRA adapter out of a model. Its tensors are the model's own, detached.

    Args:
        model: a PEFT model with AdaLoRA, patched or not, or a model of this package's ``SVDLinear``.
        name: of PEFT's adapter; None for the active one.

    Raises:
        TypeError: not a module.
        ValueError: there is no such adapter, or its parameters are sharded or not finite.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a PEFT model, got {type(model).__name__}")
    model = unwrapped(model)
    if getattr(model, "peft_config", None):
        return _from_peft(model, name)
    layers = {path: m for path, m in model.named_modules() if isinstance(m, SVDLinear) and m.r > 0}
    if not layers or name is not None:
        wanted = "an AdaLoRA adapter" if name is None else f"an adapter {name!r}"
        raise ValueError(
            f"model: expected {wanted} of PEFT or layers of SVDLinear, found none in {type(model).__name__}"
        )
    return _from_layers(model, layers)


def unwrapped(model: nn.Module) -> nn.Module:
    """What torch.compile, DataParallel, DistributedDataParallel and PEFT's tuner hold inside."""
    while True:
        if isinstance(model, DataParallel | DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model.model if isinstance(model, AdaLoraModel) else model


def plain_copy(model: nn.Module) -> nn.Module:
    """The base model without its adapters. Its tensors are those of ``model``, its modules are new.

    Raises:
        ValueError: an adapter is merged into the weights.
    """
    model = unwrapped(model)
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    memo: dict[int, Any] = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    # Copies that are known beforehand are what deepcopy puts in their place.
    for path, module in model.named_modules():
        if getattr(module, "merged", False) and isinstance(module, AdaLoraLayer | SVDLinear):
            raise ValueError(f"model: expected weights without increments, {path} is merged; call unmerge first")
        if isinstance(module, AdaLoraLayer):
            memo[id(module)] = copy.deepcopy(module.get_base_layer(), memo)
        elif isinstance(module, ModulesToSaveWrapper):
            memo[id(module)] = copy.deepcopy(module.original_module, memo)
        elif isinstance(module, SVDLinear) and module.r > 0:
            memo[id(module)] = _linear(module, memo)
    plain = copy.deepcopy(model, memo)
    plain.__dict__.pop("peft_config", None)
    return plain


def _from_peft(model: nn.Module, name: str | None) -> Adapter:
    configs: Any = model.peft_config
    if name is None:
        active = next((m.active_adapters for m in model.modules() if isinstance(m, AdaLoraLayer)), None)
        name = next(iter(active or configs))
    if name not in configs or not isinstance(configs[name], AdaLoraConfig):
        have = ", ".join(f"{key!r} of {value.peft_type.value}" for key, value in configs.items())
        raise ValueError(f"adapter: expected one of ADALORA, got {name!r}; the model has {have}")
    config = configs[name]
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    layers: dict[str, Factors] = {}
    for path, layer in base.named_modules():
        if isinstance(layer, AdaLoraLayer) and name in layer.lora_A:
            c = float(layer.scaling[name]) / (float(layer.ranknum[name]) + 1e-5)
            inner = layer.get_base_layer()
            kernel = tuple(inner.weight.shape[1:]) if isinstance(inner, nn.Conv2d) else ()
            layers[path] = _factors(path, [f[name] for f in (layer.lora_A, layer.lora_E, layer.lora_B)], c, kernel)
    settings: dict[str, Any] = config.to_dict()
    if config.task_type is None and config.auto_mapping is None:
        settings["auto_mapping"] = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    return Adapter(settings, layers, _others_of_peft(model, base, name, config, layers))


def _others_of_peft(model: nn.Module, base: nn.Module, name: str, config: Any, layers: Any) -> dict[str, Tensor]:
    pattern, config.rank_pattern = config.rank_pattern, None  # PEFT would cut the factors by it, which we don't take
    try:
        saved: dict[str, Tensor] = get_peft_model_state_dict(model, adapter_name=name)
    finally:
        config.rank_pattern = pattern
    factors = {f"{path}.lora_{kind}" for path in layers for kind in "AEB"}
    tensors = {key.removeprefix(PREFIX): value for key, value in saved.items()}
    others = plain_names(((k, v) for k, v in tensors.items() if k not in factors), layers)
    if config.bias == "lora_only":  # PEFT looks for these biases where they were before it wrapped the layers
        for path in layers:
            layer: Any = base.get_submodule(path)
            if (bias := getattr(layer.get_base_layer(), "bias", None)) is not None:
                others[f"{path}.bias"] = bias
    return {key: value.detach() for key, value in others.items()}


def _from_layers(model: nn.Module, layers: dict[str, SVDLinear]) -> Adapter:
    """What trains beside the triplets is saved by whole modules, and an adapted layer's bias on its own."""
    found = {path: _factors(path, [m.lora_A, m.lora_E, m.lora_B], m.c) for path, m in layers.items()}
    others = {}
    heads: set[str] = set()
    bias = "none"
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if not parameter.requires_grad or leaf.startswith("lora_"):
            continue
        if owner in layers:
            others[name], bias = parameter.detach(), "lora_only"
        else:
            heads.add(owner)
    for head in heads:
        others.update({f"{head}.{key}": value for key, value in model.get_submodule(head).state_dict().items()})
    config = {
        "peft_type": "ADALORA",
        "task_type": infer_task_type(model),
        "base_model_name_or_path": getattr(getattr(model, "config", None), "name_or_path", None) or None,
        "fan_in_fan_out": any(m.fan_in_fan_out for m in layers.values()),
        "lora_dropout": max(m.dropout_p for m in layers.values()),
        "modules_to_save": sorted(heads) or None,
        "bias": bias,
    }
    return Adapter(config, found, others)


def _factors(path: str, parameters: list[Any], c: float, kernel: tuple[int, ...] = ()) -> Factors:
    if are_sharded(parameters) or are_partitioned(parameters):
        raise ValueError(f"model: expected whole parameters, {path} is sharded; export its checkpoint instead")
    A, E, B = (p.detach() for p in parameters)
    if not all(bool(t.isfinite().all()) for t in (A, E, B)):
        raise ValueError(f"model: expected finite numbers, {path} holds others; take an earlier checkpoint")
    return Factors(A, E, B, c, kernel)


def _linear(layer: SVDLinear, memo: dict[int, Any]) -> nn.Module:
    """The frozen layer alone, its weight stored as it was."""
    rows, columns = layer.weight.shape
    plain: nn.Module = Conv1D(columns, rows) if layer.fan_in_fan_out else nn.Linear(columns, rows, device="meta")
    plain.weight = memo[id(layer.weight)]
    plain.register_parameter("bias", None if layer.bias is None else memo[id(layer.bias)])
    return plain.train(layer.training)


__all__ = ["adapter_of", "plain_copy", "unwrapped"]
