"""What a training needs beside its weights to continue exactly: ``adalora_state.safetensors``.

PEFT's checkpoint holds the live rows of A and E and columns of B. This file, beside it, holds whole A, E and B as they
were, the averages Ī and Ū, scores, pattern and step count. Patched PEFT models load it along with their adapter; the
Trainer's callback writes it; for other loops there are two functions.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from adalora_kernels.allocator import RankAllocator, Triplet
from adalora_kernels.allocator.compact import exchange_data, is_laid_out, refuse_wrapped, set_rank
from adalora_kernels.allocator.placement import state_of
from adalora_kernels.allocator.saved import TENSORS, check_saved_allocator, check_saved_rows

STATE_FILE = "adalora_state.safetensors"
_FORMAT = "adalora_kernels training state 1"
_KINDS = ("lora_A", "lora_E", "lora_B")
_CURE = "take another checkpoint, or delete this file to go on with averages that start anew"


@dataclass(frozen=True)
class TrainingState:
    """The content of one file.

    Attributes:
        source: where it comes from, for messages.
        layers: paths of the adapted layers.
        factors: A [R, K], E [R, 1] and B [N, R] of each layer; None where a sharding engine's own checkpoint has them.
        allocator: ``state_dict()`` of the allocator.
    """

    source: str
    layers: list[str]
    factors: list[tuple[Tensor, Tensor, Tensor]] | None
    allocator: dict[str, Any]


def save_training_state(target: nn.Module | RankAllocator, directory: str | Path, *, main_process: bool = True) -> None:
    """Write what an exact continuation needs into a checkpoint's directory, beside what ``save_pretrained`` writes.

    For training loops of your own; under the Trainer ``AdaLoraCallback`` does it. It comes between two steps: after
    ``optimizer.step()`` and the allocator's, before the next backward. The file is complete or not there.

    Args:
        target: a model with one patched PEFT AdaLoRA model in it, or the allocator of another model.
        directory: the checkpoint's. An adapter not named "default" has a subdirectory there, as in PEFT.
        main_process: whether this process writes. Where parameters are sharded, all processes must call this.

    Raises:
        TypeError, ValueError: nothing to save in ``target``.
    """
    allocator = allocator_of(target)
    state = allocator.state_dict()
    if not main_process:
        return
    tensors = {name: state.pop(name) for name in list(state) if isinstance(state[name], Tensor)}
    if not held_by_an_engine(allocator):
        for t in allocator.triplets:
            tensors |= {f"{t.name}.{kind}": p for kind, p in zip(_KINDS, t.parameters, strict=True)}
    content = {"layers": [t.name for t in allocator.triplets], "allocator": state}
    folder = Path(directory) / _subfolder(allocator)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{STATE_FILE}.partial"
    copies = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    try:
        save_file(copies, partial, metadata={"format": _FORMAT, "content": json.dumps(content)})
        os.replace(partial, folder / STATE_FILE)
    finally:
        partial.unlink(missing_ok=True)


def load_training_state(target: nn.Module | RankAllocator, directory: str | Path) -> None:
    """Continue from ``save_training_state``: A, E and B, averages, pattern and step count.

    Call it before the optimizer loads its moments, and before the model is wrapped. A patched PEFT model's
    ``load_adapter`` of an adapter that it has does it already. Parameters stay the same objects. Where FSDP or ZeRO
    sharded the parameters as it was saved, A, E and B are in the engine's own checkpoint alone, and left as they are.

    Args:
        target: as for ``save_training_state``.
        directory: the checkpoint's.

    Raises:
        TypeError: ``target`` is neither.
        ValueError: no file there; a truncated one; or one of another adapter. Model and allocator are as they were.
    """
    allocator = allocator_of(target)
    file = state_file(allocator, directory)
    if file is None:
        raise ValueError(
            f"directory: expected a checkpoint with {STATE_FILE}, found none in {directory}; AdaLoraCallback and "
            "save_training_state write it"
        )
    restore(allocator, read_training_state(file))


def allocator_of(target: nn.Module | RankAllocator) -> RankAllocator:
    """The allocator, or that of the patched PEFT model in ``target``.

    Raises:
        TypeError: neither a module nor an allocator.
        ValueError: not one patched model in it, or no adapter trains.
    """
    if isinstance(target, RankAllocator):
        return target
    if not isinstance(target, nn.Module):
        raise TypeError(f"target: expected a patched PEFT model or a RankAllocator, got {type(target).__name__}")
    tuners = [m for m in target.modules() if callable(getattr(type(m), "rank_allocator", None))]
    if len(tuners) != 1:
        raise ValueError(
            f"target: expected one patched PEFT AdaLoRA model in {type(target).__name__}, found {len(tuners)}; call "
            "patch_model(model) first, or give the RankAllocator"
        )
    allocator: RankAllocator = tuners[0].rank_allocator()  # type: ignore[operator]
    return allocator


def state_file(allocator: RankAllocator, directory: str | Path) -> Path | None:
    """The file in a checkpoint's directory, or None."""
    places = (Path(directory) / _subfolder(allocator), Path(directory))
    return next((place / STATE_FILE for place in places if (place / STATE_FILE).is_file()), None)


