"""What a saved state of an allocator must be in itself, before it is taken up: files are edited, cut and mixed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

TENSORS = ("average", "uncertainty", "scores", "live", "threshold")
_SETTINGS = ("variant", "metric", "reduction")
_OF_STATE = ("shapes", "average", "uncertainty", "scores", "live", "updates", "settled")
_OF_ALLOCATOR = (*_SETTINGS, "global_step", "next_step", "kept", *_OF_STATE)
_OF_TUNER = ("ranked", "loaded_rows")
_KNOWN = {*_OF_ALLOCATOR, *_OF_TUNER, "threshold"}


def check_saved_state(state: Any) -> None:
    """Hold what ``ImportanceState.state_dict()`` returned to its kinds, sizes and signs.

    Raises:
        ValueError: it is incomplete, or an entry is not what it must be; named in the message.
    """
    _check_keys(state, _OF_STATE)
    shapes = state["shapes"]
    _check("shapes", shapes, _is_shapes(shapes), "a list of [R, K, N], one for each layer")
    elements, rank = sum(r * (k + 1 + n) for r, k, n in shapes), sum(r for r, _, _ in shapes)
    for name, size in (("average", elements), ("uncertainty", elements), ("scores", rank)):
        _check_sized(name, state[name], size)
        value = state[name]
        good = value.is_floating_point() and bool((torch.isfinite(value) & (value >= 0)).all())
        _check(name, value, good, "finite numbers of at least 0")
    _check_sized("live", state["live"], rank)
    _check("live", state["live"], state["live"].dtype == torch.bool, "booleans")
    _check("updates", state["updates"], _is_count(state["updates"]), "an integer of at least 0")
    _check("settled", state["settled"], type(state["settled"]) is bool, "a boolean")
    threshold = state.get("threshold")  # no state of an earlier version has it
    good = threshold is None or (isinstance(threshold, Tensor) and threshold.numel() == 1 and not threshold.isnan())
    _check("threshold", threshold, good, "a tensor of one number or None")


def check_saved_allocator(state: Any) -> None:
    """Hold what a ``RankAllocator.state_dict()`` returned, of whatever model, to its kinds, sizes and signs.

    Raises:
        ValueError: it is incomplete, has an entry that no allocator writes, or one that is not what it must be.
    """
    _check_keys(state, _OF_ALLOCATOR)
    if strange := sorted(set(state) - _KNOWN, key=str):
        raise ValueError(f"state: expected what state_dict() returned, found {strange[0]!r} besides")
    check_saved_state(state)
    for name in ("global_step", "next_step"):
        _check(name, state[name], _is_count(state[name]), "an optimizer step, an integer of at least 0")
    ranks = [r for r, _, _ in state["shapes"]]
    kept = state["kept"]
    good = kept is None or (_is_rows(kept) and [sum(row) for row in kept] == ranks)
    _check("kept", kept, good, "None, or a list of booleans for each layer, of which as many are true as it has rows")


def check_saved_rows(state: Any, ranks: dict[str, int]) -> None:
    """Hold what the state of a PEFT adapter has besides to the layers, given by path with the rows that they have.

    Raises:
        ValueError: it is incomplete, or not of these layers.
    """
    _check_keys(state, _OF_TUNER)
    loaded = state["loaded_rows"]
    _check("ranked", state["ranked"], type(state["ranked"]) is bool, "a boolean")
    _check("loaded_rows", loaded, isinstance(loaded, dict), "lists of booleans by layer")
    for name, row in loaded.items():
        if name not in ranks or not _is_rows([row]) or sum(row) != ranks[name]:
            rows = f"{ranks[name]} of its rows to be there" if name in ranks else "one of this model's layers"
            raise ValueError(f"state['loaded_rows'][{name!r}]: expected {rows}, got {row!r:.80}")


def _check_keys(state: Any, names: tuple[str, ...]) -> None:
    missing = [name for name in names if not isinstance(state, dict) or name not in state]
    if missing:
        raise ValueError(f"state: expected what state_dict() returned, found no {', '.join(missing)}")


def _check(name: str, value: Any, good: bool, expected: str) -> None:
    if not good:
        got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else f"{value!r:.80}"
        raise ValueError(f"state[{name!r}]: expected {expected}, got {got}")


def _check_sized(name: str, value: Any, size: int) -> None:
    good = isinstance(value, Tensor) and value.shape == (size,)
    _check(name, value, good, f"a tensor of {size} elements")


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _are(items: Any, good: Callable[[Any], bool]) -> bool:
    return isinstance(items, list | tuple) and all(map(good, items))


def _is_shapes(value: Any) -> bool:
    return _are(value, lambda shape: _are(shape, _is_count) and len(shape) == 3)


def _is_rows(value: Any) -> bool:
    return _are(value, lambda row: _are(row, lambda keep: type(keep) is bool))


__all__ = ["TENSORS", "check_saved_allocator", "check_saved_rows", "check_saved_state"]
