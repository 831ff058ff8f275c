"""PEFT's rank pattern, {"<path>.lora_E.<adapter>": [which rows live]}, and what PEFT's own allocator remembers.

PEFT drops the adapter's name when it saves, and cuts it out of the path as well where the path happens to contain it. A
pattern always has as many entries as the layer had rows at first, also after loading has left only the live rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adalora_kernels.allocator import RankAllocator

Pattern = dict[str, list[bool]]


def by_layer(rank_pattern: Mapping[str, Any], paths: Iterable[str], adapter: str) -> Pattern:
    """The pattern with layer paths as keys, whichever way PEFT spelled them.

    Raises:
        ValueError: it is no dictionary, a name belongs to no layer, or a row is no list of booleans.
    """
    if not isinstance(rank_pattern, Mapping):
        raise ValueError(f"rank_pattern: expected rows by layer, got {rank_pattern!r:.80}")
    paths = list(paths)
    spellings: dict[str, str] = {path_key(path, adapter): path for path in paths}
    for path in paths:
        spellings.setdefault(f"{path}.lora_E", path)
    for path in paths:
        spellings.setdefault(path_key(path, adapter).replace(f".{adapter}", ""), path)
    pattern = {}
    for name, row in rank_pattern.items():
        if name not in spellings:
            raise ValueError(f"rank_pattern: {name!r} names no AdaLoRA layer of this model")
        values = row.reshape(-1).tolist() if isinstance(row, Tensor) else row
        if not isinstance(values, list | tuple) or any(value not in (False, True) for value in values):
            raise ValueError(f"rank_pattern[{name!r}]: expected a list of booleans, got {row!r:.80}")
        pattern[spellings[name]] = [bool(value) for value in values]
    return pattern


def path_key(path: str, adapter: str) -> str:
    """PEFT's name of a layer's row in the pattern."""
    return f"{path}.lora_E.{adapter}"


def gather(pattern: Sequence[bool], kept: Sequence[bool] | None) -> list[bool]:
    """The inverse of ``allocator.compact.spread``: which of the rows that the layer has now live."""
    return list(pattern) if kept is None else [p for p, k in zip(pattern, kept, strict=True) if k]


def adopt_averages(allocator: RankAllocator, peft_allocator: Any) -> None:
    """Continue with the averages of PEFT's allocator, where it has any and they are finite."""
    average, uncertainty = (t.clone() for t in allocator.importance.current())
    offsets = allocator.importance.layout.offsets
    for i, name in enumerate(_parameter_names(allocator)):
        if name in peft_allocator.exp_avg_ipt:
            average[offsets[i] : offsets[i + 1]] = peft_allocator.exp_avg_ipt[name].reshape(-1)
            uncertainty[offsets[i] : offsets[i + 1]] = peft_allocator.exp_avg_unc[name].reshape(-1)
            allocator.importance.updates = 1
    if not bool((average.isfinite() & uncertainty.isfinite()).all()):
        allocator.importance.updates = 0
        warnings.warn(
            "AdaLoRA: PEFT's importance averages are not finite, as one overflow step leaves them for good: they start "
            "anew.",
            stacklevel=2,
        )
        return
    allocator.importance.set_current(average, uncertainty)


def return_averages(allocator: RankAllocator, peft_allocator: Any) -> None:
    """Let PEFT's allocator continue with ours."""
    peft_allocator.reset_ipt()
    if allocator.importance.updates == 0:
        return
    average, uncertainty = allocator.importance.current()
    offsets = allocator.importance.layout.offsets
    params = [p for t in allocator.triplets for p in t.parameters]
    for i, (name, param) in enumerate(zip(_parameter_names(allocator), params, strict=True)):
        part = slice(offsets[i], offsets[i + 1])
        # PEFT starts all three anew where its latest |θ g| is missing; it is overwritten before it is read.
        peft_allocator.ipt[name] = torch.zeros_like(param)
        peft_allocator.exp_avg_ipt[name] = average[part].view(param.shape).to(param, copy=True)
        peft_allocator.exp_avg_unc[name] = uncertainty[part].view(param.shape).to(param, copy=True)


def _parameter_names(allocator: RankAllocator) -> list[str]:
    return [name for triplet in allocator.triplets for name in triplet.parameter_names]


__all__ = ["Pattern", "adopt_averages", "by_layer", "gather", "path_key", "return_averages"]
