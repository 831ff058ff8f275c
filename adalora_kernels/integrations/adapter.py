"""An AdaLoRA adapter as plain tensors, read from a PEFT checkpoint folder or from a model; who trained it is all one.

Names are those of the base model: PEFT's prefix, ``base_layer`` and the adapter's name are taken out.
"""

from __future__ import annotations

import json
import math
import pickle
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from inspect import formatannotation
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

CONFIG_FILE, TENSOR_FILE, PICKLE_FILE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Settings of a config that mean the same in a LoRA config, with what they may be where they are not null.
SHARED_SETTINGS: dict[str, Any] = {
    "task_type": str,
    "base_model_name_or_path": str,
    "revision": str,
    "auto_mapping": dict,
    "lora_dropout": float,
    "fan_in_fan_out": bool,
    "bias": Literal["none", "all", "lora_only"],
    "modules_to_save": list[str],
    "trainable_token_indices": list[int] | dict[str, list[int]],
    "layer_replication": list[list[int]],
    "ensure_weight_tying": bool,
}
_FACTOR = re.compile(r"(.+)\.lora_([AEB])")


@dataclass(frozen=True)
class Factors:
    """The triplets of one layer, whose increment is c · B diag(E) A.

    Attributes:
        A: [R, K].
        E: [R, 1].
        B: [N, R].
        c: scaling / (initial rank + 1e-5).
        kernel: (in-channels, height, width) of a convolution, whose K is their product; else empty.
    """

    A: Tensor
    E: Tensor
    B: Tensor
    c: float
    kernel: tuple[int, ...] = ()

    @property
    def live(self) -> Tensor:
        """Which triplets add anything: bool [R]."""
        return self.E.reshape(-1) != 0

    @property
    def live_rank(self) -> int:
        """How many do."""
        return int(self.live.sum())

    def lora(self) -> tuple[Tensor, Tensor]:
        """The same increment as a LoRA of factor 1: A_live [r, K] and B_live diag(c E_live) [N, r], in fp32 or fp64."""
        live = self.live
        dtype = torch.promote_types(self.A.dtype, torch.float32)
        scale = self.c * self.E.reshape(-1)[live].to(dtype)
        return self.A[live].to(dtype), self.B[:, live].to(dtype) * scale

    def increment(self) -> Tensor:
        """c · B diag(E) A, [N, K], in fp32 or fp64."""
        lora_A, lora_B = self.lora()
        return lora_B @ lora_A


@dataclass(frozen=True)
class Adapter:
    """What a checkpoint of AdaLoRA holds.

    Attributes:
        config: as in adapter_config.json.
        layers: the adapted layers by path.
        others: what else was trained and saved (biases, heads, embeddings), by name.
    """

    config: Mapping[str, Any]
    layers: Mapping[str, Factors]
    others: Mapping[str, Tensor]

    def ranks(self) -> dict[str, int]:
        """Live triplets of each layer."""
        return {path: factors.live_rank for path, factors in self.layers.items()}


def read_checkpoint(folder: str | Path) -> Adapter:
    """Read what PEFT's ``save_pretrained`` has written for an AdaLoRA adapter; the base model is not needed.

    PEFT saves no ``ranknum``: it is the config's ``init_r``.

    Args:
        folder: holds adapter_config.json and adapter_model.safetensors (or .bin).

    Raises:
        ValueError: there is no such checkpoint, it is of another method, or it is damaged.
    """
    folder = Path(folder)
    config = _read_config(folder)
    tensors = _read_tensors(folder)
    init_r, alpha = config["init_r"], config["lora_alpha"]
    c = (alpha if alpha > 0 else float(init_r)) / (init_r + 1e-5)
    parts: dict[str, dict[str, Tensor]] = {}
    others = {}
    for name, tensor in tensors.items():
        name = name.removeprefix(PREFIX)
        if match := _FACTOR.fullmatch(name):
            parts.setdefault(match[1], {})[match[2]] = tensor
        else:
            others[name] = tensor
    layers = {path: _checked(path, found, c, folder, init_r) for path, found in parts.items()}
    if not layers:
        raise ValueError(f"{folder}: expected tensors lora_A, lora_E and lora_B, found none; save the model again")
    return Adapter(config, layers, plain_names(others.items(), layers))


