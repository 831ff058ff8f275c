"""AdaLoRA in transformers' Trainer: the allocator is called after each optimizer step, its figures are logged, and its
state goes into the checkpoints.

The Trainer clips, steps, calls ``on_optimizer_step`` while gradients are alive and ``global_step`` still counts from 0,
and only then clears the gradients. That is the one event at which importance can be read; with gradient accumulation it
comes once per optimizer step. Under DeepSpeed it comes too late, and the engine's own step is listened to.
"""

from __future__ import annotations

import gc
import warnings
from typing import Any, Literal

from transformers import DefaultFlowCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from adalora_kernels.allocator import RankAllocator
from adalora_kernels.integrations.training_driver import Driver, driver_for


class AdaLoraCallback(TrainerCallback):
    """Calls the rank allocator after each optimizer step of a Trainer.

    With PEFT it drives ``base_model.update_and_allocate``, patched or not. For models of our ``SVDLinear`` give the
    allocator.

    The Trainer's training logs, and so TensorBoard and other reporters, hold adalora/live_rank and adalora/budget, and
    adalora/threshold (of the last ranking) and adalora/orthogonality (the term as it is in the loss; for an allocator
    without its weight) where the model isn't unpatched PEFT.

    Each checkpoint gets ``adalora_state.safetensors``, with which ``train(resume_from_checkpoint=...)`` continues as if
    it had never stopped; also a checkpoint that is pushed to the hub, unless FSDP or ZeRO shards the parameters: there
    the file is written when the upload has begun.

    Args:
        allocator: for models that are not PEFT's; None finds PEFT's AdaLoRA model in the Trainer's model.
        total_step: "auto" takes the Trainer's own number of optimizer steps, a number sets it, None leaves it as it was
            configured. A schedule that is not as long as the training is warned about once.
        layer_ranks: log each layer's rank as well, as adalora/rank/<path>.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """

    def __init__(
        self,
        allocator: RankAllocator | None = None,
        total_step: int | Literal["auto"] | None = "auto",
        *,
        layer_ranks: bool = False,
    ) -> None:
        if allocator is not None and not isinstance(allocator, RankAllocator):
            raise TypeError(f"allocator: expected a RankAllocator or None, got {type(allocator).__name__}")
        if total_step not in ("auto", None) and not (type(total_step) is int and total_step > 0):
            raise ValueError(f"total_step: expected 'auto', a positive number of steps or None, got {total_step!r}")
        self.allocator = allocator
        self.total_step = total_step
        self.layer_ranks = layer_ranks
        self._driver: Driver | None = None
        self._last_step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find what to drive, fit its schedule to the training, and take up the state of a run that is resumed.

        Raises:
            ValueError: nothing to drive, two things to drive, a schedule that leaves no step for pruning, or a corrupt
                file in the checkpoint.
        """
        self._come_first()
        if self._driver is not None:  # of a training that didn't end
            self._driver.end()
        driver = self._driver = driver_for(kwargs["model"], self.allocator)
        if self.total_step is not None:
            driver.set_total_step(state.max_steps if self.total_step == "auto" else self.total_step)
        if driver.total_step != state.max_steps:
            warnings.warn(
                f"AdaLoRA's schedule has {driver.total_step} steps, the training {state.max_steps}: "
                "pass total_step='auto' to AdaLoraCallback.",
                stacklevel=2,
            )
        driver.begin(kwargs.get("optimizer"), args, state)

    def _come_first(self) -> None:
        """Go before the reporters, which the Trainer puts before a user's callbacks, so that they see the figures.

        Events don't name the Trainer: its list of callbacks is found among those who refer to this.
        """
        for holder in gc.get_referrers(self):
            if isinstance(holder, list) and any(isinstance(c, DefaultFlowCallback) for c in holder):
                holder.remove(self)
                holder.insert(0, self)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell the allocator the Trainer's count; variant "paper", which scores before the step, is attached to it."""
        if self._driver is None:
            self._driver = driver_for(kwargs["model"], self.allocator)
        self._driver.before_step(kwargs["optimizer"], state.global_step)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Update importance and masks, unless an attached optimizer has done so in its step.

        A step that accelerate reports as skipped for an overflow is left out.
        """
        if self._driver is None:
            self._driver = driver_for(kwargs["model"], self.allocator)
        skipped = bool(getattr(kwargs.get("optimizer"), "step_was_skipped", False))
        self._driver.step(kwargs["model"], state.global_step, skipped)
        self._last_step = state.global_step

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The optimizer's steps are its own again."""
        if self._driver is not None:
            self._driver.end()

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put the allocator's state into the checkpoint before it is uploaded, which ``on_save`` comes too late for."""
        if self._driver is not None:
            self._driver.before_push(args, state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the allocator's state into the checkpoint that was just written."""
        if self._driver is not None:
            self._driver.save(args, state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add AdaLoRA's figures to each training record."""
        if self._driver is None or not logs or "loss" not in logs:
            return
        figures = {f"adalora/{name}": value for name, value in self._driver.figures(self._last_step).items()}
        if self.layer_ranks:
            figures |= {f"adalora/rank/{layer}": float(rank) for layer, rank in self._driver.layer_ranks().items()}
        logs.update(figures)
        if state.log_history:
            state.log_history[-1].update(figures)


__all__ = ["AdaLoraCallback"]
