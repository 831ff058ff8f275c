"""One line makes a PEFT AdaLoRA model fast: ``patch_model(model)``, or ``patch_peft()`` before PEFT builds it.

Patching exchanges classes in place. Parameters, optimizer references, hooks, ``state_dict`` and ``save_pretrained``
stay what they were, and checkpoints go both ways between patched and unpatched PEFT.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

from packaging.version import Version
from torch import nn

from adalora_kernels.integrations.supported import MINIMUM_PEFT, why_not_peft

try:
    import peft
    from peft.tuners.adalora.layer import AdaLoraLayer
    from peft.tuners.adalora.model import AdaLoraModel
except ImportError as error:
    raise why_not_peft(error) from error
if Version(peft.__version__) < Version(MINIMUM_PEFT):
    raise why_not_peft()

from adalora_kernels.allocator import find_triplets
from adalora_kernels.allocator.watch import unwatch, watch
from adalora_kernels.backends.select import Backend, parse, select
from adalora_kernels.integrations.adalora_model import FusedAdaLoraModel, fuse_model, restore_model
from adalora_kernels.integrations.exchange import can_be_fused, fuse_layer, is_fused, restore_layer
from adalora_kernels.integrations.guidance import check_config
from adalora_kernels.integrations.ranknum import is_frozen
from adalora_kernels.integrations.siblings import link_siblings

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class LayerReport:
    """What a patched model does with one adapted layer.

    Attributes:
        name: path in the model.
        kind: name of its class.
        fused: whether its increment goes through this package.
        reason: why, or how.
    """

    name: str
    kind: str
    fused: bool
    reason: str


def patch_model(peft_model: Model, backend: str | Backend | None = None, *, siblings: bool | None = None) -> Model:
    """Exchange the classes of PEFT's AdaLoRA layers and model for the fused ones, in place.

    Layers over other bases than linear ones (Conv2d) keep PEFT's code; ``layer_report`` lists them. A model that is
    patched already stays so and takes the backend and ``siblings``. Settings of a trained adapter that make AdaLoRA
    less than it is are warned about once.

    Args:
        peft_model: a ``PeftModel``, an ``AdaLoraModel``, or any module that holds PEFT's AdaLoRA layers.
        backend: as in ``adalora_kernels.svd_linear``; None for the best that can run.
        siblings: whether layers that read the same tensor (q, k, v; gate, up) are computed together, as one node of the
            autograd graph; which ones do is learned from their calls. None: on a CUDA device under triton.

    Returns:
        ``peft_model``.

    Raises:
        TypeError: not a module, or ``siblings`` is none of the three.
        ValueError: no AdaLoRA layers in it, or an unknown backend.
        RuntimeError: the backend asked for can't run here.
        In each case the model is as it was.
    """
    layers, tuners = _find(peft_model)
    if not isinstance(siblings, bool | None):
        raise TypeError(f"siblings: expected True, False or None, got {siblings!r:.60}")
    if parse(backend) is not None:
        for layer in layers.values():
            for factor in layer.lora_A.values():
                select("svd_linear", factor.device.type, factor.dtype, factor.shape[0], backend)
    for config in (config for tuner in tuners for config in tuner.peft_config.values()):
        if not config.inference_mode:
            check_config(config, patched=True)
    fresh: list[nn.Module] = [m for m in (*layers.values(), *tuners) if not _is_patched(m)]
    try:
        for layer in layers.values():
            fuse_layer(layer, backend)
        for tuner in tuners:
            fuse_model(tuner, backend, siblings)
        link_siblings(peft_model, siblings)
        if not tuners and (triplets := find_triplets(peft_model)):
            remedy = "RankAllocator(model, ...).attach(optimizer)"
            watch(peft_model, triplets[0].slots[1], "patch_model was called", remedy)
    except BaseException:
        for module in fresh:
            _restore(module)
        raise
    return peft_model


def unpatch_model(peft_model: Model) -> Model:
    """Undo ``patch_model``: PEFT's classes again, and PEFT's allocator continues with our averages.

    Raises:
        TypeError: not a module.
        ValueError: no AdaLoRA layers in it.
    """
    layers, tuners = _find(peft_model)
    for module in (*layers.values(), *tuners):
        _restore(module)
    unwatch(peft_model)
    return peft_model


def patch_peft() -> None:
    """Patch what PEFT builds or extends from now on: get_peft_model, from_pretrained, add_adapter, injection."""
    AdaLoraModel.inject_adapter = _inject_and_patch
    AdaLoraModel._create_new_module = staticmethod(_create_fused_module)


def unpatch_peft() -> None:
    """Undo ``patch_peft``; models that were built meanwhile stay patched."""
    for name, method in _PEFTS_METHODS.items():
        if method is not None:
            setattr(AdaLoraModel, name, method)
        elif name in AdaLoraModel.__dict__:
            delattr(AdaLoraModel, name)


def layer_report(model: nn.Module) -> list[LayerReport]:
    """What happens to each adapted layer of ``model``: fused or left to PEFT, and why.

    Raises:
        TypeError: not a module.
        ValueError: no AdaLoRA layers in it.
    """
    layers, _ = _find(model)
    return [_report(name, layer) for name, layer in layers.items()]


# As AdaLoraModel has them of its own, or None where it inherits them.
_PEFTS_METHODS = {name: AdaLoraModel.__dict__.get(name) for name in ("inject_adapter", "_create_new_module")}
_pefts_inject_adapter = AdaLoraModel.inject_adapter
_pefts_create_new_module = AdaLoraModel._create_new_module


def _create_fused_module(*args: Any, **kwargs: Any) -> nn.Module:
    module: nn.Module = _pefts_create_new_module(*args, **kwargs)
    fuse_layer(module, None)
    return module


def _inject_and_patch(self: AdaLoraModel, *args: Any, **kwargs: Any) -> None:
    _pefts_inject_adapter(self, *args, **kwargs)
    if type(self) is AdaLoraModel:
        patch_model(self)


def _find(model: nn.Module) -> tuple[dict[str, AdaLoraLayer], list[AdaLoraModel]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"peft_model: expected a PeftModel, got {type(model).__name__}")
    modules = dict(model.named_modules())
    layers = {name: module for name, module in modules.items() if isinstance(module, AdaLoraLayer)}
    if not layers:
        raise ValueError(
            f"peft_model: expected a model with AdaLoRA layers, found none in {type(model).__name__}; build it by "
            "get_peft_model(model, AdaLoraConfig(...))"
        )
    return layers, [m for m in modules.values() if type(m) in (AdaLoraModel, FusedAdaLoraModel)]


def _is_patched(module: nn.Module) -> bool:
    return is_frozen(module) if isinstance(module, AdaLoraLayer) else type(module) is FusedAdaLoraModel


def _restore(module: nn.Module) -> None:
    if isinstance(module, AdaLoraLayer):
        restore_layer(module)
    elif type(module) is FusedAdaLoraModel:
        restore_model(module)


def _report(name: str, layer: AdaLoraLayer) -> LayerReport:
    kind = type(layer).__name__
    if can_be_fused(layer):
        return LayerReport(name, kind, False, "not patched")
    if not is_fused(layer):
        return LayerReport(name, kind, False, "keeps PEFT's code: only layers over linear bases are fused")
    return LayerReport(name, kind, *layer.report())


__all__ = ["LayerReport", "layer_report", "patch_model", "patch_peft", "unpatch_model", "unpatch_peft"]
