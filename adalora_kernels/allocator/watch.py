"""One warning where a model trains and its rank allocator is never called: that is plain LoRA, slower.

Torch calls a global hook after every optimizer's step. It is registered with the first that is watched, and stays:
torch walks over these hooks as they run, so that none may be taken away within a step.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from adalora_kernels.allocator.triplets import Slot

PATIENCE = 10  # optimizer steps


@dataclass
class _Watched:
    slot: Slot
    what: str
    remedy: str
    steps: int = 0


_watched: WeakKeyDictionary[Any, _Watched] = WeakKeyDictionary()


def watch(owner: object, slot: Slot, what: str, remedy: str) -> None:
    """Warn if an optimizer makes ``PATIENCE`` steps on the parameter at ``slot`` before ``called`` with it.

    Args:
        owner: what is watched; not kept alive.
        slot: where one of its parameters is kept.
        what: what has been done so far.
        remedy: the call that is missing.
    """
    _watched[owner] = _Watched(slot, what, remedy)
    _register()


def unwatch(owner: object) -> None:
    """``owner`` needs no allocator any more."""
    _watched.pop(owner, None)


def called(slots: Iterable[Slot]) -> None:
    """Some allocator was called for the parameters at ``slots``."""
    if _watched:
        registries = [registry for registry, _ in slots]
        for owner, entry in list(_watched.items()):
            if any(registry is entry.slot[0] for registry in registries):
                del _watched[owner]


@cache
def _register() -> None:
    register_optimizer_step_post_hook(_count)


def _count(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for owner, entry in list(_watched.items()):
        registry, key = entry.slot
        parameter = registry.get(key)
        if not any(p is parameter for group in optimizer.param_groups for p in group["params"]):
            continue
        entry.steps += 1
        if entry.steps == PATIENCE:
            warnings.warn(
                f"AdaLoRA: {entry.what}, and {PATIENCE} optimizer steps have passed without a call of the rank "
                f"allocator: ranks stay as they are, as in plain LoRA. Missing: {entry.remedy}.",
                stacklevel=2,
            )
            del _watched[owner]


__all__ = ["PATIENCE", "called", "unwatch", "watch"]
