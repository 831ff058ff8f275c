"""AdaLoRA for those who serve: as a plain LoRA checkpoint, or folded into the weights.

A pruned model is exactly a LoRA with lora_A = A_live and lora_B = B_live diag(c E_live), of a rank of its own in each
layer and of factor 1. The merged weight is W + c B diag(E) A, summed in fp32 and rounded once.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file, save_model
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

try:
    from peft import LoraConfig
except ImportError as error:
    raise ImportError("export needs Hugging Face PEFT: pip install 'adalora-kernels[peft]'") from error

from adalora_kernels.integrations.adapter import (
    CONFIG_FILE,
    FLOATS,
    PREFIX,
    SHARED_SETTINGS,
    TENSOR_FILE,
    Adapter,
    Factors,
)
from adalora_kernels.integrations.trained import adapter_of, plain_copy, unwrapped


def export_lora(
    model: nn.Module, path: str | Path, *, adapter: str | None = None, uniform_rank: bool = False
) -> dict[str, int]:
    """Write a trained AdaLoRA adapter as a plain LoRA checkpoint that gives the same outputs.

    It loads with unpatched PEFT and with what serves LoRA. Tensors are fp32 (fp64 where the adapter is), since products
    of 16-bit numbers don't fit into 16 bits. Triplets of singular value 0 are left out, and so are layers that have no
    others; heads, biases and embeddings that PEFT would save are kept.

    Args:
        model: a PEFT model with AdaLoRA, patched or not, or a model of this package's ``SVDLinear``.
        path: the folder to write adapter_config.json and adapter_model.safetensors into; made where it is missing.
        adapter: name of PEFT's adapter; None for the active one.
        uniform_rank: give every layer the largest live rank, filled up with zeros, for engines that know neither
            rank_pattern nor alpha_pattern and divide by the rank of each tensor, such as llama.cpp. Otherwise layers
            keep their own rank, and the global r is the largest.

    Returns:
        The live rank of each adapted layer.

    Raises:
        TypeError, ValueError: there is no such adapter in ``model``, its parameters are sharded or not finite, or
            ``path`` holds another method's adapter.
    """
    found = adapter_of(model, adapter)
    known = [name.removeprefix(PREFIX) for name, _ in unwrapped(model).named_modules()]
    write_lora(found, path, known=known, uniform_rank=uniform_rank)
    return found.ranks()


def export_merged(model: nn.Module, path: str | Path, *, adapter: str | None = None) -> None:
    """Write the base model with the increments folded into its weights; plain transformers loads it.

    ``model`` stays as it is; its tensors are shared meanwhile, and only the adapted weights exist twice.

    Args:
        model: as in ``export_lora``, over bases whose weights are plain floating-point numbers.
        path: the folder to write into, by ``save_pretrained`` where the model has it; else its model.safetensors.
        adapter: as in ``export_lora``.

    Raises:
        TypeError, ValueError: as ``export_lora``; or a base is merged already, quantised, offloaded, tied or has tokens
            that train on their own.
    """
    found = adapter_of(model, adapter)
    plain = plain_copy(model)
    merge_into(plain, found)
    write_model(plain, path)


def write_lora(adapter: Adapter, path: str | Path, *, known: Iterable[str] = (), uniform_rank: bool = False) -> None:
    """Write ``adapter`` as LoRA; see ``export_lora``.

    Args:
        adapter: what to write.
        path: the folder.
        known: module names of the model beyond the adapted layers, where they are known.
        uniform_rank: as in ``export_lora``.

    Raises:
        ValueError: as ``export_lora``.
    """
    path = Path(path)
    _refuse_foreign(path)
    ranks = {name: rank for name, rank in adapter.ranks().items() if rank}
    if not ranks:
        warnings.warn(
            "every triplet of this adapter is pruned or untrained; PEFT needs at least one, so a zero one is written.",
            stacklevel=3,
        )
        ranks = {next(iter(adapter.layers)): 1}
    largest = max(ranks.values())
    tensors = {_lora_name(name, ranks): value for name, value in adapter.others.items()}
    for name, rank in ranks.items():
        ranks[name] = largest if uniform_rank else rank
        for kind, value in zip("AB", _sized(adapter.layers[name], ranks[name]), strict=True):
            tensors[f"{PREFIX}{name}.lora_{kind}.weight"] = value
    path.mkdir(parents=True, exist_ok=True)
    _lora_config(adapter, ranks, largest, known).save_pretrained(path)
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, path / TENSOR_FILE, {"format": "pt"})


@torch.no_grad()
def merge_into(model: nn.Module, adapter: Adapter) -> None:
    """Put W + c B diag(E) A in place of each adapted weight of a plain model, and its trained heads and biases.

    Parameters are replaced, not written to.

    Args:
        model: the base model.
        adapter: paths as in the model.

    Raises:
        ValueError: the adapter doesn't fit the model, or a weight can't be merged.
    """
    existing = dict(model.state_dict(keep_vars=True))
    modules = dict(model.named_modules())
    owners = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    merged = {}
    for path, factors in adapter.layers.items():
        name, module = f"{path}.weight", modules.get(path)
        if module is None:
            raise ValueError(
                f"adapter: its layer {path} is not in {type(model).__name__}; give the base of its training"
            )
        weight = _mergeable(path, existing.get(name), owners)
        delta = factors.increment().to(weight.device)
        delta = delta.t() if isinstance(module, Conv1D) else delta
        if delta.numel() != weight.numel() or delta.shape[0] != weight.shape[0]:
            raise ValueError(
                f"adapter: its layer {path} is {list(delta.shape)}, the model's weight {list(weight.shape)}; "
                "give the base of its training"
            )
        merged[name] = (weight.to(delta.dtype) + delta.reshape(weight.shape)).to(weight.dtype)
    for name, value in adapter.others.items():
        if name not in existing or existing[name].shape != value.shape:
            raise ValueError(
                f"adapter: its tensor {name} {list(value.shape)} has no place in {type(model).__name__}; "
                "give the base of its training, or export as LoRA"
            )
        merged[name] = value.to(existing[name])
    model.load_state_dict(merged, strict=False, assign=True)


def write_model(model: nn.Module, path: str | Path) -> None:
    """Save a plain model: by ``save_pretrained`` where it has that, else as model.safetensors."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    if isinstance(model, PreTrainedModel):
        model.save_pretrained(path)
    else:
        save_model(model, str(path / "model.safetensors"), {"format": "pt"})


