"""AdaLoRA in transformers' Trainer: the allocator is called after each optimizer step, and its figures are logged.

The Trainer clips, steps, calls ``on_optimizer_step`` while gradients are alive and ``global_step`` still counts from 0,
and only then clears the gradients. That is the one event at which importance can be read; with gradient accumulation it
comes once per optimizer step.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal, Protocol

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from adalora_kernels.allocator import RankAllocator


class _Driver(Protocol):
    """What the callback needs of PEFT's model or of our allocator."""

    @property
    def total_step(self) -> int | None: ...

    def set_total_step(self, total_step: int) -> None: ...

    def before_step(self, optimizer: Any, global_step: int) -> None: ...

    def step(self, model: nn.Module, global_step: int, skipped: bool) -> None: ...

    def figures(self, global_step: int) -> dict[str, float]: ...


class AdaLoraCallback(TrainerCallback):
    """Calls the rank allocator after each optimizer step of a Trainer.

    With PEFT it drives ``base_model.update_and_allocate``, patched or not. For models of our ``SVDLinear`` give the
    allocator. The Trainer's training logs then hold adalora/live_rank, adalora/budget and, where the model is patched,
    adalora/orthogonality.

    Args:
        allocator: for models that are not PEFT's; None finds PEFT's AdaLoRA model in the Trainer's model.
        total_step: "auto" takes the Trainer's own number of optimizer steps, a number sets it, None leaves it as it was
            configured. A schedule that is not as long as the training is warned about once.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """

    def __init__(
        self, allocator: RankAllocator | None = None, total_step: int | Literal["auto"] | None = "auto"
    ) -> None:
        if allocator is not None and not isinstance(allocator, RankAllocator):
            raise TypeError(f"allocator: expected a RankAllocator or None, got {type(allocator).__name__}")
        if isinstance(total_step, str) and total_step != "auto":
            raise ValueError(f"total_step: expected 'auto', a number or None, got {total_step!r}")
        if isinstance(total_step, int) and total_step <= 0:
            raise ValueError(f"total_step: expected at least 1, got {total_step}")
        self.allocator = allocator
        self.total_step = total_step
        self._driver: _Driver | None = None
        self._last_step = 0

    def attach(self, trainer: Trainer) -> AdaLoraCallback:
        """Add this to ``trainer`` ahead of its other callbacks, so that TensorBoard and the like get its figures.

        Reporters come before a user's callbacks: passed as ``callbacks=[...]``, this one's figures reach the log
        history, the console and later callbacks alone.
        """
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find what to drive and fit its schedule to the training.

        Raises:
            ValueError: nothing to drive, two things to drive, or a schedule that leaves no step for pruning.
        """
        driver = self._driver = _driver_for(kwargs["model"], self.allocator)
        if self.total_step is not None:
            driver.set_total_step(state.max_steps if self.total_step == "auto" else self.total_step)
        if driver.total_step != state.max_steps:
            warnings.warn(
                f"AdaLoRA's schedule has {driver.total_step} steps, the training {state.max_steps}: "
                "pass total_step='auto' to AdaLoraCallback.",
                stacklevel=2,
            )

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell the allocator the Trainer's count; variant "paper", which scores before the step, is attached to it."""
        if self._driver is None:
            self._driver = _driver_for(kwargs["model"], self.allocator)
        self._driver.before_step(kwargs["optimizer"], state.global_step)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Update importance and masks, unless an attached optimizer has done so in its step.

        A step that accelerate reports as skipped for an overflow is left out.
        """
        if self._driver is None:
            self._driver = _driver_for(kwargs["model"], self.allocator)
        skipped = bool(getattr(kwargs.get("optimizer"), "step_was_skipped", False))
        self._driver.step(kwargs["model"], state.global_step, skipped)
        self._last_step = state.global_step

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
        logs.update(figures)
        if state.log_history:
            state.log_history[-1].update(figures)


class _PeftDriver:
    def __init__(self, tuner: Any) -> None:
        self.tuner = tuner

    @property
    def config(self) -> Any:
        configs = self.tuner.peft_config
        for name in (self.tuner.__dict__.get("trainable_adapter_name"), *configs):
            if name in configs and not configs[name].inference_mode:
                return configs[name]
        raise ValueError("model: expected a trainable AdaLoRA adapter, found only inference adapters")

    @property
    def total_step(self) -> int | None:
        total: int = self.config.total_step
        return total

    def set_total_step(self, total_step: int) -> None:
        _check_schedule(total_step, self.config.tinit, self.config.tfinal)
        self.config.total_step = total_step

    @property
    def patched(self) -> bool:
        return hasattr(type(self.tuner), "rank_allocator")

    def before_step(self, optimizer: Any, global_step: int) -> None:
        if self.patched:
            self.tuner.rank_allocator().expect(global_step)

    def step(self, model: nn.Module, global_step: int, skipped: bool) -> None:
        if not self.patched:
            self.tuner.update_and_allocate(global_step)
        elif not skipped and (allocator := self.tuner.rank_allocator()).next_step != global_step + 1:
            allocator.expect(global_step)
            self.tuner.update_and_allocate(global_step)
            allocator.note(global_step, (allocator.schedule.budget(global_step), None))

    def figures(self, global_step: int) -> dict[str, float]:
        if not self.patched:
            budget, _ = self.tuner.rankallocator.budget_schedule(global_step)
            pattern = self.config.rank_pattern
            live = sum(map(sum, pattern.values())) if pattern else self.tuner.rankallocator.init_bgt
            return {"live_rank": float(live), "budget": float(budget)}
        figures = _AllocatorDriver(self.tuner.rank_allocator()).figures(global_step)
        term = self.tuner.last_orthogonality
        return figures if term is None else {**figures, "orthogonality": term.item()}


class _AllocatorDriver:
    def __init__(self, allocator: RankAllocator) -> None:
        self.allocator = allocator

    @property
    def total_step(self) -> int | None:
        return self.allocator.total_step

    def set_total_step(self, total_step: int) -> None:
        _check_schedule(total_step, self.allocator.initial_warmup, self.allocator.final_warmup)
        self.allocator.set_total_step(total_step)

    def before_step(self, optimizer: Any, global_step: int) -> None:
        self.allocator.expect(global_step)
        if self.allocator.pre_step and not self.allocator.attached:
            self.allocator.attach(optimizer)

    def step(self, model: nn.Module, global_step: int, skipped: bool) -> None:
        if not skipped:
            self.allocator.advance(model, global_step)

    def figures(self, global_step: int) -> dict[str, float]:
        live = sum(self.allocator.live_ranks().values())
        return {"live_rank": float(live), "budget": float(self.allocator.schedule.budget(global_step))}


def _driver_for(model: nn.Module, allocator: RankAllocator | None) -> _Driver:
    # By the method and not by the class: PEFT need not be installed to train our own layers.
    tuners = [m for m in model.modules() if callable(getattr(type(m), "update_and_allocate", None))]
    if allocator is not None:
        if tuners:
            raise ValueError("allocator: expected None, since the model is PEFT's and has an allocator of its own")
        return _AllocatorDriver(allocator)
    if len(tuners) != 1:
        raise ValueError(
            f"model: expected one PEFT AdaLoRA model in {type(model).__name__}, found {len(tuners)}; "
            "for other models give the callback an allocator"
        )
    return _PeftDriver(tuners[0])


def _check_schedule(total_step: int, initial: int, final: int) -> None:
    if total_step <= initial + final:
        raise ValueError(
            f"total_step: expected more than the schedule's {initial} initial and {final} final steps together, "
            f"got {total_step}"
        )


__all__ = ["AdaLoraCallback"]
