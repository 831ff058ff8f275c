"""What ``AdaLoraCallback`` drives: PEFT's model, patched or not, or a ``RankAllocator`` of other layers."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from adalora_kernels.allocator import Attachment, RankAllocator, compute_orth_regu
from adalora_kernels.allocator.attach import innermost
from adalora_kernels.allocator.distributed import ShardedState
from adalora_kernels.allocator.zero import zero_optimizer
from adalora_kernels.integrations.checkpoint import (
    STATE_FILE,
    agrees,
    held_by_an_engine,
    read_training_state,
    restore,
    save_training_state,
    state_file,
)


class Driver:
    """What the callback needs of whoever scores and masks. This one is PEFT's own model, unpatched."""

    def __init__(self, tuner: Any) -> None:
        self.tuner = tuner

    @property
    def config(self) -> Any:
        """Of the adapter that trains.

        Raises:
            ValueError: none does.
        """
        configs = self.tuner.peft_config
        for name in (self.tuner.__dict__.get("trainable_adapter_name"), *configs):
            if name in configs and not configs[name].inference_mode:
                return configs[name]
        raise ValueError(
            "model: expected a trainable AdaLoRA adapter, found only inference adapters; load it with is_trainable=True"
        )

    @property
    def total_step(self) -> int | None:
        """T of its schedule."""
        total: int = self.config.total_step
        return total

    def set_total_step(self, total_step: int) -> None:
        """Set T.

        Raises:
            ValueError: the schedule would leave no step for pruning; nothing changes.
        """
        _check_schedule(total_step, self.config.tinit, self.config.tfinal)
        self.config.total_step = total_step

    def begin(self, optimizer: Any, args: TrainingArguments, state: TrainerState) -> None:
        """Training begins, or goes on from a checkpoint whose weights and moments are loaded."""

    def end(self) -> None:
        """Training has ended."""

    def before_step(self, optimizer: Any, global_step: int) -> None:
        """The optimizer is about to make step ``global_step``, counted from 0."""

    def step(self, model: nn.Module, global_step: int, skipped: bool) -> None:
        """The optimizer has made this step, or skipped it for an overflow."""
        # From T - t_f on PEFT reads no gradients, and at it alone PEFT makes the final pattern.
        if not skipped or global_step >= self.config.total_step - self.config.tfinal:
            self.tuner.update_and_allocate(global_step)

    def before_push(self, args: TrainingArguments, state: TrainerState) -> None:
        """The Trainer is about to upload a checkpoint that it has written, before it says so by ``on_save``."""

    def save(self, args: TrainingArguments, state: TrainerState) -> None:
        """The Trainer has written a checkpoint. PEFT's own allocator has nothing to add."""

    def figures(self, global_step: int) -> dict[str, float]:
        """What to log after this step."""
        budget, _ = self.tuner.rankallocator.budget_schedule(global_step)
        ranks = self.layer_ranks()
        live = sum(ranks.values()) if ranks else self.tuner.rankallocator.init_bgt
        return {"live_rank": float(live), "budget": float(budget)}

    def layer_ranks(self) -> dict[str, int]:
        """The live rank of each layer by its path; empty where that isn't known."""
        name = self.tuner.trainable_adapter_name
        pattern = self.config.rank_pattern or {}
        return {key.removesuffix(f".{name}").removesuffix(".lora_E"): sum(row) for key, row in pattern.items()}


