"""The systems that the paper compares, each as a function that makes a transformers model ready to be trained."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import TrainerCallback

from adalora_kernels import AdaLoraCallback, patch_model
from benchmarks.paper.methods import ablations, bottleneck
from benchmarks.paper.methods.architecture import architecture_of, heads

# Without a task type PEFT leaves its orthogonality term out. This one adds nothing to the model; those of the tasks do,
# and PEFT 0.20's for sequence-to-sequence models can't be built with transformers 5.23.
TASK_TYPE = "FEATURE_EXTRACTION"


@dataclass(frozen=True)
class Setting:
    """What a method is set up with; each reads what it has.

    Attributes:
        size: width of each bottleneck; LoRA's rank; AdaLoRA's mean rank at the end. 0 for methods without one.
        alpha: the numerator of LoRA's and AdaLoRA's scale, alpha / (initial) rank.
        dropout_p: of the increment's input.
        initial_rank: AdaLoRA's, r⁰; None for the paper's: 12, 6, 4 and 2 for ``size`` 8, 4, 2 and 1.
        orthogonality: γ.
        total_steps: T, optimizer steps.
        initial_warmup, final_warmup, mask_interval: t_i, t_f and ΔT.
    """

    size: int = 0
    alpha: float = 16.0
    dropout_p: float = 0.0
    initial_rank: int | None = None
    orthogonality: float = 0.1
    total_steps: int = 1000
    initial_warmup: int = 100
    final_warmup: int = 300
    mask_interval: int = 10

    @property
    def first_rank(self) -> int:
        """r⁰."""
        return 2 * math.ceil(0.75 * self.size) if self.initial_rank is None else self.initial_rank


class Prepared(NamedTuple):
    """A model ready for transformers' Trainer.

    Attributes:
        model: only what the method trains requires gradients.
        callbacks: to be handed to the Trainer.
    """

    model: nn.Module
    callbacks: list[TrainerCallback]


def full(model: nn.Module, setting: Setting) -> Prepared:
    """Full fine-tuning: every parameter trains."""
    return Prepared(model.requires_grad_(True), [])


def bitfit(model: nn.Module, setting: Setting) -> Prepared:
    """BitFit (arXiv 2106.10199): the biases and the head train."""
    _freeze(model)
    for name, parameter in model.named_parameters():
        if name.rsplit(".", 1)[-1] == "bias":
            parameter.requires_grad_(True)
    return Prepared(model, [])


def houlsby(model: nn.Module, setting: Setting) -> Prepared:
    """HAdapter: bottlenecks behind the attention's and the feed-forward part's projection, and the head, train."""
    _freeze(model)
    bottleneck.insert(model, architecture_of(model).projections, setting.size)
    return Prepared(model, [])


def pfeiffer(model: nn.Module, setting: Setting) -> Prepared:
    """PAdapter: a bottleneck behind each feed-forward part's LayerNorm, and the head, train."""
    _freeze(model)
    bottleneck.insert(model, architecture_of(model).norms, setting.size)
    return Prepared(model, [])


def head_only(model: nn.Module, setting: Setting) -> Prepared:
    """Not one of the paper's: a head on the frozen model, which every method has to beat.

    Of a model whose head is its embedding, a copy of that embedding trains.
    """
    _freeze(model)
    if not heads(model):
        language_model: Any = model
        projection = language_model.get_output_embeddings()
        projection.weight = nn.Parameter(projection.weight.detach().clone())
        language_model.config.tie_word_embeddings = False
    return Prepared(model, [])


def lora(model: nn.Module, setting: Setting) -> Prepared:
    """LoRA (arXiv 2106.09685) through PEFT, on all matrices that AdaLoRA adapts."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type=TASK_TYPE,
        r=setting.size,
        lora_alpha=setting.alpha,
        lora_dropout=setting.dropout_p,
        target_modules=architecture_of(model).matrices,
        modules_to_save=heads(model),
    )
    return Prepared(get_peft_model(model, config), [])


def adalora_of_peft(model: nn.Module, setting: Setting) -> Prepared:
    """AdaLoRA by PEFT's own code, allocated after each of the Trainer's optimizer steps."""
    return Prepared(_peft_adalora(model, setting), [AdaLoraCallback(total_step=None)])


def adalora(model: nn.Module, setting: Setting) -> Prepared:
    """AdaLoRA through this package: PEFT's model, patched."""
    return Prepared(patch_model(_peft_adalora(model, setting)), [AdaLoraCallback(total_step=None)])


