"""An AdaLoRA configuration that fits a model, a training length and a budget; warnings for those that don't.

The constants are what there is to tune; each names its source.
"""

from __future__ import annotations

import functools
import math
import re
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

try:
    from peft import AdaLoraConfig, PeftModelForSeq2SeqLM
    from peft.tuners.tuners_utils import BaseTunerLayer
except ImportError as error:
    raise ImportError("configurations for PEFT need it: pip install 'adalora-kernels[peft]'") from error

from adalora_kernels.ops.checks import check_number

# Medians of the paper's twelve runs (appendix tables of hyper-parameters; steps = epochs · examples / batch):
# the initial warm-up takes 4 to 18 % of the steps, the final one 44 to 63 %.
INITIAL_WARMUP_SHARE = 0.12
FINAL_WARMUP_SHARE = 0.5
# The paper ranks 64 to 1500 times between the two, and never more rarely than every 100 steps.
RANKINGS = 200
LONGEST_INTERVAL = 100
# The paper's initial over final average rank: 12/8, 6/4, 4/2, 2/1.
INITIAL_OVER_TARGET = 1.5
# c = alpha / init_r. LoRA's habit is alpha = 2 r; the paper's runs lie between 1.3 (16/12) and 16 (32/2).
INCREMENT_SCALE = 2.0
# The paper's for nine of its twelve tasks, most of whose losses start near 1. The term's gradient keeps its size
# however small the loss, so this is per unit of loss: in benchmarks/results/teacher.md AdaLoRA beats LoRA at every
# increment scale up to once the initial loss, best near 0.1 of it, and loses at 6 to 10 times.
ORTHOGONALITY = 0.1
# Of both running means, in the paper and in both published codes.
BETA = 0.85
# Outside of these c is warned about. Hugging Face's comparison had 8/64 = 0.125 where its LoRA had 2.
SCALE_RANGE = (0.5, 32.0)

_BUDGET = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(k|m|b|%|triplets)\s*", re.IGNORECASE)
_MAGNITUDES = {"k": 1e3, "m": 1e6, "b": 1e9}
_MAPPINGS = {  # of transformers' class names, in the order in which they are asked
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "SEQ_2_SEQ_LM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "CAUSAL_LM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "FEATURE_EXTRACTION": "MODEL_MAPPING_NAMES",
}
_RENAMED = "_prepare_encoder_decoder_kwargs_for_generation"
_CLASSIFIERS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


