"""PEFT's ``load_adapter`` of the adapter that trains, as the Trainer calls it for ``resume_from_checkpoint``.

PEFT then looks at no config and no pattern: a checkpoint of live rows fails with a size error. Here the rows go back to
where they were, and with the training state beside them the rest of A, E and B, the averages and the step count do too.
Parameters have all their rows then, by which the optimizer's moments fit, and stay the same objects; unless it is asked
for by name, none is cast. The same holds for
``from_pretrained(..., is_trainable=True)`` where ``patch_peft`` was called; an adapter for inference is loaded as ever.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import nn

from adalora_kernels.allocator import find_triplets
from adalora_kernels.integrations.adapter import CONFIG_FILE
from adalora_kernels.integrations.checkpoint import (
    STATE_FILE,
    TrainingState,
    check_layers,
    held_by_an_engine,
    read_training_state,
    restore,
    same,
)
from adalora_kernels.integrations.rank_pattern import by_layer

if TYPE_CHECKING:
    from adalora_kernels.integrations.adalora_model import FusedAdaLoraModel

_AUTOCAST = 2  # place of autocast_adapter_dtype among load_adapter's arguments after adapter_name
_CURE = f"take another checkpoint, or delete {STATE_FILE} there to go on with averages that start anew"


def follow_load_adapter() -> None:
    """Let PEFT's models bring patched ones their training state; what isn't patched is loaded as ever."""
    original = PeftModel.load_adapter
    if hasattr(original, "_follows_training_state"):
        return

    @wraps(original)
    def load_adapter(self: Any, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        tuner = self.base_model
        trained = tuner.trained_adapter() if callable(getattr(type(tuner), "rank_allocator", None)) else None
        folder = Path(model_id, kwargs.get("subfolder") or "")
        if trained is None or trained[0] != adapter_name or not folder.is_dir() or not _trains_here(tuner, trained[0]):
            return original(self, model_id, adapter_name, *args, **kwargs)
        config, pattern = trained[1], trained[1].rank_pattern
        arrival = _Arrival(tuner, folder)
        config.rank_pattern = None  # or PEFT would cut the layers to the pattern of before
        if len(args) <= _AUTOCAST:
            kwargs.setdefault("autocast_adapter_dtype", False)  # or a 16-bit adapter would go on in fp32
        handle = tuner.register_load_state_dict_pre_hook(arrival)
        try:
            return original(self, model_id, adapter_name, *args, **kwargs)
        finally:
            handle.remove()
            if not arrival.restored:
                config.rank_pattern = pattern

    load_adapter._follows_training_state = True  # type: ignore[attr-defined]
    PeftModel.load_adapter = load_adapter


def _trains_here(tuner: FusedAdaLoraModel, adapter: str) -> bool:
    """Whether the adapter is one that an allocator can hold: all of it on devices that have memory."""
    devices = {p.device for t in find_triplets(tuner.model, adapter) for p in t.parameters}
    return bool(devices) and torch.device("meta") not in devices


class _Arrival:
    """One checkpoint on its way into a patched model: a pre-hook of ``load_state_dict``.

    Args:
        tuner: the model.
        folder: the checkpoint's.

    Raises:
        ValueError: a corrupt file.
    """

    def __init__(self, tuner: FusedAdaLoraModel, folder: Path) -> None:
        self.folder, self.restored = folder, False
        self.allocator = tuner.rank_allocator()
        file = folder / STATE_FILE
        self.state = read_training_state(file) if file.is_file() else None
        self.whole = self.state is not None and self.state.factors is not None
        self.pattern = {} if self.whole else self._config_pattern()

    def _config_pattern(self) -> dict[str, list[bool]]:
        file = self.folder / CONFIG_FILE
        try:
            pattern = json.loads(file.read_text(encoding="utf-8")).get("rank_pattern") if file.is_file() else None
            return by_layer(pattern or {}, [t.name for t in self.allocator.triplets], self.allocator.name)
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{file}: expected PEFT's config of this adapter, got {error}") from error

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        """Put what belongs into ``state_dict``, and continue from there.

        Raises:
            ValueError: it is of another adapter, or the state is of another checkpoint; nothing changes.
        """
        triplets = self.allocator.triplets
        if held_by_an_engine(self.allocator):
            raise ValueError(
                f"model: expected plain parameters, but {triplets[0].parameter_names[0]} is sharded or an engine's "
                "copy; call load_adapter before the model is wrapped, or load the engine's own checkpoint"
            )
        names = [f"{prefix}model.{name}" for t in triplets for name in t.parameter_names]
        if missing := [name for name in names if name not in state_dict]:
            raise ValueError(
                f"{self.folder}: expected this model's adapter, found no {missing[0]} in its weights; take a "
                "checkpoint of this adapter"
            )
        saved = [tuple(state_dict[name] for name in names[i : i + 3]) for i in range(0, len(names), 3)]
        state = self._state_with(saved)
        self._check_the_rest(module, state_dict, prefix, set(names))
        restore(self.allocator, state)
        self.restored = True
        state_dict.update(zip(names, (p.detach() for t in triplets for p in t.parameters), strict=True))
        if self.state is None:
            warnings.warn(
                f"AdaLoRA: no {STATE_FILE} in {self.folder}: averages start anew, and masked rows without what "
                "they had learnt. AdaLoraCallback and save_training_state write it.",
                stacklevel=2,
            )
        elif not self.whole:
            warnings.warn(
                f"AdaLoRA: {STATE_FILE} in {self.folder} is of sharded parameters, which the engine's own checkpoint "
                "alone has whole: masked rows start without what they had learnt.",
                stacklevel=2,
            )

    def _state_with(self, saved: list[tuple[Any, ...]]) -> TrainingState:
        """What the files say together."""
        state = self.state
        if state is None:
            return self._from_live_rows(saved)
        check_layers(self.allocator, state)
        live, ranks = state.allocator["live"], [shape[0] for shape in state.allocator["shapes"]]
        if not state.allocator.get("ranked"):
            live = torch.ones_like(live)
        if state.factors is None:
            rows = self._from_live_rows(saved)
            state = replace(state, factors=rows.factors)
            check_layers(self.allocator, state)
            if not torch.equal(live, rows.allocator["live"]):
                raise self._not_of_one_step("which rows live")
            return state
        rows = live.split(ranks)
        for t, row, (a, e, b), found in zip(self.allocator.triplets, rows, state.factors, saved, strict=True):
            for name, want, got in zip(t.parameter_names, (a[row], e[row], b[:, row]), found, strict=True):
                if not same(want, got):
                    raise self._not_of_one_step(name)
        return state

    def _not_of_one_step(self, where: str) -> ValueError:
        return ValueError(
            f"{self.folder}: expected {STATE_FILE} and the adapter's weights of one and the same step, but they differ "
            f"in {where}; {_CURE}"
        )

    def _check_the_rest(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, adapters: set[str]) -> None:
        """What torch would find out when half of it is loaded."""
        for name, held in (*module.named_parameters(), *module.named_buffers()):
            got = state_dict.get(prefix + name, held)
            if prefix + name not in adapters and got.shape != held.shape:
                raise ValueError(
                    f"{self.folder}: expected {name} of shape {list(held.shape)}, found {list(got.shape)}; take a "
                    "checkpoint of this model"
                )

    def _from_live_rows(self, saved: list[tuple[Any, ...]]) -> TrainingState:
        """What PEFT's format says of a training: which rows live, and those."""
        allocator, factors, live = self.allocator, [], []
        rank = allocator.config.init_r
        for t, (a, e, b) in zip(allocator.triplets, saved, strict=True):
            row = self.pattern.get(t.name, [True] * rank)
            whole = len(e) == rank
            at = torch.tensor(row, device=a.device) | whole
            if len(row) != rank or (a.shape, e.shape) != ((int(at.sum()), t.shape[1]), (int(at.sum()), 1)):
                raise ValueError(
                    f"{self.folder}: expected {sum(row)} rows of {t.name}, as its rank_pattern says, or {rank}, the "
                    f"initial rank, each of {t.shape[1]}; found A {list(a.shape)}, E {list(e.shape)}; take a "
                    "checkpoint of this adapter"
                )
            if b.shape != (t.shape[2], len(e)):
                raise ValueError(
                    f"{self.folder}: expected B of {t.name} as {[t.shape[2], len(e)]}, found {list(b.shape)}; take a "
                    "checkpoint of this adapter"
                )
            full_a, full_b = t.lora_A.detach().to(a, copy=True), t.lora_B.detach().to(b, copy=True)
            if t.shape[0] != rank:  # rows that the model has lost begin as PEFT begins them
                shapes = (rank, t.shape[1]), (t.shape[2], rank)
                full_a, full_b = (torch.randn(shape, device="cpu").to(a) * 0.02 for shape in shapes)
            full_e = e.new_zeros(rank, 1)
            full_a[at], full_e[at], full_b[:, at] = a, e, b
            factors.append((full_a, full_e, full_b))
            live += row
        elements = sum(value.numel() for values in factors for value in values)
        anew = {
            "shapes": [[rank, *t.shape[1:]] for t in allocator.triplets],
            "average": torch.zeros(elements, device="cpu"),
            "uncertainty": torch.zeros(elements, device="cpu"),
            "scores": torch.zeros(len(live), device="cpu"),
            "live": torch.tensor(live, device="cpu"),
            "updates": 0,
            "settled": False,
            "kept": None,
            "ranked": bool(self.pattern),
            "loaded_rows": {},
        }
        settings = {name: getattr(allocator, name) for name in ("variant", "metric", "reduction")}
        steps = {"global_step": allocator.global_step, "next_step": allocator.next_step}
        return TrainingState(
            str(self.folder), [t.name for t in allocator.triplets], factors, {**settings, **steps, **anew}
        )


__all__ = ["follow_load_adapter"]