def without_orthogonality(model: nn.Module, setting: Setting) -> Prepared:
    """Ablation: γ = 0."""
    return adalora(model, replace(setting, orthogonality=0.0))


def by_singular_value(model: nn.Module, setting: Setting) -> Prepared:
    """Ablation: triplets are ranked by |Λ| alone."""
    return _ranked_by(ablations.SingularValueAllocator, adalora(model, setting))


def by_sensitivity(model: nn.Module, setting: Setting) -> Prepared:
    """Ablation: triplets are ranked by sensitivity alone."""
    return _ranked_by(ablations.SensitivityAllocator, adalora(model, setting))


def pruned_lora(model: nn.Module, setting: Setting) -> Prepared:
    """Ablation: LoRA whose pairs of vectors are pruned by AdaLoRA's importance: Λ stays at 1 until it is zeroed.

    A and B start as LoRA's do (B = 0), there is no orthogonality term, and a pair that was pruned stays so.
    """
    prepared = without_orthogonality(model, setting)
    with torch.no_grad():
        for name, parameter in prepared.model.named_parameters():
            if ".lora_E." in name:
                parameter.fill_(1).requires_grad_(False)
            elif ".lora_B." in name:
                parameter.zero_()
            elif ".lora_A." in name:
                nn.init.kaiming_uniform_(parameter, a=5**0.5)
    return prepared


METHODS: dict[str, Callable[[nn.Module, Setting], Prepared]] = {
    "full": full,
    "bitfit": bitfit,
    "houlsby": houlsby,
    "pfeiffer": pfeiffer,
    "lora": lora,
    "adalora": adalora,
    "adalora-peft": adalora_of_peft,
    "adalora-gamma-0": without_orthogonality,
    "adalora-singular-values": by_singular_value,
    "adalora-sensitivity": by_sensitivity,
    "pruned-lora": pruned_lora,
    "head": head_only,
}


def prepare(model: nn.Module, method: str, setting: Setting) -> Prepared:
    """Make ``model`` ready to be trained by ``method``, in place where the method allows.

    Args:
        model: a transformers model with its head.
        method: one of ``METHODS``.
        setting: as the method reads it.

    Raises:
        ValueError: an unknown method, an architecture that it has no places for, or a size below 1 where it needs one.
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    if setting.size < 1 and method not in ("full", "bitfit", "head"):
        raise ValueError(f"size: expected at least 1 for {method}, got {setting.size}")
    return METHODS[method](model, setting)


def trained_parameters(model: nn.Module) -> int:
    """How many parameters the method trains beyond the task's head, as the paper counts them."""
    task = _task_parameters(model)
    return sum(p.numel() for p in model.parameters() if p.requires_grad and id(p) not in task)


def _task_parameters(model: nn.Module) -> set[int]:
    from peft import PeftModel

    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return {id(p) for name in heads(inner) for p in getattr(inner, name).parameters()}


def _freeze(model: nn.Module) -> None:
    model.requires_grad_(False)
    for name in heads(model):
        getattr(model, name).requires_grad_(True)


def _ranked_by(allocator: type[ablations.TunerAllocator], prepared: Prepared) -> Prepared:
    tuner: Any = prepared.model.base_model
    ablations.use(allocator, tuner)
    return prepared


def _peft_adalora(model: nn.Module, setting: Setting) -> Any:
    from peft import AdaLoraConfig, get_peft_model

    config = AdaLoraConfig(
        task_type=TASK_TYPE,
        init_r=setting.first_rank,
        target_r=setting.size,
        tinit=setting.initial_warmup,
        tfinal=setting.final_warmup,
        deltaT=setting.mask_interval,
        total_step=setting.total_steps,
        orth_reg_weight=setting.orthogonality,
        lora_alpha=setting.alpha,
        lora_dropout=setting.dropout_p,
        target_modules=architecture_of(model).matrices,
        modules_to_save=heads(model),
    )
    return get_peft_model(model, config)


__all__ = ["METHODS", "Prepared", "Setting", "prepare", "trained_parameters"]
