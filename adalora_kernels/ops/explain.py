"""``explain``: which backend and plan a call, a layer or a whole model takes, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adalora_kernels.backends.select import OPS, Backend, Selection, select
from adalora_kernels.ops.svd_linear import select_layer


@dataclass(frozen=True)
class Explanation:
    """What one layer or operation runs on.

    Attributes:
        name: path of the layer, or name of the operation.
        backend: "reference", "native" or "triton"; "none" where the layer is not ours and keeps its own code.
        plan: the backend's way of doing it.
        reason: why.
    """

    name: str
    backend: str
    plan: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.backend} ({self.plan}), {self.reason}"


def explain(target: Any = None, *args: Any, backend: str | Backend | None = None, **kwargs: Any) -> list[Explanation]:
    """Say which backend and plan is taken, and why.

    Args:
        target: a model: one line for each layer with an AdaLoRA adapter, those not accelerated included. Or x, the
            first argument of ``svd_linear``, with the others following as in that call: the line of that call. Or
            None: a line for each operation on this machine's default device in fp32.
        *args, **kwargs: the other arguments of ``svd_linear``.
        backend: a backend asked for by name, as in the call to be explained.

    Raises:
        TypeError: ``target`` is something else.
        RuntimeError: the backend asked for can't run, as the call itself would raise.
    """
    if target is None:
        device = torch.get_default_device().type
        if device == "cpu" and torch.cuda.is_available():
            device = "cuda"
        return [_line(op, select(op, device, torch.float32, 0, backend)) for op in OPS]
    if isinstance(target, nn.Module):
        return _explain_model(target)
    if isinstance(target, Tensor):
        lora_A = args[1] if len(args) > 1 else kwargs["lora_A"]
        return [_line("svd_linear", select_layer(target, lora_A, backend))]
    raise TypeError(f"target: expected a model, a tensor or None, got {type(target).__name__}")


def _line(name: str, selection: Selection) -> Explanation:
    return Explanation(name, selection.backend.value, selection.plan, selection.reason)


def _explain_model(model: nn.Module) -> list[Explanation]:
    lines = []
    for name, module in model.named_modules():
        if not all(hasattr(module, part) for part in ("lora_A", "lora_E", "lora_B")):
            continue
        if hasattr(module, "explain_layer"):
            lines.append(Explanation(name, *module.explain_layer()))
        else:
            kind = f"{type(module).__module__}.{type(module).__qualname__}"
            lines.append(Explanation(name, "none", "its own", f"{kind} is not accelerated"))
    return lines


__all__ = ["Explanation", "explain"]