def _sized(factors: Factors, rank: int) -> tuple[Tensor, Tensor]:
    """A and B of a LoRA of ``rank``, filled up with zeros, in the shapes of PEFT's layer."""
    lora_A, lora_B = factors.lora()
    missing = rank - lora_A.shape[0]
    lora_A = nn.functional.pad(lora_A, (0, 0, 0, missing))
    lora_B = nn.functional.pad(lora_B, (0, missing))
    if factors.kernel:
        return lora_A.reshape(rank, *factors.kernel), lora_B[..., None, None]
    return lora_A, lora_B


def _lora_name(name: str, ranks: Iterable[str]) -> str:
    """Where PEFT's LoRA keeps a tensor of the base model: an adapted layer's own are one level down."""
    owner, _, leaf = name.rpartition(".")
    return f"{PREFIX}{owner}.base_layer.{leaf}" if owner in ranks else PREFIX + name


def _lora_config(adapter: Adapter, ranks: dict[str, int], largest: int, known: Iterable[str]) -> LoraConfig:
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    # Layers are named one by one, ranks too.
    shared = {k: v for k in SHARED_SETTINGS if k in fields and (v := adapter.config.get(k)) is not None}
    # PEFT matches patterns as regular expressions, after any prefix that ends in a dot.
    pattern = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != largest}
    return LoraConfig(
        **{k: sorted(set(v)) if k == "modules_to_save" else v for k, v in shared.items()},
        r=largest,
        lora_alpha=largest,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=_targets(ranks, {*adapter.layers, *known}),
        inference_mode=True,
    )


def _targets(ranks: Iterable[str], known: set[str]) -> list[str] | str:
    """The layers by their paths; as one regular expression where a path is also the end of another module's."""
    paths = list(ranks)
    others = known.difference(paths)
    if any(other.endswith(f".{path}") for path in paths for other in others):
        return "|".join(map(re.escape, paths))
    return paths


def _mergeable(path: str, weight: Any, owners: list[int]) -> Tensor:
    if type(weight) is not nn.Parameter or weight.dtype not in FLOATS:
        what = "there is none" if weight is None else f"it is a {type(weight).__name__} of {weight.dtype}"
        obstacle = f"{what}: load the base unquantised"
    elif weight.is_meta:
        obstacle = "it is offloaded: load the base without offloading"
    elif owners.count(id(weight)) > 1:
        obstacle = "it is shared with another module: untie it"
    else:
        return weight
    raise ValueError(f"{path}: expected a weight that can be merged, but {obstacle}, or export as LoRA")


def _refuse_foreign(path: Path) -> None:
    config = path / CONFIG_FILE
    if config.is_file() and not re.search(r'"peft_type":\s*"LORA"', config.read_text(encoding="utf-8")):
        raise ValueError(f"path: expected a folder without another method's adapter, {path} holds one; choose another")


__all__ = ["export_lora", "export_merged", "merge_into", "write_lora", "write_model"]