def read_training_state(file: Path) -> TrainingState:
    """The content of a file.

    Raises:
        ValueError: truncated, or not written by ``save_training_state``.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: expected a whole safetensors file, got {error}; {_CURE}") from error
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"{file}: expected {_FORMAT!r}, got {metadata.get('format')!r}; {_CURE}")
    try:
        content = json.loads(metadata["content"])
        layers, state = list(map(str, content["layers"])), dict(content["allocator"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: expected the allocator's state in its metadata, got {error!r}; {_CURE}") from error
    names = [[f"{layer}.{kind}" for kind in _KINDS] for layer in layers]
    flat = [name for row in names for name in row]
    missing = [name for name in flat if name not in tensors]
    if missing and len(missing) < len(flat):
        raise ValueError(f"{file}: expected A, E and B of each layer, found no {missing[0]}; {_CURE}")
    if strange := sorted(set(tensors).difference(flat, TENSORS)):
        raise ValueError(f"{file}: expected A, E and B of {len(layers)} layers, found {strange[0]} besides; {_CURE}")
    if foreign := [name for name in flat if name in tensors and not tensors[name].is_floating_point()]:
        raise ValueError(f"{file}: expected numbers, found {foreign[0]} of {tensors[foreign[0]].dtype}; {_CURE}")
    factors = None if missing else [(tensors.pop(a), tensors.pop(e), tensors.pop(b)) for a, e, b in names]
    return TrainingState(str(file), layers, factors, {**state, **tensors})


def agrees(allocator: RankAllocator, state: TrainingState) -> bool:
    """Whether the model's A, E and B are those of ``state``, as far as that has them."""
    if state.layers != [t.name for t in allocator.triplets]:
        return False
    held = [t.parameters for t in allocator.triplets]
    return state.factors is None or all(
        same(p.detach(), value)
        for ps, values in zip(held, state.factors, strict=True)
        for p, value in zip(ps, values, strict=True)
    )


