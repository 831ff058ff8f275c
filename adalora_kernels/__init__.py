"""Kernel-accelerated AdaLoRA for PyTorch.

The public names are imported on first use, so that ``import adalora_kernels`` needs torch alone.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from adalora_kernels import reference
    from adalora_kernels.allocator import AdaLoraAdamW, RankAllocator, compute_orth_regu, graphed_step
    from adalora_kernels.integrations.checkpoint import load_training_state, save_training_state
    from adalora_kernels.integrations.export import export_lora
    from adalora_kernels.integrations.guidance import recommended_config
    from adalora_kernels.integrations.peft import patch_model, patch_peft, unpatch_model, unpatch_peft
    from adalora_kernels.integrations.trainer import AdaLoraCallback
    from adalora_kernels.nn import SVDLinear
    from adalora_kernels.ops.explain import explain
    from adalora_kernels.ops.svd_linear import svd_linear
    from adalora_kernels.ops.svd_linear_group import svd_linear_group

_HOME = {
    "AdaLoraAdamW": "adalora_kernels.allocator",
    "AdaLoraCallback": "adalora_kernels.integrations.trainer",
    "RankAllocator": "adalora_kernels.allocator",
    "SVDLinear": "adalora_kernels.nn",
    "compute_orth_regu": "adalora_kernels.allocator",
    "explain": "adalora_kernels.ops.explain",
    "export_lora": "adalora_kernels.integrations.export",
    "graphed_step": "adalora_kernels.allocator",
    "load_training_state": "adalora_kernels.integrations.checkpoint",
    "patch_model": "adalora_kernels.integrations.peft",
    "patch_peft": "adalora_kernels.integrations.peft",
    "recommended_config": "adalora_kernels.integrations.guidance",
    "save_training_state": "adalora_kernels.integrations.checkpoint",
    "svd_linear": "adalora_kernels.ops.svd_linear",
    "svd_linear_group": "adalora_kernels.ops.svd_linear_group",
    "unpatch_model": "adalora_kernels.integrations.peft",
    "unpatch_peft": "adalora_kernels.integrations.peft",
}


def __getattr__(name: str) -> Any:
    if name == "reference":
        return import_module("adalora_kernels.reference")
    if name not in _HOME:
        raise AttributeError(f"module 'adalora_kernels' has no attribute {name!r}")
    try:
        value = getattr(import_module(_HOME[name]), name)
    except ModuleNotFoundError as error:
        own = str(error.name).startswith("adalora_kernels")
        if own or not _HOME[name].startswith("adalora_kernels.integrations"):
            raise
        missing = error.name or "what Hugging Face's transformers needs"
        raise ImportError(f"adalora_kernels.{name} needs {missing}: pip install 'adalora-kernels[peft]'") from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "AdaLoraAdamW",
    "AdaLoraCallback",
    "RankAllocator",
    "SVDLinear",
    "__version__",
    "compute_orth_regu",
    "explain",
    "export_lora",
    "graphed_step",
    "load_training_state",
    "patch_model",
    "patch_peft",
    "recommended_config",
    "reference",
    "save_training_state",
    "svd_linear",
    "svd_linear_group",
    "unpatch_model",
    "unpatch_peft",
]