def recommended_config(
    model: nn.Module,
    total_step: int,
    budget: int | str,
    *,
    target_modules: Sequence[str] | None = None,
    reducible_loss: float = 1.0,
    **settings: Any,
) -> AdaLoraConfig:
    """A configuration with the paper's schedule fractions, LoRA's usual scale and the model's task type.

    The paper adapts every weight matrix of the transformer: so does this, but for the head, which trains whole where
    the model has a fresh one. The learning rate isn't part of it: the paper's are 5e-4 to 2.2e-3, above LoRA's.

    Args:
        model: the base model, before ``get_peft_model``.
        total_step: optimizer steps of the whole training.
        budget: what is left at the end. A number is the average rank of a matrix, as LoRA's r. A string is the
            trainable parameters of the adapters ("0.32M", "320k"), their share of the model's ("0.08%") or the total
            rank ("144 triplets"). PEFT takes whole average ranks: strings are rounded to the nearest one.
        target_modules: names or endings of the paths of the layers to adapt; None for all linear ones but the head.
        reducible_loss: by how much training is expected to lower the loss, to the order of magnitude; the orthogonality
            term is weighed by it. The default suits a classifier with a fresh head. Where the base is nearly right
            already, or the loss is a small squared error, give what it is: a heavier term drowns the task.
        settings: fields of ``AdaLoraConfig`` that replace what is recommended.

    Raises:
        TypeError, ValueError: an argument is not as above, or the budget is too large or too small for the layers.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected the base model, got {type(model).__name__}")
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            f"model: expected the base model, got a {type(model).__name__} with PEFT's layers in it; call this before "
            "get_peft_model, or give model.unload()"
        )
    if isinstance(total_step, bool) or not isinstance(total_step, int) or total_step < 4:
        raise ValueError(f"total_step: expected at least 4 optimizer steps, got {total_step!r}")
    if not (isinstance(reducible_loss, float | int) and 0 < reducible_loss < math.inf):
        raise ValueError(f"reducible_loss: expected a positive number, got {reducible_loss!r}")
    layers, heads = _layers_and_heads(model)
    if target_modules is not None:
        layers = _named(model, target_modules)
    task_type = settings.get("task_type", infer_task_type(model))
    if task_type not in _CLASSIFIERS and "Classification" not in type(model).__name__:
        heads = []  # it was pretrained with the rest
    target_r = _average_rank(budget, model, layers)
    init_r = settings.get("init_r", _initial_rank(target_r, layers))
    check_number("init_r", init_r, whole=True)
    initial, final = round(INITIAL_WARMUP_SHARE * total_step), round(FINAL_WARMUP_SHARE * total_step)
    names, excluded = (list(target_modules), []) if target_modules is not None else _shortest_names(model, layers)
    recommended = {
        "task_type": task_type,
        "target_r": target_r,
        "init_r": init_r,
        "lora_alpha": round(INCREMENT_SCALE * init_r),
        "tinit": initial,
        "tfinal": final,
        "deltaT": max(1, min(LONGEST_INTERVAL, (total_step - initial - final) // RANKINGS)),
        "beta1": BETA,
        "beta2": BETA,
        "orth_reg_weight": ORTHOGONALITY * reducible_loss,
        "total_step": total_step,
        "target_modules": names,
        "exclude_modules": excluded or None,
        "modules_to_save": heads or None,
        "fan_in_fan_out": all(isinstance(layer, Conv1D) for layer in layers.values()),
    }
    config = AdaLoraConfig(**{**recommended, **settings})
    check_config(config)
    return config


def check_config(config: AdaLoraConfig, patched: bool = False) -> list[str]:
    """Warn, once for each, of settings that make AdaLoRA less than it is.

    Args:
        config: of an adapter that is to be trained.
        patched: whether the model's classes are this package's, which add the orthogonality term to any loss.

    Returns:
        What is wrong, with the cure.
    """
    found = []
    if config.task_type is None and config.orth_reg_weight > 0 and not patched:
        found.append(
            "task_type=None: PEFT never adds the orthogonality term then; call patch_model, which adds it to any loss, "
            "or set task_type"
        )
    # Without a rank there is no increment to scale.
    scale = config.lora_alpha / config.init_r if config.lora_alpha > 0 and config.init_r > 0 else 1.0
    if not SCALE_RANGE[0] <= scale <= SCALE_RANGE[1]:
        found.append(
            f"lora_alpha / init_r = {config.lora_alpha}/{config.init_r} = {scale:.3g} scales the increment; LoRA's "
            f"habit is a factor of {INCREMENT_SCALE:g}: set lora_alpha={round(INCREMENT_SCALE * config.init_r)}"
        )
    if config.target_r >= config.init_r:
        found.append(
            f"target_r={config.target_r} is not below init_r={config.init_r}: nothing is ever pruned, and "
            f"unpatched PEFT fails; set init_r={_paired_initial_rank(config.target_r)}"
        )
    for text in found:
        _warn_once(f"AdaLoRA: {text}.")
    return found


def infer_task_type(model: nn.Module) -> str | None:
    """PEFT's task type of a transformers model, by the classes that it is or extends; None where PEFT has none for it.

    PEFT's classes of a task pass ``input_ids``: models that read pictures or sound have none. Up to 0.20 its class for
    sequence-to-sequence models reads a method that transformers 5 has renamed.
    """
    from transformers.models.auto import modeling_auto

    if getattr(model, "main_input_name", None) != "input_ids":
        return None
    classes = {cls.__name__ for cls in type(model).__mro__}
    for task_type, mapping in _MAPPINGS.items():
        if not classes.isdisjoint(_flat(getattr(modeling_auto, mapping).values())):
            unfit = task_type == "SEQ_2_SEQ_LM" and _RENAMED in PeftModelForSeq2SeqLM.__init__.__code__.co_names
            return None if unfit and not hasattr(model, _RENAMED) else task_type
    return None


@functools.cache
def _warn_once(text: str) -> None:
    warnings.warn(text, stacklevel=4)


def _flat(names: Any) -> set[str]:
    return {name for entry in names for name in ((entry,) if isinstance(entry, str) else entry)}


def _linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """By path; quantised ones, which are classes of their own, tell by their attributes."""
    return {
        path: m for path, m in model.named_modules() if isinstance(m, Conv1D) or type(vars(m).get("in_features")) is int
    }


def _layers_and_heads(model: nn.Module) -> tuple[dict[str, nn.Module], list[str]]:
    """The linear layers to adapt, and the modules beside the transformer that are the head."""
    layers = _linear_layers(model)
    heads: list[str] = []
    if isinstance(model, PreTrainedModel):
        if model.base_model is not model:
            beside = [name for name, module in model.named_children() if module is not model.base_model]
        else:
            beside = [name for name, _ in model.named_children() if name in layers]
        layers = {name: m for name, m in layers.items() if name.partition(".")[0] not in beside}
        heads = [name for name in beside if any(True for _ in model.get_submodule(name).parameters())]
    if not layers:
        raise ValueError(f"model: expected linear layers to adapt, found none in {type(model).__name__}")
    return layers, heads


def _named(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise TypeError(f"target_modules: expected a list of names, got {names!r:.60}")
    linear = _linear_layers(model)
    unmatched = [name for name in names if not any(_ends_with(path, name) for path in linear)]
    if unmatched or not names:
        raise ValueError(f"target_modules: expected names of linear layers of the model, got {unmatched or names}")
    return {path: m for path, m in linear.items() if any(_ends_with(path, name) for name in names)}


def _ends_with(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _shortest_names(model: nn.Module, layers: dict[str, nn.Module]) -> tuple[list[str], list[str]]:
    """Last parts of the layers' paths, and the other modules that these would match."""
    names = sorted({path.rpartition(".")[2] for path in layers})
    matched = {path for path, _ in model.named_modules() if path.rpartition(".")[2] in names}
    return names, sorted(matched.difference(layers))


