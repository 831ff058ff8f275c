"""``explain``: which backend and plan a call, a layer, a group of layers or a whole model takes, and why."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adalora_kernels.backends.select import OPS, Backend, Selection, implementation, select
from adalora_kernels.ops.svd_linear import compute_dtype_of, svd_linear
from adalora_kernels.ops.svd_linear_group import GroupedLayer, svd_linear_group
from adalora_kernels.reference.svd_linear import Adapter
from adalora_kernels.reference.svd_linear_group import Member

NOMINAL_TOKENS = 8192


@dataclass(frozen=True)
class Explanation:
    """What one layer or operation runs on.

    Attributes:
        name: path of the layer, or name of the operation.
        backend: "reference", "native" or "triton"; "none" where the layer is not ours and keeps its own code.
        plan: the backend's way of doing it; "forward/backward" where each has its own.
        reason: why.
        configuration: how the plan's kernels are launched, where that is chosen too; else empty.
    """

    name: str
    backend: str
    plan: str
    reason: str
    configuration: str = ""

    def __str__(self) -> str:
        plan = f"{self.plan}: {self.configuration}" if self.configuration else self.plan
        return f"{self.name}: {self.backend} ({plan}), {self.reason}"


def explain(target: Any = None, *args: Any, backend: str | Backend | None = None, **kwargs: Any) -> list[Explanation]:
    """Say which backend and plan is taken, and why.

    Args:
        target: a model: one line for each layer with an AdaLoRA adapter, those not accelerated included, for an input
            of 8192 tokens in the weight's dtype; of layers that are computed together, with which others, or else why
            alone. Or x, the first argument of ``svd_linear`` or ``svd_linear_group``, with the others following as in
            that call: the line of that call. Or None: a line for each operation on this machine's default device in
            fp32.
        *args, **kwargs: the other arguments of ``svd_linear`` or ``svd_linear_group``.
        backend: a backend asked for by name, as in the call to be explained.

    Raises:
        TypeError: ``target`` is something else, or the arguments are those of neither call.
        RuntimeError: the backend or plan asked for can't run, as the call itself would raise.
    """
    if target is None:
        device = torch.get_default_device().type
        if device == "cpu" and torch.cuda.is_available():
            device = "cuda"
        return [_line(op, select(op, device, torch.float32, 0, backend)) for op in OPS]
    if isinstance(target, nn.Module):
        return _explain_model(target)
    if hasattr(target, "explain_importance"):
        return [Explanation("importance", *target.explain_importance())]
    if isinstance(target, Tensor) and ("layers" in kwargs or (args and isinstance(args[0], (list, tuple)))):
        call = inspect.signature(svd_linear_group).bind(target, *args, backend=backend, **kwargs)
        call.apply_defaults()
        x, layers = call.args
        dropout_p = call.kwargs["dropout_p"] if call.kwargs["training"] else 0.0
        group = [GroupedLayer(*layer) for layer in layers]
        return [_line("svd_linear_group", explain_group_call(x, group, dropout_p=dropout_p, backend=backend))]
    if isinstance(target, Tensor):
        call = inspect.signature(svd_linear).bind(target, *args, backend=backend, **kwargs)
        call.apply_defaults()
        x, weight, *adapter = call.args
        dropout_p = call.kwargs["dropout_p"] if call.kwargs["training"] else 0.0
        return [_line("svd_linear", explain_layer_call(x, weight, *adapter, dropout_p=dropout_p, backend=backend))]
    raise TypeError(f"target: expected a model, a tensor or None, got {type(target).__name__}")


def explain_layer_call(
    x: Tensor,
    weight: Tensor | None,
    lora_A: Tensor,
    lora_E: Tensor,
    lora_B: Tensor,
    *,
    dropout_p: float = 0.0,
    backend: str | Backend | None = None,
) -> Selection:
    """What such a call of ``svd_linear`` runs on, or of ``svd_linear_into`` where ``weight`` is None.

    Errors as in ``explain``.
    """
    dtype = compute_dtype_of(x)
    selection = select("svd_linear", x.device.type, dtype, lora_A.shape[0], backend)
    if selection.backend is not Backend.TRITON:
        return selection
    adapter = _adapter(lora_A, lora_E, lora_B, dropout_p, dtype)
    of_layer = implementation("svd_linear", Backend.TRITON).explain
    return _explained(selection, of_layer(_of_two_dimensions(x), weight, adapter, selection.plan_asked_for))


def explain_group_call(
    x: Tensor, layers: Sequence[GroupedLayer], *, dropout_p: float = 0.0, backend: str | Backend | None = None
) -> Selection:
    """What such a call of ``svd_linear_group`` runs on.

    Raises:
        ValueError: there is no layer. Other errors as in ``explain``.
    """
    if not layers:
        raise ValueError("layers: expected at least one layer, got none")
    dtype = compute_dtype_of(x)
    selection = select("svd_linear", x.device.type, dtype, max(layer.lora_A.shape[0] for layer in layers), backend)
    if selection.backend is not Backend.TRITON:
        how = f"{len(layers)} layers one by one in one node of the autograd graph"
        return selection._replace(reason=f"{selection.reason}; {how}")
    from adalora_kernels.backends.triton import group

    members = [Member(w, bias, _adapter(a, e, b, dropout_p, dtype)) for w, a, e, b, bias, *_ in layers]
    return _explained(selection, group.explain(_of_two_dimensions(x), members, plan=selection.plan_asked_for))


def _adapter(lora_A: Tensor, lora_E: Tensor, lora_B: Tensor, dropout_p: float, dtype: torch.dtype) -> Adapter:
    seed = lora_A.new_empty(1, dtype=torch.int64) if dropout_p > 0 and lora_A.shape[0] > 0 else None
    return Adapter(lora_A, lora_E, lora_B, None, seed, 1.0, dropout_p, dtype)


def _of_two_dimensions(x: Tensor) -> Tensor:
    """As large as x is to a launcher; without its data."""
    return x.new_empty(()).expand(math.prod(x.shape[:-1]), x.shape[-1])


def _explained(selection: Selection, explained: tuple[str, str, str]) -> Selection:
    plan, configuration, reason = explained
    return selection._replace(plan=plan, configuration=configuration, reason=f"{selection.reason}; {reason}")


def explain_layer(
    weight: Tensor | None,
    lora_A: Tensor,
    lora_E: Tensor,
    lora_B: Tensor,
    *,
    dropout_p: float = 0.0,
    backend: str | Backend | None = None,
) -> Selection:
    """As ``explain_layer_call``, for an input of ``NOMINAL_TOKENS`` in the dtype of the weight, or else of lora_A."""
    x = (lora_A if weight is None else weight).new_empty(()).expand(NOMINAL_TOKENS, lora_A.shape[1])
    return explain_layer_call(x, weight, lora_A, lora_E, lora_B, dropout_p=dropout_p, backend=backend)


def _line(name: str, selection: Selection) -> Explanation:
    return Explanation(name, *described(selection))


def described(selection: Selection) -> tuple[str, str, str, str]:
    """Backend, plan, reason and configuration in words."""
    return selection.backend.value, selection.plan, selection.reason, selection.configuration


def _explain_model(model: nn.Module) -> list[Explanation]:
    factors = ("lora_A", "lora_E", "lora_B")
    layers = {name: module for name, module in model.named_modules() if all(hasattr(module, f) for f in factors)}
    patched = any(hasattr(layer, "explain_layer") for layer in layers.values())
    lines = []
    for name, layer in layers.items():
        if hasattr(layer, "explain_layer"):
            lines.append(Explanation(name, *layer.explain_layer()))
        else:
            kind = f"{type(layer).__module__}.{type(layer).__qualname__}"
            why = "is not accelerated" if patched else "is not patched: call patch_model(model)"
            lines.append(Explanation(name, "none", "its own", f"{kind} {why}"))
    return lines


__all__ = [
    "NOMINAL_TOKENS",
    "Explanation",
    "described",
    "explain",
    "explain_group_call",
    "explain_layer",
    "explain_layer_call",
]