def same(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors hold the same numbers, in whatever dtype and wherever."""
    return left.shape == right.shape and torch.allclose(left.to(right), right, rtol=0, atol=0, equal_nan=True)


def restore(allocator: RankAllocator, state: TrainingState) -> None:
    """Continue from ``state``: the allocator, and A, E and B where ``state`` has them, with the rows that it has.

    Raises:
        ValueError: it doesn't fit; model and allocator are as they were.
    """
    check_layers(allocator, state)
    present = [t.shape for t in allocator.triplets]
    stored = [tuple(shape) for shape in state.allocator["shapes"]]
    importance, kept = allocator.importance, allocator.kept
    try:
        if stored != present:
            if state.factors is None or allocator.captured or _first_ranks(allocator, state) != _first_ranks(allocator):
                raise ValueError(f"model: expected layers of the same initial ranks, got {present} for {stored}")
            refuse_wrapped(allocator.model, allocator.triplets)
            allocator.importance = state_of(_as_triplets(allocator, state.factors))
        allocator.kept = state.allocator.get("kept")
        allocator.load_state_dict(state.allocator)
    except ValueError as error:
        allocator.importance, allocator.kept = importance, kept
        raise ValueError(f"{state.source}: {error}; {_CURE}") from error
    if state.factors is not None and not held_by_an_engine(allocator):
        _put(allocator, state.factors)


def check_layers(allocator: RankAllocator, state: TrainingState) -> None:
    """Hold a file to the layers of the model: their names, K and N, and factors of the shapes that it says.

    Raises:
        ValueError: it is of another adapter, or of none.
    """
    names = [t.name for t in allocator.triplets]
    if state.layers != names:
        other = sorted(set(names) ^ set(state.layers)) or names
        raise ValueError(
            f"{state.source}: expected the {len(names)} adapted layers of this model, found {len(state.layers)} that "
            f"differ in {other[0]!r}; {_CURE}"
        )
    shapes: Any = state.allocator.get("shapes")
    try:
        check_saved_allocator(state.allocator)
        if len(shapes) != len(names):
            raise ValueError(f"state['shapes']: expected those of {len(names)} layers, got {len(shapes)}")
        if {"ranked", "loaded_rows"} & state.allocator.keys():
            check_saved_rows(state.allocator, {name: r for name, (r, _, _) in zip(names, shapes, strict=True)})
    except ValueError as error:
        raise ValueError(f"{state.source}: {error}; {_CURE}") from error
    for i, (t, (r, k, n)) in enumerate(zip(allocator.triplets, shapes, strict=True)):
        wanted = ((r, *t.shape[1:2]), (r, 1), (t.shape[2], r))
        found = wanted if state.factors is None else tuple(tuple(value.shape) for value in state.factors[i])
        if (k, n) != t.shape[1:] or found != wanted:
            raise ValueError(
                f"{state.source}: expected A, E and B of {t.name} as {wanted}, found {found} for a layer of K = {k}, "
                f"N = {n}; {_CURE}"
            )


def _first_ranks(allocator: RankAllocator, state: TrainingState | None = None) -> list[int]:
    """How many rows each layer had before it was compacted, or loaded without its masked rows."""
    if state is None:
        kept, loaded = allocator.kept, getattr(allocator, "loaded_rows", {})
        ranks = [t.shape[0] for t in allocator.triplets]
    else:
        kept, loaded = state.allocator.get("kept"), state.allocator.get("loaded_rows", {})
        ranks = [shape[0] for shape in state.allocator["shapes"]]
    rows = [range(rank) for rank in ranks] if kept is None else kept
    return [len(loaded.get(t.name, row)) for t, row in zip(allocator.triplets, rows, strict=True)]


def _as_triplets(allocator: RankAllocator, factors: Sequence[tuple[Tensor, Tensor, Tensor]]) -> list[Triplet]:
    """Stand-ins for the layers that have the factors' shapes, on its devices and in its dtypes."""
    found = []
    for t, values in zip(allocator.triplets, factors, strict=True):
        held = {kind: value.to(p) for kind, value, p in zip(_KINDS, values, t.parameters, strict=True)}
        found.append(Triplet(t.name, t.parameter_names, ((held, "lora_A"), (held, "lora_E"), (held, "lora_B"))))
    return found


@torch.no_grad()
def _put(allocator: RankAllocator, factors: Sequence[tuple[Tensor, Tensor, Tensor]]) -> None:
    for t, values in zip(allocator.triplets, factors, strict=True):
        resized = t.lora_A.shape != values[0].shape
        for p, value in zip(t.parameters, values, strict=True):
            if resized:
                exchange_data(p, value.to(p, copy=True))
                p.requires_grad_(value.numel() > 0)
            else:
                p.copy_(value)
        if resized:
            set_rank(allocator.model.get_submodule(t.name), t.slots[0][1], len(values[0]))


def held_by_an_engine(allocator: RankAllocator) -> bool:
    """Whether the parameters are sharded, or copies of DeepSpeed's master weights: checkpoints of those are its own."""
    return any(is_laid_out(p) for t in allocator.triplets for p in t.parameters)


def _subfolder(allocator: RankAllocator) -> str:
    adapter = getattr(allocator, "adapter", None)
    return "" if adapter in (None, "default") else str(adapter)


__all__ = [
    "STATE_FILE",
    "TrainingState",
    "agrees",
    "allocator_of",
    "check_layers",
    "held_by_an_engine",
    "load_training_state",
    "read_training_state",
    "restore",
    "same",
    "save_training_state",
    "state_file",
]