def _shape(layer: nn.Module) -> tuple[int, int]:
    """(in, out), not from the weight, which is stored in another shape where it is quantised."""
    names = ("nx", "nf") if isinstance(layer, Conv1D) else ("in_features", "out_features")
    rows, columns = (int(vars(layer)[name]) for name in names)
    return rows, columns


def _average_rank(budget: int | str, model: nn.Module, layers: dict[str, nn.Module]) -> int:
    largest = min(min(_shape(layer)) for layer in layers.values()) - 1
    if isinstance(budget, int) and not isinstance(budget, bool):
        rank: float = budget
    elif isinstance(budget, str) and (match := _BUDGET.fullmatch(budget)):
        amount, unit = float(match[1]), match[2].lower()
        # A triplet of a matrix has a row of A, a column of B and a singular value.
        each = sum(sum(_shape(layer)) + 1 for layer in layers.values())
        if unit == "triplets":
            rank = amount / len(layers)
        elif unit == "%":
            every = model.num_parameters() if isinstance(model, PreTrainedModel) else _count(model)
            rank = amount / 100 * every / each
        else:
            rank = amount * _MAGNITUDES[unit] / each
        # Half a rank is nearer to 1 than to nothing.
        rank = math.floor(rank + 0.5)
    else:
        raise ValueError(
            "budget: expected an average rank such as 8, or a string such as '0.32M', '320k', '0.08%' or "
            f"'144 triplets'; got {budget!r}"
        )
    if not 1 <= rank <= largest:
        raise ValueError(
            f"budget: expected an average rank of 1 to {largest} for the model's {len(layers)} layers, {budget!r} is "
            f"{rank}; change the budget or target_modules"
        )
    return int(rank)


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _initial_rank(target_r: int, layers: dict[str, nn.Module]) -> int:
    return min(_paired_initial_rank(target_r), min(min(_shape(layer)) for layer in layers.values()))


def _paired_initial_rank(target_r: int) -> int:
    """The even number at or above INITIAL_OVER_TARGET times the target: the paper's own 12, 6, 4, 2 for 8, 4, 2, 1."""
    return 2 * math.ceil(INITIAL_OVER_TARGET * target_r / 2)


__all__ = ["check_config", "infer_task_type", "recommended_config"]