class AllocatorDriver(Driver):
    """A ``RankAllocator`` of layers that are not PEFT's."""

    _engine_steps = False
    _attachment: Attachment | None = None
    _written: Path | None = None  # the checkpoint that has its training state already

    def __init__(self, allocator: RankAllocator) -> None:
        self._allocator = allocator

    @property
    def allocator(self) -> RankAllocator:
        """The allocator as it is now."""
        return self._allocator

    @property
    def total_step(self) -> int | None:
        """As ``Driver``'s."""
        return self.allocator.total_step

    def set_total_step(self, total_step: int) -> None:
        """As ``Driver``'s."""
        _check_schedule(total_step, self.allocator.initial_warmup, self.allocator.final_warmup)
        self.allocator.set_total_step(total_step)

    def begin(self, optimizer: Any, args: TrainingArguments, state: TrainerState) -> None:
        """Take up the training state, and attach where the Trainer's events come too late or know too little.

        DeepSpeed's engine steps within accelerate's backward. Of an overflow step with a GradScaler a fused optimizer
        tells nobody but the step's own hooks, since to know it would wait for the device.
        """
        self._engine_steps = (
            zero_optimizer(optimizer) is not None or type(optimizer).__name__ == "DeepSpeedOptimizerWrapper"
        )
        if state.global_step > 0:
            self.resume(args, state)
        scaled = getattr(optimizer, "scaler", None) is not None and not hasattr(innermost(optimizer), "allocator")
        if (self._engine_steps or scaled) and not self.allocator.attached:
            self._attachment = self.allocator.attach(optimizer, step=lambda: state.global_step)

    def end(self) -> None:
        """As ``Driver``'s."""
        if self._attachment is not None:
            self._attachment.detach()
        self._attachment = None

    @property
    def _steps_elsewhere(self) -> bool:
        return self._engine_steps or self._attachment is not None

    def resume(self, args: TrainingArguments, state: TrainerState) -> None:
        """Find the file beside the weights that were loaded: the Trainer doesn't say where it took them from."""
        usual = _checkpoint_folder(args, state)
        for place in filter(None, (args.resume_from_checkpoint, usual)):
            file = state_file(self.allocator, place)
            found = None if file is None else read_training_state(file)
            if found is not None and agrees(self.allocator, found):
                restore(self.allocator, found)
                return
        if self.allocator.next_step == 0:
            warnings.warn(
                f"AdaLoRA: no {STATE_FILE} of these weights in {usual}: averages start anew. Where the checkpoint is "
                "elsewhere, name it as TrainingArguments(resume_from_checkpoint=...), or call "
                "load_training_state(allocator, directory) before train().",
                stacklevel=2,
            )

    def before_step(self, optimizer: Any, global_step: int) -> None:
        """Tell the allocator the Trainer's count; variant "paper" is attached, since it scores before the step."""
        if self._steps_elsewhere:
            return
        self.allocator.expect(global_step)
        if self.allocator.pre_step and not self.allocator.attached:
            self.allocator.attach(optimizer)

    def step(self, model: nn.Module, global_step: int, skipped: bool) -> None:
        """As ``Driver``'s, unless an attached optimizer has done so in its step."""
        if not (skipped or self._steps_elsewhere):
            self.allocator.advance(model, global_step)

    def before_push(self, args: TrainingArguments, state: TrainerState) -> None:
        """As ``Driver``'s. Only the main process hears of it, and a sharded state is gathered by all of them."""
        if not isinstance(self.allocator.importance, ShardedState) and _checkpoint_folder(args, state).is_dir():
            self.save(args, state)

    def save(self, args: TrainingArguments, state: TrainerState) -> None:
        """Write the training state beside the weights, once: an upload may be reading it."""
        folder = _checkpoint_folder(args, state)
        if folder == self._written:
            return
        if args.should_save and not folder.is_dir():  # a search for hyper-parameters has folders of its own
            warnings.warn(f"AdaLoRA: no {folder}: the allocator's state is not saved there.", stacklevel=2)
        save_training_state(self.allocator, folder, main_process=args.should_save and folder.is_dir())
        self._written = folder

    def figures(self, global_step: int) -> dict[str, float]:
        """As ``Driver``'s."""
        allocator = self.allocator
        threshold = allocator.importance.threshold if allocator.clock is None else allocator.clock.threshold
        figures = {
            "live_rank": float(sum(self.layer_ranks().values())),
            "budget": float(allocator.schedule.budget(global_step)),
        }
        if threshold is not None:
            figures["threshold"] = threshold.item()
        term = self._orthogonality()
        return figures if term is None else {**figures, "orthogonality": term}

    def layer_ranks(self) -> dict[str, int]:
        """As ``Driver``'s."""
        return self.allocator.live_ranks()

    @torch.no_grad()
    def _orthogonality(self) -> float | None:
        """The term without its weight γ, which the training loop has."""
        if held_by_an_engine(self.allocator):
            return None
        return compute_orth_regu(self.allocator.model, 1.0).item()


class PatchedDriver(AllocatorDriver):
    """A patched PEFT model, by way of its ``update_and_allocate``."""

    def __init__(self, tuner: Any) -> None:
        self.tuner = tuner

    @property
    def allocator(self) -> RankAllocator:
        """That of the adapter that trains."""
        allocator: RankAllocator = self.tuner.rank_allocator()
        return allocator

    def set_total_step(self, total_step: int) -> None:
        """As ``Driver``'s."""
        Driver.set_total_step(self, total_step)

    def resume(self, args: TrainingArguments, state: TrainerState) -> None:
        """PEFT's ``load_adapter`` has done it, but what shards parameters loads them by itself."""
        if self._engine_steps or held_by_an_engine(self.allocator):
            super().resume(args, state)

    def step(self, model: nn.Module, global_step: int, skipped: bool) -> None:
        """As ``AllocatorDriver``'s."""
        allocator = self.allocator
        if not (skipped or self._steps_elsewhere) and allocator.next_step != global_step + 1:
            allocator.expect(global_step)
            self.tuner.update_and_allocate(global_step)
            allocator.note(global_step, (allocator.schedule.budget(global_step), None))

    def _orthogonality(self) -> float | None:
        """The term as it was last in the loss, with its weight."""
        term = self.tuner.last_orthogonality
        return None if term is None else term.item()


def driver_for(model: nn.Module, allocator: RankAllocator | None) -> Driver:
    """What to drive.

    Raises:
        ValueError: nothing, or two things.
    """
    # By the method and not by the class: PEFT need not be installed to train our own layers.
    tuners = [m for m in model.modules() if callable(getattr(type(m), "update_and_allocate", None))]
    if allocator is not None:
        if tuners:
            raise ValueError("allocator: expected None, since the model is PEFT's and has an allocator of its own")
        return AllocatorDriver(allocator)
    if len(tuners) != 1:
        raise ValueError(
            f"model: expected one PEFT AdaLoRA model in {type(model).__name__}, found {len(tuners)}; "
            "for other models give the callback an allocator"
        )
    return PatchedDriver(tuners[0]) if hasattr(type(tuners[0]), "rank_allocator") else Driver(tuners[0])


def _checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _check_schedule(total_step: int, initial: int, final: int) -> None:
    if total_step <= initial + final:
        raise ValueError(
            f"total_step: expected more than the schedule's {initial} initial and {final} final steps together, "
            f"got {total_step}"
        )


__all__ = ["AllocatorDriver", "Driver", "PatchedDriver", "driver_for"]