def plain_names(tensors: Iterable[tuple[str, Tensor]], layers: Iterable[str]) -> dict[str, Tensor]:
    """Tensors by their names in the base model.

    With bias="all" PEFT's files hold a head's bias three times over, two of them inside PEFT's own wrapper.

    Args:
        tensors: by PEFT's names, without ``base_model.model.``.
        layers: paths of the adapted layers.
    """
    wrapped = {f"{path}.base_layer." for path in layers}
    plain = {}
    for name, tensor in tensors:
        if ".original_module." in name or ".modules_to_save." in name:
            continue
        inside = next((prefix for prefix in wrapped if name.startswith(prefix)), None)
        plain[name if inside is None else inside.removesuffix("base_layer.") + name.removeprefix(inside)] = tensor
    return plain


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not path.is_file():
        below = sorted(str(p.parent) for p in folder.glob(f"*/{CONFIG_FILE}"))
        cure = f"did you mean {', '.join(below[-3:])}?" if below else "give the folder that save_pretrained() wrote"
        raise ValueError(f"{folder}: expected a folder with {CONFIG_FILE}, found none; {cure}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: expected JSON, got a damaged file ({error}); save the adapter again") from None
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "ADALORA":
        raise ValueError(f"{path}: expected an adapter of peft_type ADALORA, got {kind}; give an AdaLoRA checkpoint")
    for name in ("init_r", "target_r"):
        if not _is_a(int, config.get(name)) or config[name] < 1:
            raise ValueError(
                f"{path}: expected {name} to be a rank of at least 1, got {config.get(name)}; save the adapter again"
            )
    alpha = config.get("lora_alpha")
    if not _is_a(float, alpha) or not math.isfinite(alpha):
        raise ValueError(f"{path}: expected lora_alpha to be a finite number, got {alpha!r}; save the adapter again")
    dropout = config.get("lora_dropout")
    if _is_a(float, dropout) and not 0 <= dropout <= 1:
        raise ValueError(f"{path}: expected lora_dropout in [0, 1], got {dropout}; save the adapter again")
    for name, kind in SHARED_SETTINGS.items():
        if config.get(name) is not None and not _is_a(kind, config[name]):
            raise ValueError(
                f"{path}: expected {name} to be null or {formatannotation(kind)}, got {config[name]!r:.80}; save the "
                "adapter again"
            )
    return config


def _is_a(kind: Any, value: Any) -> bool:
    """Whether what JSON gave is of this kind; a whole number is a ``float`` too, and True is no number."""
    origin, kinds = get_origin(kind), get_args(kind)
    if origin is Literal:
        return value in kinds
    if origin is UnionType:
        return any(_is_a(each, value) for each in kinds)
    if origin in (list, dict):
        items = value.values() if isinstance(value, dict) else value
        return isinstance(value, origin) and all(_is_a(kinds[-1], item) for item in items)
    return type(value) is kind or (kind is float and type(value) is int)


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path, pickled = folder / TENSOR_FILE, folder / PICKLE_FILE
    try:
        if not path.is_file() and pickled.is_file():
            path = pickled
            tensors: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
                raise ValueError("it holds something else")
            return tensors
        return load_file(path)
    except FileNotFoundError:
        raise ValueError(f"{folder}: expected {TENSOR_FILE} beside {CONFIG_FILE}, found none; copy it there") from None
    except (SafetensorError, pickle.UnpicklingError, OSError, RuntimeError, EOFError, ValueError) as error:
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: expected tensors, got a damaged file ({cause}); copy or save it again") from None


def _checked(path: str, found: dict[str, Tensor], c: float, folder: Path, initial_rank: int) -> Factors:
    missing = [f"lora_{kind}" for kind in "AEB" if kind not in found]
    if missing:
        raise ValueError(f"{folder}: expected lora_A, lora_E and lora_B of {path}, {' and '.join(missing)} is missing")
    A, E, B = (found[kind] for kind in "AEB")
    if A.dim() != 2 or B.dim() != 2 or E.shape != (A.shape[0], 1) or B.shape[1] != A.shape[0]:
        shapes = ", ".join(str(list(t.shape)) for t in (A, E, B))
        raise ValueError(f"{folder}: expected A [R, K], E [R, 1] and B [N, R] of {path}, got {shapes}; save it again")
    if len(A) > initial_rank:
        raise ValueError(
            f"{folder}: expected at most init_r = {initial_rank} rows, {path} has {len(A)}; copy config and tensors of "
            "one checkpoint"
        )
    if foreign := {str(t.dtype) for t in (A, E, B)}.difference(map(str, FLOATS)):
        raise ValueError(
            f"{folder}: expected 16, 32 or 64-bit numbers, {path} holds {', '.join(foreign)}; save it again"
        )
    if not all(bool(t.isfinite().all()) for t in (A, E, B)):
        raise ValueError(f"{folder}: expected finite numbers, {path} holds others; take an earlier checkpoint")
    return Factors(A, E, B, c)


__all__ = [
    "CONFIG_FILE",
    "FLOATS",
    "PREFIX",
    "SHARED_SETTINGS",
    "TENSOR_FILE",
    "Adapter",
    "Factors",
    "plain_names",
    "read_checkpoint",
]
